"""Images to latents and back, by diffusers' Wan 2.1 VAE (optional: pip install 'flashu_ext[vae]')."""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..codec import load_vae

__all__ = ["ImageCodec", "WanCodec"]

_SCALE = 8
"""Pixels of an image per latent of Wan 2.1's VAE, in each direction."""


class ImageCodec(Protocol):
    """The image codec that a pipeline needs; images are [B, 3, H, W] in [-1, 1]."""

    def encode(self, images: Tensor) -> Tensor:
        """Latents fp32 [B, channels, h, w], normalised for the model."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images fp32 [B, 3, H, W], clamped to [-1, 1]."""
        ...

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the latents of images of height x width pixels; a ValueError that names `size` where there are none."""
        ...


class WanCodec:
    """Wan 2.1's video VAE on single frames: 16 channels, 8 x 8 pixels per latent.

    Latents are normalised by the VAE's published mean and standard deviation. Encoding takes the posterior's mode, so an
    image always has the same latents (upstream's script samples it).
    """

    def __init__(self, vae: Any):
        self.vae = vae.eval()
        config = vae.config
        for name in ("latents_mean", "latents_std"):
            value = getattr(config, name, None)
            if value is None or len(value) != config.z_dim:
                raise ValueError(f"vae.config.{name}: expected {config.z_dim} numbers, got {value!r:.80}")
        self.mean = torch.tensor(config.latents_mean, dtype=torch.float32, device="cpu").view(1, -1, 1, 1)
        self.std = torch.tensor(config.latents_std, dtype=torch.float32, device="cpu").view(1, -1, 1, 1)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], device: torch.device | str = "cpu") -> WanCodec:
        """Load a folder in diffusers' layout (config.json, diffusion_pytorch_model.safetensors); nothing is downloaded.

        Args:
            device: where it runs.

        Raises:
            ImportError: diffusers is not installed.
            FileNotFoundError: the folder has no VAE.
            ValueError: the VAE is malformed.
        """
        return cls(load_vae(directory, "AutoencoderKLWan", "Wan 2.1's", "Wan", device))

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the latents of images of height x width pixels. Raises ValueError where these are no multiples of 8."""
        if height % _SCALE or width % _SCALE:
            raise ValueError(f"size: expected multiples of {_SCALE} pixels, got {height} x {width}")
        return height // _SCALE, width // _SCALE

    @property
    def _like(self) -> Tensor:
        return next(self.vae.parameters())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents fp32 [B, channels, H / 8, W / 8]."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [B, 3, H, W], got {list(images.shape)}")
        with without_autocast(images.device):
            posterior = self.vae.encode(images.to(self._like)[:, :, None]).latent_dist
        latents = posterior.mode()[:, :, 0].float()
        return (latents - self.mean.to(latents.device)) / self.std.to(latents.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, channels, h, w] -> images fp32 [B, 3, 8 h, 8 w], clamped to [-1, 1]."""
        if latents.dim() != 4 or latents.shape[1] != self.mean.shape[1]:
            raise ValueError(f"latents: expected [B, {self.mean.shape[1]}, h, w], got {list(latents.shape)}")
        latents = latents.float() * self.std.to(latents.device) + self.mean.to(latents.device)
        with without_autocast(latents.device):
            images = self.vae.decode(latents.to(self._like)[:, :, None]).sample
        return images[:, :, 0].float().clamp(-1, 1)
