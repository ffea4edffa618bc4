"""Measures of fidelity compared with their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flashu_ext.studies import fidelity

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)


def test_psnr_is_its_definition():
    others = IMAGES.copy()
    others[0, 0, 0, 0] ^= 8
    values = fidelity.psnr(IMAGES, others)
    assert values[0] == pytest.approx(10 * math.log10(255**2 / (64 / IMAGES[0].size))) and values[1:] == [math.inf] * 2
    assert fidelity.mean(values) == pytest.approx((values[0] + 200) / 3)


def test_ssim_falls_with_noise():
    def noisy(scale: float) -> np.ndarray:
        return np.clip(IMAGES + RNG.normal(0, scale, IMAGES.shape), 0, 255).astype(np.uint8)

    assert fidelity.ssim(IMAGES, IMAGES) == pytest.approx([1.0] * 3)
    little, much = np.mean(fidelity.ssim(IMAGES, noisy(10))), np.mean(fidelity.ssim(IMAGES, noisy(80)))
    assert 1 > little > much


def test_lpips_is_none_or_zero_for_equal_images():
    values = fidelity.lpips(np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, 64, 64, 3), np.uint8))
    assert values is None or values == pytest.approx([0.0], abs=1e-6)


@pytest.mark.parametrize("wrong", [IMAGES[:2], IMAGES[..., :2], IMAGES.astype(np.float32)])
def test_wrong_images_are_refused(wrong: np.ndarray):
    for measure in (fidelity.psnr, fidelity.ssim):
        with pytest.raises(ValueError, match="images, others: expected uint8"):
            measure(IMAGES, wrong)
