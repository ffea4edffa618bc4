"""What all families' samplers share: the inputs of an image, and the loop from noise to latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..planning.config import FlashUConfig
from ..planning.groups import is_real
from ..planning.reading import shown
from .accelerated import handle_of
from .pictures import Size
from .velocity import Scale, guided

__all__ = [
    "Callback",
    "DrawInputs",
    "Formula",
    "ImageBatch",
    "Segment",
    "Stepper",
    "TaylorSeer",
    "check_drawing",
    "integrate",
    "stepper_of",
]

Callback = Callable[[int, Tensor], None]
"""Called after each step with its number, from 1, and the latents, which must not be modified."""


Formula = Callable[[Tensor, Tensor], Tensor]
"""(velocity rows of an image's branches [branches, patches, numbers], guidance scale fp32 [1]) -> the guided [1, patches,
numbers], by operators whose bits do not depend on other images. Hashable and comparable: it is part of what a step computes."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Tokens that come to be seen together: a text, or an image before the one that is drawn. Rows that begin with the same
    objects share what is computed of them."""

    embeds: Tensor
    """[1, n, hidden]."""
    positions: Tensor
    """int64 [n], for the rotary embedding."""
    causal: bool
    """Whether a token sees earlier ones of the segment only; what came before is seen whole."""
    drawn: int = 0
    """Tokens, from the first, that drawing experts compute (`Adapter.experts`)."""


@dataclass(frozen=True)
class TaylorSeer:
    """Most evaluations extrapolate the last layer's output from earlier ones. Source: arXiv 2503.06923.

    Attributes:
        max_order: of the differences.
        first_enhance: evaluations at the start that are computed.
        fresh_threshold: of those after, every how many-th is.
    """

    max_order: int = 6
    first_enhance: int = 5
    fresh_threshold: int = 3

    def __post_init__(self) -> None:
        for name, least, most in (("max_order", 0, 8), ("first_enhance", 1, None), ("fresh_threshold", 1, None)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least or (most and value > most):
                upto = "" if most is None else f" and <= {most}"
                raise ValueError(f"{name}: expected an integer >= {least}{upto}, got {value!r}")

    def computes(self, index: int) -> bool:
        """Whether evaluation `index`, from 0, is computed."""
        return index < self.first_enhance or (index - self.first_enhance + 1) % self.fresh_threshold == 0


@dataclass(frozen=True)
class DrawInputs(ABC):
    """The checked inputs of an image (or a batch of images), both guidance branches in one batch of rows."""

    noise: Tensor
    """[B, channels, H, W]."""
    tokens: Tensor
    """int64 [rows, length]; rows are the B prompts and, only where `guided`, their B counterparts without a prompt after them."""
    positions: Tensor
    """int64 [rows, 1, 2], (offset, length) of every row's image span."""
    steps: int | None
    """Grid points; None: the accelerated config's, else the family's default."""
    guidance_scale: Scale
    """The caller's; 0 runs the prompts alone."""

    @property
    def guided(self) -> bool:
        return guided(self.guidance_scale)

    @property
    def seen(self) -> tuple[int, ...] | None:
        """For each row how many tokens before its span are seen, from the first; None: all."""
        return None

    @property
    def branches(self) -> int:
        """Rows of an image."""
        return 2 if self.guided else 1

    def context(self, parts: Any) -> Sequence[Sequence[Segment]] | None:
        """For each row what its span sees, where that is not the row's `tokens`; the row's `seen` is its length. Then these are
        the inputs of one image. parts: the family's adapter, on the runtime's kernels."""
        return None

    def trailing(self, parts: Any) -> Tensor | None:
        """The embeddings [1, `Adapter.trail`, hidden] of the tokens behind the patches, where the family has some."""
        return None

    @property
    def formula(self) -> Formula | None:
        """What guides; None: `velocity.guide`."""
        return None

    @property
    def forecast(self) -> TaylorSeer | None:
        """Which evaluations are predicted, in place of what the config's `HeadCaching` says."""
        return None

    def guides(self, grid_points: int, config: FlashUConfig) -> Sequence[bool] | None:
        """For each evaluation whether it is guided; None: where the scale asks for it."""
        return None

    @abstractmethod
    def schedule(self, grid_points: int) -> tuple[Tensor, Tensor]:
        """fp32 [grid_points - 1] each, on the noise's device: every evaluation's time, as `Adapter.embed_time` takes it, and the
        step that the latents take along its velocity."""


