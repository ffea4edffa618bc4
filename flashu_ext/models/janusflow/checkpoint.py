"""Checkpoint directories: upstream's (config.json of transformers' kind, .safetensors, sharded or not) and ours.

Of upstream's config.json the language model's heads, epsilon and rotary base are read; all other sizes come from the weights,
or are fixed in upstream's code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...planning.groups import is_int
from ...planning.reading import shown
from ..checkpoint import Configs, Layout, expect_fields
from ..llm import rope_theta
from ..weights import Sizes
from .config import PATCH, JanusFlowConfig

__all__ = ["LAYOUT", "load", "read_config", "save"]

_UPSTREAM_TYPE = "multi_modality"

_GRID = 24
"""Image tokens a side; fixed in upstream's code, and in no weight's shape."""

_SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16}
"""Heads of the published SigLIP towers by width: the only size that the weights do not determine."""

# What transformers' LlamaConfig says where a file says nothing.
_LLAMA_HEADS = 32
_LLAMA = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
"""Fields that a checkpoint may only have as they are by default: the program here computes nothing else."""


# ---- upstream's config.json


def _upstream_format(directory: Path, configs: Configs, sizes: Sizes) -> JanusFlowConfig:
    fields = configs["config.json"]
    if fields.get("model_type") != _UPSTREAM_TYPE:
        raise ValueError(
            f"expected model_type {_UPSTREAM_TYPE!r} or our own format, got {shown(fields.get('model_type'))}"
        )
    language = fields.get("language_config")
    if not isinstance(language, dict):
        raise ValueError(f"language_config: expected an object, got {shown(language)}")
    return JanusFlowConfig(**_llm_fields(language, sizes), **_vision_fields(sizes), **_drawing_fields(sizes))


def _llm_fields(language: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    hidden = sizes("language_model.model.embed_tokens.weight", 1)
    heads = language.get("num_attention_heads", _LLAMA_HEADS)
    if not is_int(heads) or heads < 1 or hidden % heads:
        raise ValueError(
            f"language_config.num_attention_heads: expected a divisor of the width {hidden}, got {shown(heads)}"
        )
    found = sizes.decoder("language_model", _LLM_LAYERS, hidden // heads)
    expect_fields("language_config.", language, found, _LLAMA)
    return {
        "hidden": hidden,
        "inter": found["intermediate_size"],
        "layers": found["num_hidden_layers"],
        "heads": heads,
        "kv": found["num_key_value_heads"],
        "vocab": found["vocab_size"],
        "rope_theta": rope_theta(language),
        "eps": language.get("rms_norm_eps", JanusFlowConfig.eps),
        "tie_word_embeddings": language.get("tie_word_embeddings", False),
    }


def _vision_fields(sizes: Sizes) -> dict[str, Any]:
    tower = "vision_und_enc_model.vision_tower"
    width = sizes(f"{tower}.pos_embed", 2)
    if width not in _SIGLIP_HEADS:
        known = ", ".join(map(str, _SIGLIP_HEADS))
        raise ValueError(f"{tower}.pos_embed: expected the width of a published SigLIP tower ({known}), got {width}")
    patch = sizes(f"{tower}.patch_embed.proj.weight", 2)
    return {
        "vit": width,
        "vit_layers": sizes.count(_VISION_LAYERS),
        "vit_heads": _SIGLIP_HEADS[width],
        "vit_ratio": max(1, sizes(f"{tower}.blocks.0.mlp.fc1.weight", 0) // width),
        "vit_patch": patch,
        "image_size": sizes.side(f"{tower}.pos_embed", 1) * patch,
    }


def _drawing_fields(sizes: Sizes) -> dict[str, Any]:
    conv = "vision_gen_enc_model.in_conv.weight"
    return {
        "channels": sizes(conv, 0),
        "latent_channels": sizes(conv, 1),
        "blocks": sizes.count(_ENCODER_BLOCKS),
        "grid": _GRID,
        "latent_size": PATCH * _GRID,
    }


_LLM_LAYERS = r"language_model\.model\.layers\.(\d+)\."
_VISION_LAYERS = r"vision_und_enc_model\.vision_tower\.blocks\.(\d+)\."
_ENCODER_BLOCKS = r"vision_gen_enc_model\.mid_block\.res_blocks\.(\d+)\."
_DECODER_BLOCKS = r"vision_gen_dec_model\.mid_block\.res_blocks\.(\d+)\."


def _layers(config: JanusFlowConfig) -> list[tuple[str, str, int]]:
    return [
        ("layers", _LLM_LAYERS, config.layers),
        ("vit_layers", _VISION_LAYERS, config.vit_layers),
        ("blocks", _ENCODER_BLOCKS, config.blocks),
        ("blocks", _DECODER_BLOCKS, config.blocks),
    ]


def _shallow(config: JanusFlowConfig) -> JanusFlowConfig:
    """One layer each, a tiny vocabulary and a small image: such a model has the same buffers as the full one."""
    language = dataclasses.replace(config, layers=1, inter=8, vocab=8)
    drawing = dataclasses.replace(language, blocks=1, channels=2)
    return dataclasses.replace(drawing, vit=1, vit_heads=1, vit_layers=1, vit_patch=1, image_size=1)


LAYOUT = Layout(
    name="JanusFlow",
    language_model="language_model",
    config=JanusFlowConfig,
    upstream=_upstream_format,
    layers=_layers,
    shallow=_shallow,
    named=lambda configs: configs["config.json"].get("model_type") == _UPSTREAM_TYPE,
)

load, save, read_config = LAYOUT.load, LAYOUT.save, LAYOUT.read_config
