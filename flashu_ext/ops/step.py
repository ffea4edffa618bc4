"""The denoising step: guided Euler update, relative change of features, and extrapolation of cached features.

Storage is fp32, bf16 or fp16; arithmetic is fp32, rounded once when stored. feature_delta sums in fp64 on the CPU; on CUDA
devices in fp32 within a block and in fp64 over blocks.

Errors: ValueError for shapes, strides, aliasing and devices, TypeError for dtypes, IndexError for the step.
Source: Show-o2's Euler sampler and unpatchify; the cached head of FlashU (arXiv 2603.15271), extrapolated as in
TaylorSeer (arXiv 2503.06923).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import call, call_into, capability, fake, fake_out, fits_int64, torch_ops


@capability()
def guided_euler_step_(
    latents: Tensor, v: Tensor, s: Tensor, dt: Tensor, step: Tensor | int, *, velocity: Tensor | None = None
) -> Tensor:
    """latents += dt[step] * velocity, in place, from the rows that the head outputs.

    If v has twice as many rows as latents, its second half is unconditional and velocity = vu + s[step] * (vc - vu); otherwise
    velocity = v.

    Args:
        latents: [images, channels, H, W], contiguous.
        v: [images or 2 * images, patches, patch * patch * channels], contiguous; read as [H * W, channels] per image.
        s, dt: fp32 [steps], the guidance scale and the time step of every step.
        step: int64 tensor of one element (may be on the device), or a plain number; from 0.
        velocity: as latents, receives the guided velocity.

    Returns:
        latents.
    """
    if not isinstance(step, Tensor) and hasattr(step, "__index__"):
        if not fits_int64(step):
            raise IndexError(f"step: expected an integer of 64 bits, got one of {step.bit_length()}")
        step = torch.tensor(step, dtype=torch.int64, device=getattr(latents, "device", "cpu"))
    call(torch_ops.guided_euler_step_.default, latents, v, s, dt, step, velocity)
    return latents


@capability()
def feature_delta(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """How far a is from b: (sum|a - b| / sum|b|, |a - b|_2 / |b|_2, cosine(a, b)); 0 / 0 counts as 0.

    Args:
        a, b: same shape and dtype, at least one dimension.
        out: fp32 [3].

    Returns:
        fp32 [3].
    """
    return call_into(torch_ops.feature_delta, a, b, out=out)


@capability()
def taylor_update_(state: Tensor, feature: Tensor, interval: float, count: int) -> Tensor:
    """Add a new feature to a table of finite differences, in place.

    state[0] = feature; state[i] = (new state[i - 1] - old state[i - 1]) / interval for i <= min(order, count), else 0.

    Args:
        state: [order + 1, ...], contiguous, order 0 to 8.
        feature: [...], contiguous.
        interval: steps since the previous update, > 0.
        count: updates before this one.

    Returns:
        state.
    """
    call(torch_ops.taylor_update_.default, state, feature, interval, count)
    return state


@capability()
def taylor_predict(state: Tensor, ahead: float, count: int, *, out: Tensor | None = None) -> Tensor:
    """The feature `ahead` steps after the latest update: sum of state[i] * ahead^i / i! for i <= min(order, count - 1).

    Args:
        state: [order + 1, ...] as written by `taylor_update_`.
        count: updates so far, at least 1.
        out: [...], contiguous.

    Returns:
        [...] in state's dtype.
    """
    return call_into(torch_ops.taylor_predict, state, ahead, count, out=out)


@fake("guided_euler_step_")
def _guided_euler_step_fake(
    latents: Tensor, v: Tensor, s: Tensor, dt: Tensor, step: Tensor, velocity: Tensor | None = None
) -> None:
    return None


@fake("feature_delta")
def _feature_delta_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((3,), dtype=torch.float32)


@fake("taylor_update_")
def _taylor_update_fake(state: Tensor, feature: Tensor, interval: float, count: int) -> None:
    return None


@fake("taylor_predict")
def _taylor_predict_fake(state: Tensor, ahead: float, count: int) -> Tensor:
    return state.new_empty(state.shape[1:])


fake_out("feature_delta", _feature_delta_fake)
fake_out("taylor_predict", _taylor_predict_fake)
