"""SDXL's and FLUX's kind of VAE as an image codec."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.pipelines import small_kl_vae

import flashu_ext as fx
from flashu_ext.models.codec import KlCodec


def test_a_kl_codec_scales_and_shifts() -> None:
    vae = small_kl_vae(16, scaling_factor=0.3611, shift_factor=0.1159)
    codec = KlCodec(vae)
    images = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        expected = fx.bagel.encoded(posterior.mean, posterior.std, torch.Generator().manual_seed(2))
        torch.testing.assert_close(codec.encode(images, torch.Generator().manual_seed(2)), expected)
        torch.testing.assert_close(codec.encode(images), 0.3611 * (posterior.mean - 0.1159))
        decoded = vae.decode(expected / 0.3611 + 0.1159).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.decode(expected), decoded)
    with pytest.raises(ValueError, match=r"latents: expected \[B, 16, h, w\]"):
        codec.decode(expected[:, :4])
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, H, W\]"):
        codec.encode(images[:, :2])


def test_a_vae_is_where_its_model_is(tmp_path: Path) -> None:
    small_kl_vae(4).save_pretrained(tmp_path)
    codec = KlCodec.from_pretrained(tmp_path, "SDXL's", "meta")
    assert {each.device.type for each in codec.vae.parameters()} == {"meta"}
