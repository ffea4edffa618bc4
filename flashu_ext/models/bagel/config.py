"""A model's sizes, those of the released one by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...planning.groups import Check
from ..fields import COUNT, EVEN, LAYERS, NUMBER, SIZE, SWITCH, JsonConfig, check_divides, check_fields

__all__ = ["BagelConfig"]

_CHECKS: Mapping[str, Check] = {
    **dict.fromkeys(
        ("inter", "heads", "kv", "vocab", "vit", "vit_inter", "vit_heads", "vit_side", "latent_side"), SIZE
    ),
    **dict.fromkeys(("vit_patch", "latent_channels", "latent_patch", "vae_downsample"), SIZE),
    "hidden": EVEN,
    **dict.fromkeys(("layers", "vit_layers"), LAYERS),
    "vit_layers_kept": COUNT,
    **dict.fromkeys(("rope_theta", "eps", "vit_eps"), NUMBER),
    **dict.fromkeys(("qk_norm", "tie_word_embeddings"), SWITCH),
}


@dataclass(frozen=True)
class BagelConfig(JsonConfig):
    """Sizes of BAGEL-7B-MoT.

    Attributes:
        hidden, inter, layers, heads, kv, vocab, rope_theta, eps, qk_norm, tie_word_embeddings: of the language model, a Qwen2
            with two experts in every layer.
        vit, vit_inter, vit_layers, vit_heads, vit_patch, vit_eps: of the image encoder, a SigLIP, of whose layers the first
            `vit_layers_kept` are there.
        vit_side, latent_side: of the two position tables.
        latent_channels, latent_patch, vae_downsample: of the latents: a token is latent_patch x latent_patch of them, each
            vae_downsample pixels a side.
    """

    FORMAT: ClassVar = "flashu_ext.bagel"

    hidden: int = 3584
    inter: int = 18944
    layers: int = 28
    heads: int = 28
    kv: int = 4
    vocab: int = 152064
    vit: int = 1152
    vit_inter: int = 4304
    vit_layers: int = 27
    vit_heads: int = 16
    vit_side: int = 70
    latent_side: int = 64
    rope_theta: float = 1000000.0
    eps: float = 1e-6
    vit_layers_kept: int = 26
    vit_patch: int = 14
    vit_eps: float = 1e-6
    latent_channels: int = 16
    latent_patch: int = 2
    vae_downsample: int = 8
    qk_norm: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a size that no model can have."""
        check_fields(self, _CHECKS)
        check_divides("heads", self.hidden, self.heads)
        check_divides("kv", self.heads, self.kv)
        check_divides("vit_heads", self.vit, self.vit_heads)
        if not 0 < self.vit_layers_kept <= self.vit_layers:
            raise ValueError(f"vit_layers_kept: expected 1 to {self.vit_layers}, got {self.vit_layers_kept}")
        if not self.qk_norm:
            raise ValueError("qk_norm: expected True, as in every released model, got False")

    @property
    def patch_width(self) -> int:
        """Numbers of a latent token."""
        return self.latent_patch**2 * self.latent_channels

    @property
    def token_pixels(self) -> int:
        """Pixels of a latent token's side."""
        return self.latent_patch * self.vae_downsample
