"""The one tolerance of the project: a kernel's error may be about as large as torch's in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

ENOUGH_FOR_RMS = 512
"""Elements from which on two rms errors can be compared: of a few dozen numbers they differ by chance."""


def assert_accurate(ours: Tensor, truth: Tensor, torchs: Tensor) -> None:
    """Compares a result with the truth, relative to torch's own error.

    max|y - r| <= 2 max|t - r| + 2 max|(r + 0.3) - 0.3 - r| and rms(y - r) <= 1.1 rms(t - r), the middle term being one
    rounding in the dtype: it allows a rounding where torch's result happens to be exact.

    Args:
        ours: y, the kernel's result. truth: r, fp64. torchs: t, torch's result in ours' dtype.
    """
    assert truth.dtype == torch.float64, f"the truth is computed in float64, not {truth.dtype}"
    assert ours.shape == truth.shape == torchs.shape, f"shapes {ours.shape}, {truth.shape}, {torchs.shape}"
    if ours.numel() == 0:
        return
    finite = truth.isfinite()
    assert torch.equal(ours.isfinite(), torchs.isfinite()), "finite in other places than torch"
    finite &= ours.isfinite()
    if not finite.any():
        return
    y, r, t = ours.double()[finite], truth[finite], torchs.double()[finite]
    stored = truth.to(ours.dtype)[finite]
    rounding = ((stored + 0.3) - 0.3).double() - stored.double()
    worst, allowed = (y - r).abs().max(), 2 * (t - r).abs().max() + 2 * rounding.abs().max()
    assert worst <= allowed, f"largest error {worst:.3g}, allowed {allowed:.3g}"
    if y.numel() < ENOUGH_FOR_RMS:
        return
    rms, torch_rms = (y - r).square().mean().sqrt(), (t - r).square().mean().sqrt()
    assert rms <= 1.1 * torch_rms + 2**-40 * r.square().mean().sqrt(), f"rms error {rms:.4g}, torch's {torch_rms:.4g}"
