"""How far images and answers are from dense ones: PSNR, SSIM, LPIPS where installed, equal answers."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence

import numpy as np

from ..planning.extras import extra

__all__ = ["lpips", "mean", "psnr", "ssim"]


def _checked(images: np.ndarray, others: np.ndarray) -> None:
    if images.shape != others.shape or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images, others: expected uint8 [n, H, W, 3] twice, got {images.shape} and {others.shape}")
    if images.dtype != np.uint8 or others.dtype != np.uint8:
        raise ValueError(f"images, others: expected uint8, got {images.dtype} and {others.dtype}")


def psnr(images: np.ndarray, others: np.ndarray) -> list[float]:
    """Peak signal-to-noise ratio in dB of each pair of images, uint8 [n, H, W, 3]; infinite where they are equal."""
    _checked(images, others)
    errors = ((images.astype(np.float64) - others.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return [float(value) for value in 10 * np.log10(255.0**2 / errors)]


def ssim(images: np.ndarray, others: np.ndarray) -> list[float]:
    """Structural similarity of each pair of images, uint8 [n, H, W, 3], by scikit-image with Gaussian weights.

    Raises:
        ImportError: scikit-image is missing; the message says how to install it.
    """
    _checked(images, others)
    with extra("report"):
        from skimage.metrics import structural_similarity
    return [
        float(
            structural_similarity(a, b, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        )
        for a, b in zip(images, others, strict=True)
    ]


@functools.cache
def _lpips_network() -> Callable[..., object] | None:
    if importlib.util.find_spec("lpips") is None:
        return None
    import lpips as package

    try:
        network: Callable[..., object] = package.LPIPS(net="alex", verbose=False)
    except (OSError, RuntimeError):  # its weights come from the network, which may be out of reach
        return None
    return network


def lpips(images: np.ndarray, others: np.ndarray) -> list[float] | None:
    """Learned perceptual distance (AlexNet) of each pair, or None where the lpips package or its weights are missing."""
    _checked(images, others)
    network = _lpips_network()
    if network is None:
        return None
    import torch

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1

    with torch.no_grad():
        distances = network(tensor(images), tensor(others))
    assert isinstance(distances, torch.Tensor)
    return [float(value) for value in distances.flatten()]


def mean(values: Sequence[float], cap: float = 100.0) -> float:
    """Mean with infinities (equal images) counted as `cap`; NaN of nothing."""
    return float(np.minimum(np.asarray(values, dtype=np.float64), cap).mean()) if len(values) else float("nan")
