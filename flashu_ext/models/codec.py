"""Images to latents and back, by a VAE of diffusers (optional: pip install 'flashu_ext[vae]')."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..planning.extras import extra
from ..planning.groups import is_real
from ..planning.reading import shown
from ..planning.safe_files import read_header
from .autocast import without_autocast

__all__ = ["Codec", "KlCodec", "load_vae"]


class Codec(Protocol):
    """The image codec that JanusFlow's and BAGEL's pipelines need; images are [B, 3, H, W] in [-1, 1]."""

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents fp32 [B, channels, h, w], normalised for the model; with a generator, which may be on another device, sampled
        where the codec has a distribution of them."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images fp32 [B, 3, H, W], clamped to [-1, 1]."""
        ...


class KlCodec:
    """An AutoencoderKL of diffusers, as SDXL and FLUX have: latents are scale * (VAE's latents - shift)."""

    def __init__(self, vae: Any):
        """Raises ValueError where the VAE's config names no scale."""
        self.vae = vae.eval()
        config = vae.config
        scale: Any = getattr(config, "scaling_factor", None)
        shift: Any = getattr(config, "shift_factor", None)
        if not is_real(scale) or scale <= 0:
            raise ValueError(f"vae.config.scaling_factor: expected a finite number > 0, got {shown(scale)}")
        if shift is not None and not is_real(shift):
            raise ValueError(f"vae.config.shift_factor: expected None or a finite number, got {shown(shift)}")
        self.scale, self.shift = float(scale), float(shift or 0)
        self.channels = int(config.latent_channels)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], of: str, device: torch.device | str = "cpu") -> KlCodec:
        """Load a folder in diffusers' layout (config.json, diffusion_pytorch_model.safetensors); nothing is downloaded.

        Args:
            of: whose VAE, for messages.
            device: where it runs.

        Raises:
            ImportError: diffusers is not installed.
            FileNotFoundError: the folder has no VAE.
            ValueError: the VAE is malformed.
        """
        return cls(load_vae(directory, "AutoencoderKL", of, "KL", device))

    @property
    def _like(self) -> Tensor:
        return next(self.vae.parameters())

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents fp32 [B, channels, h, w].

        Args:
            generator: of the noise by which latents are sampled, drawn on its device in fp32; None: the most likely latents.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [B, 3, H, W], got {list(images.shape)}")
        with without_autocast(images.device):
            posterior = self.vae.encode(images.to(self._like)).latent_dist
        latents = posterior.mean.float()
        if generator is not None:
            noise = torch.randn(latents.shape, generator=generator, dtype=torch.float32, device=generator.device)
            latents = latents + posterior.std.float() * noise.to(latents.device)
        return self.scale * (latents - self.shift)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, channels, h, w] -> images fp32 [B, 3, H, W], clamped to [-1, 1]."""
        if latents.dim() != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"latents: expected [B, {self.channels}, h, w], got {list(latents.shape)}")
        latents = latents.float() / self.scale + self.shift
        with without_autocast(latents.device):
            images = self.vae.decode(latents.to(self._like)).sample
        return images.float().clamp(-1, 1)


def load_vae(directory: str | os.PathLike[str], kind: str, of: str, short: str, device: torch.device | str) -> Any:
    """A VAE of diffusers from a folder in its layout; see `KlCodec.from_pretrained`.

    Args:
        kind: a class of diffusers.
        of, short: whose VAE, for messages.
    """
    directory = Path(directory)
    weights = directory / "diffusion_pytorch_model.safetensors"
    for path in (directory / "config.json", weights):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected {of} VAE in diffusers' layout")
    with extra("vae"):
        import diffusers

        build: Any = getattr(diffusers, kind)
    read_header(weights)
    try:
        vae = build.from_pretrained(directory, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False)
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{directory}: not a {short} VAE: {error}") from error
    return vae.to(device)
