"""Room: runtime. From latents and times to the embeddings of an image span."""

from __future__ import annotations

import torch
from torch import Tensor

from ..structure import Showo2Parts

__all__ = ["embed_image", "embed_time"]


def embed_image(parts: Showo2Parts, latents: Tensor, positions: Tensor) -> Tensor:
    """Dual-path image embedding: latents [images, channels, H, W] -> [images, patches, hidden].

    Args:
        positions: SigLIP position embeddings [1, patches, clip] (`structure.position_table`).
    """
    latents = latents.to(parts.dtype)
    semantic = parts.vision(parts.patch_und(latents) + positions)["last_hidden_state"]
    return parts.fusion(torch.cat([semantic, parts.patch_gen(latents)], dim=-1))


def embed_time(parts: Showo2Parts, t: Tensor) -> tuple[Tensor, Tensor]:
    """t [rows] -> the head's time embedding [rows, head width] and the time token [rows, hidden]."""
    time = parts.time_embed(t, parts.dtype)
    return time, time if parts.time_proj is None else parts.time_proj(time)
