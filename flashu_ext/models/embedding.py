"""From latents and times to the embeddings of an image span."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .parts import Showo2Parts, position_table

__all__ = ["early_signal", "embed_image", "embed_time", "semantic_features", "sinusoids", "with_time_token"]

MAX_PERIOD = 10000


def semantic_features(parts: Showo2Parts, latents: Tensor, positions: Tensor) -> Tensor:
    """The SigLIP path: latents [images, channels, H, W] -> [images, patches, clip].

    Args:
        positions: SigLIP position embeddings [1, patches, clip] (`parts.position_table`).
    """
    return parts.vision(parts.patch_und(latents.to(parts.dtype)) + positions)["last_hidden_state"]


def embed_image(parts: Showo2Parts, latents: Tensor, semantic: Tensor | None = None) -> Tensor:
    """Dual-path image embedding: latents [images, channels, H, W] -> [images, patches, hidden].

    Args:
        semantic: `semantic_features` of these latents or of earlier ones; None computes them.
    """
    if semantic is None:
        height, width = (size // parts.patch_size for size in latents.shape[2:])
        semantic = semantic_features(parts, latents, position_table(parts, height, width))
    return parts.fusion(torch.cat([semantic, parts.patch_gen(latents.to(parts.dtype))], dim=-1))


def with_time_token(parts: Showo2Parts, image: Tensor, token: Tensor) -> Tensor:
    """The image span of a sequence: image [rows, patches, hidden], after token [rows, hidden] in models with a time token."""
    return torch.cat([token[:, None], image], dim=1) if parts.has_time_token else image


def embed_time(parts: Showo2Parts, t: Tensor) -> tuple[Tensor, Tensor]:
    """t [rows] -> the head's time embedding [rows, head width] and the time token [rows, hidden]."""
    time = parts.time_embed(t, parts.dtype)
    return time, time if parts.time_proj is None else parts.time_proj(time)


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Times [rows] -> fp32 [rows, width]: cosines and sines of t by frequencies from 1 down to 1 / MAX_PERIOD.

    Source: upstream `TimestepEmbedder.timestep_embedding`.
    """
    half = width // 2
    frequency = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequency
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def early_signal(parts: Showo2Parts, latents: Tensor, time_token: Tensor) -> Tensor:
    """Low-level patch embeddings plus the time token, [images, patches, hidden], contiguous: one convolution, whose change
    between steps estimates the change of the network's output.

    Source: the idea of TeaCache (arXiv 2411.19108), which watches a time-modulated input; here it is taken before encoder
    and language model, because a cached step skips both.
    """
    return (parts.patch_gen(latents.to(parts.dtype)) + time_token[:, None]).contiguous()