class Stepper(Protocol):
    """Integrates latents along the ODE, one evaluation of the velocity per step."""

    evaluations: int

    def step(self, index: int) -> None:
        """Run evaluation `index`, from 0."""

    def velocity(self) -> Tensor:
        """The last evaluation's velocity after guidance, [B, channels, H, W]; not overwritten by later steps."""

    def latents(self) -> Tensor:
        """fp32 [B, channels, H, W]; not overwritten by later steps."""

    def close(self) -> None:
        """End the image, finished or not."""


def check_drawing(inputs: DrawInputs, parts: Any) -> None:
    """Raise for inputs that do not fit together, or not the model of an adapter, whoever made them.

    Raises:
        TypeError, ValueError, IndexError: naming the field, what was expected and what was given.
    """
    noise, tokens, positions, scale = inputs.noise, inputs.tokens, inputs.positions, inputs.guidance_scale
    scales = scale if isinstance(scale, tuple) else (scale,)
    if not all(is_real(each) and each >= 0 for each in scales):
        raise ValueError(
            f"guidance_scale: expected a number >= 0, or a tuple with one for each image, got {shown(scale)}"
        )
    if noise.dim() != 4 or noise.shape[0] < 1 or noise.shape[1] != parts.latent_channels:
        raise ValueError(f"noise: expected [images >= 1, {parts.latent_channels}, H, W], got {tuple(noise.shape)}")
    images, rows = len(noise), len(noise) * inputs.branches
    if len(scales) not in (1, images):
        raise ValueError(f"guidance_scale: expected one, or one for each of {images} images, got {len(scales)}")
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or len(tokens) != rows:
        raise ValueError(
            f"tokens: expected int64 [{rows}, n], {inputs.branches} rows for each of {images} images, got {tokens.dtype} "
            f"{tuple(tokens.shape)}"
        )
    if tuple(positions.shape) != (rows, 1, 2):
        raise ValueError(f"positions: expected [{rows}, 1, 2], got {tuple(positions.shape)}")
    span = parts.lead + parts.sizes(tuple(noise.shape[2:])).patches + parts.trail
    for offset, length in positions[:, 0].tolist():
        if length != span or not 0 <= offset <= tokens.shape[1] - span:
            raise ValueError(
                f"positions: expected (offset, {span}) within {tokens.shape[1]} tokens, got ({offset}, {length})"
            )
    if parts.trail and type(inputs).trailing is DrawInputs.trailing:
        raise ValueError(
            f"trailing: expected {parts.trail} tokens behind the patches, {type(inputs).__name__} gives none"
        )
    vocabulary = len(parts.embed_tokens.weight)
    least, most = (int(each) for each in tokens.aminmax())
    if not 0 <= least <= most < vocabulary:
        raise IndexError(f"tokens: expected token ids in [0, {vocabulary}), got {least} to {most}")


@dataclass(frozen=True)
class ImageBatch:
    """Images of a pipeline that are drawn together.

    Attributes:
        prompts: of each image.
        noise: fp32 [images, channels, H, W].
        steps, size: as in `ModelPipeline.generate`.
        guidance_scale: of all images, or a tuple with one for each.
        config, adapter: as in `stepper_of`.
    """

    prompts: Sequence[str]
    noise: Tensor
    steps: int | None
    guidance_scale: Scale
    size: Size | None = None
    config: FlashUConfig | None = None
    adapter: str | None = None


D = TypeVar("D", bound=DrawInputs)


def stepper_of(
    model: Any,
    inputs: D,
    dense: Callable[[Any, D], Stepper],
    config: FlashUConfig | None = None,
    adapter: str | None = None,
) -> Stepper:
    """The steps of images, accelerated if the model is.

    Args:
        dense: makes those of a dense model.
        config: of these images, where the model is accelerated; None: the model's.
        adapter: of the LoRA adapters of peft in an accelerated model the one that draws, '__base__' for none; None: what is
            active.
    """
    handle = handle_of(model)
    return dense(model, inputs) if handle is None else handle.stepper(inputs, config, adapter)


def integrate(stepper: Stepper, callback: Callback | None = None, return_velocity: bool = False) -> Any:
    """Run all of a stepper's steps and close it, also after an error.

    Returns:
        Latents [B, channels, H, W], or (latents, velocities [evaluations, B, channels, H, W]).
    """
    velocities = []
    try:
        for index in range(stepper.evaluations):
            stepper.step(index)
            if return_velocity:
                velocities.append(stepper.velocity())
            if callback is not None:
                callback(index + 1, stepper.latents())
        latents = stepper.latents()
    finally:
        stepper.close()
    return (latents, torch.stack(velocities)) if return_velocity else latents
