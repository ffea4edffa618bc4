"""A model's sizes, those of the released one by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...planning.groups import Check
from ..fields import COUNT, EVEN, LAYERS, NUMBER, SIZE, SWITCH, JsonConfig, check_divides, check_fields, check_heads

__all__ = ["BagelConfig", "config_of"]

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
        if self.hidden % 4:
            raise ValueError(f"hidden: expected a multiple of 4, for the waves of two axes, got {self.hidden}")
        check_heads(self.hidden, self.heads)
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


def config_of(model: Any) -> BagelConfig:
    """The sizes of a model of ours, or of an upstream instance, which has them in several places.

    Raises:
        ValueError: no model can have them.
    """
    own = model.config
    if isinstance(own, BagelConfig):
        return own
    llm, layers = own.llm_config, model.language_model.model.layers
    embed, encoder = model.language_model.model.embed_tokens, model.vit_model.vision_model
    return BagelConfig(
        hidden=int(embed.weight.shape[1]),
        inter=int(llm.intermediate_size),
        layers=len(layers),
        heads=int(llm.num_attention_heads),
        kv=int(llm.num_key_value_heads),
        vocab=int(embed.weight.shape[0]),
        vit=int(encoder.config.hidden_size),
        vit_inter=int(encoder.config.intermediate_size),
        vit_layers=len(encoder.encoder.layers),
        vit_layers_kept=len(encoder.encoder.layers),
        vit_heads=int(encoder.config.num_attention_heads),
        vit_patch=int(encoder.config.patch_size),
        vit_side=int(model.vit_max_num_patch_per_side),
        vit_eps=float(encoder.config.layer_norm_eps),
        rope_theta=float(llm.rope_theta),
        eps=float(llm.rms_norm_eps),
        latent_side=int(model.max_latent_size),
        latent_channels=int(model.latent_channel),
        latent_patch=int(model.latent_patch_size),
        vae_downsample=int(model.latent_downsample // model.latent_patch_size),
        qk_norm=bool(llm.qk_norm),
        tie_word_embeddings=bool(llm.tie_word_embeddings),
    )
