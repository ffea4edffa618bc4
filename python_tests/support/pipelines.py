"""Stand-ins for what a pipeline has around its model: a tokenizer of bytes, an image codec, small random VAEs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Blocks", "byte_tokenizer", "small_kl_vae", "small_wan_vae", "write_byte_tokenizer"]


def byte_tokenizer(special: Sequence[str]) -> Any:
    """A tokenizer of `tokenizers`: the special tokens, then one token for each byte, so byte b of a text has the id
    len(special) + b."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    characters = {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    vocabulary = {name: index for index, name in enumerate(special)}
    vocabulary |= {character: len(special) + byte for byte, character in characters.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def write_byte_tokenizer(folder: Path, special: Sequence[str], **config: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer(special).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))


class Blocks:
    """An image codec of 8 x 8 pixels per latent: means of blocks, repeated over the channels. It records what it decodes."""

    def __init__(self, channels: int):
        self.channels = channels
        self.decoded: list[Tensor] = []

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        means = F.avg_pool2d(images, 8)
        latents = means[:, torch.arange(self.channels) % 3]
        if generator is None:
            return latents
        return latents + 0.1 * torch.randn(latents.shape, generator=generator)

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(latents.clone())
        return F.interpolate(latents[:, :3].tanh(), scale_factor=8)


def small_kl_vae(channels: int, **config: float) -> Any:
    """A random AutoencoderKL of diffusers, 8 x 8 pixels per latent."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=channels,
        **config,
    ).eval()


def small_wan_vae() -> Any:
    """A random AutoencoderKLWan of diffusers, 8 x 8 pixels per latent of 16 channels."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
