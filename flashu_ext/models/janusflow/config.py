"""A model's sizes, those of the released one by default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...planning.groups import Check
from ..fields import EVEN, LAYERS, NUMBER, SIZE, SWITCH, JsonConfig, check_divides, check_fields, check_heads

__all__ = ["JanusFlowConfig", "config_of"]

PATCH = 2
"""Latents a side of an image token."""

_CHECKS: Mapping[str, Check] = {
    **dict.fromkeys(("hidden", "inter", "heads", "kv", "vocab", "grid", "vit", "vit_heads", "vit_ratio"), SIZE),
    **dict.fromkeys(("vit_patch", "latent_channels", "image_size"), SIZE),
    **dict.fromkeys(("channels", "latent_size"), EVEN),
    **dict.fromkeys(("layers", "blocks", "vit_layers"), LAYERS),
    **dict.fromkeys(("rope_theta", "eps", "grn_eps", "uvit_norm_eps", "vit_norm_eps"), NUMBER),
    "tie_word_embeddings": SWITCH,
}


@dataclass(frozen=True)
class JanusFlowConfig(JsonConfig):
    """Sizes of JanusFlow-1.3B.

    Attributes:
        hidden, inter, layers, heads, kv, vocab, rope_theta, eps, tie_word_embeddings: of the language model, a Llama.
        channels, blocks: of the latent encoder; the decoder's blocks are twice as wide.
        grid: image tokens a side; latents are `latent_size` = 2 * grid a side.
        grn_eps, uvit_norm_eps: of the latent blocks' response norm and RMS norms.
        vit, vit_layers, vit_heads, vit_ratio, vit_patch, image_size, vit_norm_eps: of the image encoder, a SigLIP.
    """

    FORMAT: ClassVar = "flashu_ext.janusflow"

    hidden: int = 2048
    inter: int = 5632
    layers: int = 24
    heads: int = 16
    kv: int = 16
    vocab: int = 102400
    channels: int = 768
    blocks: int = 2
    grid: int = 24
    vit: int = 1024
    vit_layers: int = 24
    vit_heads: int = 16
    vit_ratio: int = 4
    vit_patch: int = 16
    rope_theta: float = 10000.0
    eps: float = 1e-6
    latent_channels: int = 4
    latent_size: int = 48
    image_size: int = 384
    grn_eps: float = 1e-6
    uvit_norm_eps: float = 1e-6
    vit_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a size that no model can have."""
        check_fields(self, _CHECKS)
        check_heads(self.hidden, self.heads)
        check_divides("kv", self.heads, self.kv)
        check_divides("vit_heads", self.vit, self.vit_heads)
        check_divides("vit_patch", self.image_size, self.vit_patch)
        if self.latent_size != PATCH * self.grid:
            raise ValueError(f"latent_size: expected twice the grid, {PATCH * self.grid}, got {self.latent_size}")

    @property
    def vit_tokens(self) -> int:
        """Of an image that is asked about."""
        return (self.image_size // self.vit_patch) ** 2


def config_of(model: Any, latent_size: int | None = None) -> JanusFlowConfig:
    """The sizes of a model of ours, or of an upstream instance, whose weights have them.

    Args:
        latent_size: of what an upstream instance draws: it is in no weight. None: the released model's, 48.

    Raises:
        ValueError: no model can have them.
    """
    if isinstance(model.config, JanusFlowConfig):
        return model.config
    llm, encoder, tower = model.language_model, model.vision_gen_enc_model, model.vision_und_enc_model.vision_tower
    patch = int(tower.patch_embed.proj.kernel_size[0])
    width, size = int(tower.pos_embed.shape[2]), JanusFlowConfig.latent_size if latent_size is None else latent_size
    return JanusFlowConfig(
        hidden=int(llm.config.hidden_size),
        inter=int(llm.config.intermediate_size),
        layers=len(llm.model.layers),
        heads=int(llm.config.num_attention_heads),
        kv=int(llm.config.num_key_value_heads),
        vocab=int(llm.model.embed_tokens.weight.shape[0]),
        rope_theta=float(llm.config.rope_theta),
        eps=float(llm.config.rms_norm_eps),
        tie_word_embeddings=bool(llm.config.tie_word_embeddings),
        channels=int(encoder.in_conv.out_channels),
        blocks=len(encoder.mid_block.res_blocks),
        latent_channels=int(encoder.in_conv.in_channels),
        grid=size // PATCH,
        latent_size=size,
        vit=width,
        vit_layers=len(tower.blocks),
        vit_heads=int(tower.blocks[0].attn.num_heads),
        vit_ratio=int(tower.blocks[0].mlp.fc1.out_features // width),
        vit_patch=patch,
        image_size=patch * math.isqrt(int(tower.pos_embed.shape[1])),
        uvit_norm_eps=float(model.vision_gen_dec_model.input_norm.variance_epsilon),
        vit_norm_eps=float(tower.norm.eps),
    )
