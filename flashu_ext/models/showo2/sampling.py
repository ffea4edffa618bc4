"""The Euler sampler: one loop from noise to latents for all steppers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...planning.groups import steps_of
from ..checks import check_callback
from ..masks import additive, omni_allowed
from ..sampling import Callback, DrawInputs, integrate, stepper_of
from ..velocity import guided
from . import validate

__all__ = ["DEFAULT_STEPS", "DenseStepper", "SampleInputs", "sample", "time_grid"]

DEFAULT_STEPS = 50
"""Grid points of Show-o2's own scripts."""


def time_grid(steps: int, shift: float | None) -> Tensor:
    """The ODE's times, fp32 [steps]: t = u / (u + shift - shift * u) on u = linspace(0, 1); no shift for None or 0.

    Source: upstream transport/integrators.py.
    """
    u = torch.linspace(0, 1, steps, dtype=torch.float32, device="cpu")
    return u / (u + shift - shift * u) if shift else u


@dataclass(frozen=True)
class SampleInputs(DrawInputs):
    """Of Show-o2; the counterparts are empty prompts."""

    time_shift: float | None
    """See `time_grid`."""

    @classmethod
    def build(
        cls,
        model: Any,
        noise: Tensor,
        text_tokens: Tensor,
        text_tokens_null: Tensor | None,
        modality_positions: Tensor,
        modality_positions_null: Tensor | None,
        steps: int | None,
        guidance_scale: Any,
        time_shifting_factor: float | None,
    ) -> SampleInputs:
        """Check the arguments of `sample`. Raises TypeError, ValueError or IndexError naming the wrong one."""
        text, null = (text_tokens, modality_positions), (text_tokens_null, modality_positions_null)
        scale = validate.check_sample_inputs(
            model, noise, text[0], null[0], text[1], null[1], guidance_scale, time_shifting_factor
        )
        steps = steps_of("steps", steps, 2, "grid points")
        if guided(scale):
            text = tuple(torch.cat(pair) for pair in zip(text, null, strict=True))  # type: ignore[arg-type, assignment]
        return cls(noise, *text, steps, scale, time_shifting_factor)

    def times(self, steps: int) -> Tensor:
        """The time grid of `steps` points, fp32, on the noise's device."""
        return time_grid(steps, self.time_shift).to(self.noise.device)

    def schedule(self, grid_points: int) -> tuple[Tensor, Tensor]:
        times = self.times(grid_points)
        return times[:-1], times[1:] - times[:-1]


@torch.no_grad()
def sample(
    model: Any,
    noise: Tensor,
    text_tokens: Tensor,
    text_tokens_null: Tensor | None,
    modality_positions: Tensor,
    modality_positions_null: Tensor | None,
    steps: int | None = None,
    guidance_scale: float | Sequence[float] | Tensor = 5.0,
    time_shifting_factor: float | None = 3.0,
    callback: Callback | None = None,
    return_velocity: bool = False,
) -> Any:
    """Generate images: integrate the model's velocity from noise (t = 0) to latents (t = 1).

    Args:
        model: a Showo2 (or upstream Showo2Qwen2_5) model, accelerated or not.
        noise: [B, channels, H, W]. H and W are the images' size in latents, of any grid that the model has positions for; spans
            have as many tokens.
        text_tokens, text_tokens_null: int64 [B, length], prompt and empty prompt in Show-o2's layout (`prompts`).
        modality_positions, modality_positions_null: int64 [B, 1, 2], (offset, length) of the image span in each.
        steps: grid points; steps - 1 evaluations. None: the accelerated config's, else 50.
        guidance_scale: s of v_null + s (v - v_null), one for all images or one for each; 0 runs the prompts alone. An
            accelerated config may vary it over time.
        time_shifting_factor: see `time_grid`.
        callback: called after each step with its number (from 1) and the latents, which must not be modified.
        return_velocity: also return the guided velocities.

    Returns:
        Latents fp32 [B, channels, H, W], or (latents, velocities [steps - 1, B, channels, H, W]).

    Raises:
        TypeError, ValueError, IndexError: an argument is wrong; the message names it, what was expected and what was given.
    """
    inputs = SampleInputs.build(
        model,
        noise,
        text_tokens,
        text_tokens_null,
        modality_positions,
        modality_positions_null,
        steps,
        guidance_scale,
        time_shifting_factor,
    )
    check_callback("callback", callback)
    return integrate(stepper_of(model, inputs, DenseStepper), callback, return_velocity)


class DenseStepper:
    """Upstream's loop: every evaluation runs the whole sequence of both guidance branches, which share one latent."""

    def __init__(self, model: Any, inputs: SampleInputs):
        self.model = model
        self.inputs = inputs
        self._times = inputs.times(inputs.steps or DEFAULT_STEPS)
        self.evaluations = len(self._times) - 1
        self._images = inputs.noise.shape[0]
        noise = inputs.noise.float()
        self._latents = torch.cat([noise, noise]) if inputs.guided else noise
        dtype = model.showo.model.embed_tokens.weight.dtype
        self._mask = additive(omni_allowed(inputs.positions, inputs.tokens.shape[1])[:, None], dtype)

    def step(self, index: int) -> None:
        inputs, times = self.inputs, self._times
        self._velocity = self.model.t2i_generate(
            image_latents=self._latents,
            t=times[index].expand(self._latents.shape[0]),
            text_tokens=inputs.tokens,
            attention_mask=self._mask,
            modality_positions=inputs.positions,
            max_seq_len=inputs.tokens.shape[1],
            guidance_scale=inputs.guidance_scale,
        ).float()
        self._latents = self._latents + (times[index + 1] - times[index]) * self._velocity

    def velocity(self) -> Tensor:
        return self._velocity[: self._images]

    def latents(self) -> Tensor:
        return self._latents[: self._images]

    def close(self) -> None:
        pass
