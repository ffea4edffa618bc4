"""The Euler sampler of the rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...planning.groups import steps_of, whole
from ..checks import check_callback, check_own, check_tensor, check_tokens, guidance_scale_of
from ..sampling import Callback, DrawInputs, integrate, stepper_of
from ..velocity import guide
from .config import PATCH, JanusFlowConfig, config_of
from .model import JanusFlow

__all__ = ["DEFAULT_STEPS", "TIMES", "DenseStepper", "SampleInputs", "check_latents", "sample"]

DEFAULT_STEPS = 30
"""Evaluations of upstream's demo."""

TIMES = 1000
"""The time that the network reads at the end; noise is 0."""


@dataclass(frozen=True)
class SampleInputs(DrawInputs):
    """Of JanusFlow. The counterparts without a prompt have bos and padding that is not seen."""

    @classmethod
    def build(
        cls, model: Any, noise: Tensor, tokens: Tensor, steps: int | None, guidance_scale: Any, pad_token: int
    ) -> SampleInputs:
        """Check the arguments of `sample`. Raises TypeError, ValueError or IndexError naming the wrong one."""
        embed = model.language_model.model.embed_tokens
        config = check_latents("noise", noise, model)
        if isinstance(tokens, Tensor) and tokens.dim() == 1:
            tokens = tokens.expand(noise.shape[0], -1)
        check_tokens("tokens", tokens, noise.shape[0], embed)
        if tokens.shape[1] < 2:
            raise ValueError(f"tokens: expected bos, a prompt and the tag of drawing, got {tokens.shape[1]} tokens")
        pad = whole(pad_token)
        if pad is None or not 0 <= pad < embed.weight.shape[0]:
            raise IndexError(f"pad_token: expected a token id in [0, {embed.weight.shape[0]}), got {pad_token!r}")
        evaluations = steps_of("steps", steps, 1, "evaluations")
        scale = guidance_scale_of(guidance_scale, noise.shape[0])
        # The time's embedding takes the place of the tag, which tells the language model to draw.
        prompts = tokens[:, :-1]
        if scale:
            without = torch.full_like(prompts, pad)
            without[:, 0] = prompts[:, 0]
            prompts = torch.cat([prompts, without])
        span = 1 + config.grid**2
        positions = torch.tensor([[[prompts.shape[1], span]]], device=prompts.device).repeat(len(prompts), 1, 1)
        tokens = torch.cat([prompts, prompts.new_full((len(prompts), span), pad)], dim=1)
        return cls(noise, tokens, positions, None if evaluations is None else evaluations + 1, scale)

    @property
    def length(self) -> int:
        """Tokens before the span."""
        return int(self.positions[0, 0, 0])

    @property
    def seen(self) -> tuple[int, ...]:
        images = self.noise.shape[0]
        return (self.length,) * images + (1,) * (len(self.tokens) - images)

    def schedule(self, grid_points: int) -> tuple[Tensor, Tensor]:
        steps = grid_points - 1
        device = self.noise.device
        times = [step / steps * TIMES for step in range(steps)]
        return torch.tensor(times, dtype=torch.float32, device=device), torch.full(
            (steps,), 1 / steps, dtype=torch.float32, device=device
        )


def check_latents(name: str, value: Any, model: Any) -> JanusFlowConfig:
    """Raise TypeError or ValueError for what is not latents of images; the model's sizes."""
    check_tensor(name, value, 4, "a floating-point tensor", model.language_model.model.embed_tokens.weight.device)
    config = config_of(model, max(PATCH, value.shape[-1] // PATCH * PATCH))
    channels, size = config.latent_channels, config.latent_size
    if value.shape[0] == 0 or tuple(value.shape[1:]) != (channels, size, size):
        raise ValueError(f"{name}: expected [images >= 1, {channels}, {size}, {size}], got {tuple(value.shape)}")
    return config


@torch.no_grad()
def sample(
    model: Any,
    noise: Tensor,
    tokens: Tensor,
    steps: int | None = None,
    guidance_scale: float | Sequence[float] | Tensor = 2.0,
    pad_token: int = 0,
    callback: Callback | None = None,
    return_velocity: bool = False,
) -> Any:
    """Generate images: integrate the model's velocity from noise (t = 0) to latents (t = 1) in equal steps.

    Args:
        model: a JanusFlow, accelerated or not.
        noise: [images, channels, H, W].
        tokens: int64 [n] or [images, n]: bos, prompt and the tag of drawing, whose place the time's embedding takes.
        steps: evaluations; None: the accelerated config's grid points less one, else 30.
        guidance_scale: w of v_null + w (v - v_null), one for all images or one for each; 0 and 1 run the prompts alone when
            accelerated (a dense model runs both branches at 1, as upstream).
        pad_token: takes the prompt's places where there is none; never seen.
        callback: called after each step with its number (from 1) and the latents, which must not be modified.
        return_velocity: also return the guided velocities.

    Returns:
        Latents fp32 [images, channels, H, W] before the VAE's scaling, or (latents, velocities [steps, images, ...]).

    Raises:
        TypeError, ValueError, IndexError: an argument is wrong; the message names it, what was expected and what was given.
    Source: upstream demo/app_janusflow.py.
    """
    inputs = SampleInputs.build(model, noise, tokens, steps, guidance_scale, pad_token)
    check_callback("callback", callback)
    return integrate(stepper_of(model, inputs, DenseStepper), callback, return_velocity)


class DenseStepper:
    """Upstream's loop: every evaluation runs prompt and image of both guidance branches.

    Attributes:
        branches: the last evaluation's velocity before guidance, [rows, channels, H, W].
        hidden: its final hidden states, [rows, n, hidden].
    """

    branches: Tensor
    hidden: Tensor

    def __init__(self, model: Any, inputs: SampleInputs):
        check_own(model, JanusFlow)
        self.model, self.inputs = model, inputs
        self.times, self.dt = inputs.schedule(inputs.steps or DEFAULT_STEPS + 1)
        self.evaluations = len(self.times)
        self._latents = inputs.noise.float()
        self._seen = torch.tensor(inputs.seen, device=inputs.noise.device)

    def step(self, index: int) -> None:
        model, inputs = self.model, self.inputs
        images, branches = inputs.noise.shape[0], len(inputs.tokens) // inputs.noise.shape[0]
        time = model.vision_gen_enc_model.time_embed(self.times[index].expand(images))
        encoded = model.vision_gen_enc_model(self._latents.to(time.dtype), time)
        span = model.span(encoded, time).repeat(branches, 1, 1)
        self.hidden = model.backbone(inputs.tokens[:, : inputs.length], self._seen, span)
        patches = self.hidden[:, -encoded.shape[1] :]
        encoded, time = encoded.repeat(branches, 1, 1), time.repeat(branches, 1)
        self.branches = model.velocity(patches, encoded, time).float()
        self._velocity = guide(self.branches, inputs.guidance_scale) if inputs.guided else self.branches
        self._latents = self._latents + self.dt[index] * self._velocity

    def velocity(self) -> Tensor:
        return self._velocity

    def latents(self) -> Tensor:
        return self._latents

    def close(self) -> None:
        pass
