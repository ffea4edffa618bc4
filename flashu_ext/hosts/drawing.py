"""How each family draws what a host program asks for: the size, the noise, and which prompts one call of the sampler takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.accelerated import handle_of
from ..models.bagel import sampling as bagel
from ..models.bagel.pipeline import Pipeline as BagelPipeline
from ..models.janusflow import sampling as janusflow
from ..models.janusflow.pipeline import Pipeline as JanusFlowPipeline
from ..models.pictures import Size
from ..models.pipeline import ModelPipeline
from ..models.prompts import by_length
from ..models.sampling import Callback
from ..models.showo2 import sampling as showo2
from ..models.showo2.pipeline import Pipeline as Showo2Pipeline

__all__ = ["Drawer", "drawer_of"]


class Drawer(ABC):
    """A pipeline's sampler, seen the same way for every family: latents are [B, channels, H, W], and steps are evaluations
    of the model."""

    def __init__(self, pipe: Any):
        self.pipe = pipe

    @property
    def model(self) -> Any:
        return self.pipe.model

    def evaluations(self) -> int:
        """Where a caller asks for no number: as the accelerated config says, else the family's own."""
        handle = handle_of(self.model)
        points = None if handle is None else handle.config.steps
        return self.own_evaluations if points is None else int(points) - 1

    def noise(self, generator: torch.Generator | None, size: Any) -> Tensor:
        """Of one image, fp32 [channels, H, W] on the generator's device: the same numbers that the pipeline draws for a seed."""
        device = "cpu" if generator is None else generator.device
        return torch.randn(self.shape(size), generator=generator, dtype=torch.float32, device=device)

    own_evaluations: int

    @abstractmethod
    def size(self, height: int | None, width: int | None) -> Size | None:
        """The size that is drawn, None: the model's own. Raises ValueError where it cannot be."""

    @abstractmethod
    def shape(self, size: Any) -> tuple[int, int, int]:
        """(channels, H, W) of an image's latents."""

    @abstractmethod
    def times(self, evaluations: int) -> Tensor:
        """The time of every evaluation as the model reads it, fp32 [evaluations]."""

    @abstractmethod
    def groups(self, prompts: Sequence[str]) -> list[list[int]]:
        """Which prompts are drawn together, one group after another."""

    @abstractmethod
    def draw(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        evaluations: int,
        scale: float,
        size: Size | None,
        callback: Callback,
    ) -> Tensor:
        """Latents of a group of prompts. callback: as in the family's `sample`, but always with [B, channels, H, W]."""


class _Showo2(Drawer):
    own_evaluations = showo2.DEFAULT_STEPS - 1

    def size(self, height: int | None, width: int | None) -> Size | None:
        own = self.pipe.pixels
        size = None if height is width is None else (height or own, width or own)
        self.pipe.grid(size)
        return size

    def shape(self, size: Any) -> tuple[int, int, int]:
        config = self.model.config
        rows, columns = (patches * config.patch_size for patches in self.pipe.grid(size))
        return config.image_latent_dim, rows, columns

    def times(self, evaluations: int) -> Tensor:
        return showo2.time_grid(evaluations + 1, self.pipe.time_shifting_factor)[:-1]

    def groups(self, prompts: Sequence[str]) -> list[list[int]]:
        return [list(range(len(prompts)))]

    def draw(self, prompts: Any, noise: Any, evaluations: int, scale: float, size: Any, callback: Any) -> Tensor:
        tokens = self.pipe.prompt_tokens(prompts, size)
        settings = {"guidance_scale": scale, "time_shifting_factor": self.pipe.time_shifting_factor}
        drawn: Tensor = showo2.sample(self.model, noise, **tokens, steps=evaluations + 1, callback=callback, **settings)
        return drawn


class _JanusFlow(Drawer):
    own_evaluations = janusflow.DEFAULT_STEPS

    def size(self, height: int | None, width: int | None) -> Size | None:
        own = self.pipe.latent_pixels * self.model.config.latent_size
        self.pipe.grid((height or own, width or own))
        return None

    def shape(self, size: Any) -> tuple[int, int, int]:
        config = self.model.config
        return config.latent_channels, config.latent_size, config.latent_size

    def times(self, evaluations: int) -> Tensor:
        return torch.tensor([step / evaluations * janusflow.TIMES for step in range(evaluations)], dtype=torch.float32)

    def groups(self, prompts: Sequence[str]) -> list[list[int]]:
        return by_length(self.pipe.layout.drawing(prompts))

    def draw(self, prompts: Any, noise: Any, evaluations: int, scale: float, size: Any, callback: Any) -> Tensor:
        rows = torch.tensor(self.pipe.layout.drawing(prompts), dtype=torch.int64, device=noise.device)
        drawn: Tensor = janusflow.sample(
            self.model, noise, rows, evaluations, scale, self.pipe.layout.pad, callback=callback
        )
        return drawn


class _Bagel(Drawer):
    own_evaluations = bagel.DEFAULT_TIMESTEPS - 1

    def size(self, height: int | None, width: int | None) -> Size | None:
        size = (height or self.pipe.size[0], width or self.pipe.size[1])
        self.pipe.grid(size)
        return size

    def shape(self, size: Any) -> tuple[int, int, int]:
        config = self.model.config
        rows, columns = (each * config.latent_patch for each in bagel.size_grid(self.model, size))
        return config.latent_channels, rows, columns

    def noise(self, generator: torch.Generator | None, size: Any) -> Tensor:
        """Drawn as upstream does: token by token."""
        rows, columns = bagel.size_grid(self.model, size)
        device = "cpu" if generator is None else generator.device
        tokens = (rows * columns, self.model.config.patch_width)
        noise: Tensor = self.model.unpacked(
            torch.randn(tokens, generator=generator, dtype=torch.float32, device=device), size
        )
        return noise[0]

    def times(self, evaluations: int) -> Tensor:
        return bagel.time_grid(evaluations + 1, self.pipe.timestep_shift)[:-1]

    def groups(self, prompts: Sequence[str]) -> list[list[int]]:
        return [[index] for index in range(len(prompts))]

    def draw(self, prompts: Any, noise: Any, evaluations: int, scale: float, size: Any, callback: Any) -> Tensor:
        layout, guidance, unpacked = self.pipe.layout, self.pipe.guidance, self.model.unpacked
        tokens = bagel.sample(
            self.model,
            self.model.packed(noise),
            [layout.text(prompts[0], noise.device)],
            size,
            layout.ids,
            evaluations + 1,
            scale,
            guidance.image,
            guidance.interval,
            self.pipe.timestep_shift,
            guidance.renorm_min,
            guidance.renorm,
            callback=lambda number, given: callback(number, unpacked(given, size)),
        )
        drawn: Tensor = unpacked(tokens, size)
        return drawn


_DRAWERS: dict[type[ModelPipeline], Callable[[Any], Drawer]] = {
    Showo2Pipeline: _Showo2,
    JanusFlowPipeline: _JanusFlow,
    BagelPipeline: _Bagel,
}


def drawer_of(pipe: ModelPipeline) -> Drawer:
    """Raises TypeError for what is no family's pipeline."""
    for kind, drawer in _DRAWERS.items():
        if isinstance(pipe, kind):
            return drawer(pipe)
    raise TypeError(f"pipeline: expected one of showo2, janusflow or bagel, got {type(pipe).__name__}")
