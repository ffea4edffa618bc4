"""The Euler sampler: from noise to latents, dense, or through the handle where the model is accelerated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import validate

__all__ = ["sample", "time_grid"]

DEFAULT_STEPS = 50


def time_grid(steps: int, shift: float | None) -> Tensor:
    """The ODE's times, fp32 [steps]: t = u / (u + shift - shift * u) on u = linspace(0, 1); no shift for None or 0.

    Source: upstream transport/integrators.py.
    """
    u = torch.linspace(0, 1, steps)
    return u / (u + shift - shift * u) if shift else u


@torch.no_grad()
def sample(
    model: Any,
    noise: Tensor,
    text_tokens: Tensor,
    text_tokens_null: Tensor | None,
    modality_positions: Tensor,
    modality_positions_null: Tensor | None,
    steps: int | None = None,
    guidance_scale: float = 5.0,
    time_shifting_factor: float | None = 3.0,
    callback: Callable[[int, Tensor], None] | None = None,
    return_velocity: bool = False,
) -> Any:
    """Draw images: integrate the model's velocity from noise (t = 0) to latents (t = 1).

    Args:
        model: a Showo2 (or upstream Showo2Qwen2_5) model, accelerated or not.
        noise: [B, channels, H, W].
        text_tokens, text_tokens_null: int64 [B, length], prompt and empty prompt in Show-o2's layout (`prompts`).
        modality_positions, modality_positions_null: int64 [B, 1, 2], (offset, length) of the image span in each.
        steps: grid points; steps - 1 evaluations. None: the accelerated config's, else 50.
        guidance_scale: s of v_null + s (v - v_null); 0 runs the prompt alone. An accelerated config may vary it over time.
        time_shifting_factor: see `time_grid`.
        callback: called after each step with its number (from 1) and the latents, which it must not change.
        return_velocity: also return the guided velocities.

    Returns:
        Latents fp32 [B, channels, H, W], or (latents, velocities [steps - 1, B, channels, H, W]).

    Raises:
        TypeError, ValueError, IndexError: an argument is wrong; it is named, with what was expected and what came.
    """
    from ...runtime import find_runner

    validate.check_sample_inputs(
        model,
        noise,
        text_tokens,
        text_tokens_null,
        modality_positions,
        modality_positions_null,
        guidance_scale,
        time_shifting_factor,
    )
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 2):
        raise ValueError(f"steps: expected an integer >= 2 (grid points), got {steps!r}")
    runner = find_runner(model)
    if runner is not None:
        return runner.sample(
            noise,
            text_tokens,
            text_tokens_null,
            modality_positions,
            modality_positions_null,
            steps,
            guidance_scale,
            time_shifting_factor,
            callback,
            return_velocity,
        )
    return _sample_dense(
        model,
        noise,
        torch.cat([text_tokens, text_tokens_null]) if guidance_scale > 0 else text_tokens,  # type: ignore[list-item]
        torch.cat([modality_positions, modality_positions_null]) if guidance_scale > 0 else modality_positions,  # type: ignore[list-item]
        time_grid(steps or DEFAULT_STEPS, time_shifting_factor),
        guidance_scale,
        callback,
        return_velocity,
    )


def _sample_dense(
    model: Any,
    noise: Tensor,
    tokens: Tensor,
    positions: Tensor,
    times: Tensor,
    guidance_scale: float,
    callback: Callable[[int, Tensor], None] | None,
    return_velocity: bool,
) -> Any:
    """Upstream's loop: every evaluation runs the whole sequence of both guidance halves."""
    images = noise.shape[0]
    latents = noise.float()
    if guidance_scale > 0:
        latents = torch.cat([latents, latents])
    dtype = model.showo.model.embed_tokens.weight.dtype
    allowed = validate.omni_allowed(positions, tokens.shape[1])[:, None]
    mask = torch.zeros(allowed.shape, dtype=dtype, device=noise.device)
    mask.masked_fill_(~allowed, torch.finfo(dtype).min)
    times = times.to(noise.device)
    velocities = []
    for i in range(len(times) - 1):
        velocity = model.t2i_generate(
            image_latents=latents,
            t=times[i].expand(latents.shape[0]),
            text_tokens=tokens,
            attention_mask=mask,
            modality_positions=positions,
            max_seq_len=tokens.shape[1],
            guidance_scale=guidance_scale,
        ).float()
        latents = latents + (times[i + 1] - times[i]) * velocity
        if return_velocity:
            velocities.append(velocity[:images])
        if callback is not None:
            callback(i + 1, latents[:images])
    return (latents[:images], torch.stack(velocities)) if return_velocity else latents[:images]
