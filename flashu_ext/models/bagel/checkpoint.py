"""Checkpoint directories: upstream's (llm_config.json, vit_config.json and ema.safetensors, sharded or not) and ours.

Sizes come from the weights. Of upstream's config files the rotary base, the epsilons and the image encoder's heads are read; all
other fields have to agree with the weights and with what is computed here. As in upstream's app.py, the image encoder's last
layer is left out, and what the files say of `qk_norm`, `layer_module`, `tie_word_embeddings` and the image encoder's `rope` does
not count. Upstream's VAE lies in the same folder; it is not read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...planning.groups import is_int
from ...planning.reading import shown
from ..checkpoint import Configs, Layout, expect_fields
from ..llm import rope_theta
from ..weights import Files, Sizes
from .config import BagelConfig

__all__ = ["LAYOUT", "load", "read_config", "save"]

_LLM, _VIT = "llm_config.json", "vit_config.json"

_QWEN2 = {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False}
_SIGLIP = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
"""Fields that a checkpoint may only have as they are by default: the program here computes nothing else."""

_SIGLIP_HEADS = 12
"""What transformers' SiglipVisionConfig says where a file says nothing."""

_PATCH = 2
"""Latents a side of a token; fixed in upstream's app.py, and in no weight's shape."""


# ---- upstream's config files


def _upstream_format(directory: Path, configs: Configs, sizes: Sizes) -> BagelConfig:
    return BagelConfig(
        **_llm_fields(configs[_LLM], sizes), **_vit_fields(configs[_VIT], sizes), **_drawing_fields(sizes)
    )


def _llm_fields(fields: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    norm = "language_model.model.layers.0.self_attn.q_norm.weight"
    found = sizes.decoder("language_model", _LLM_LAYERS, sizes(norm, 0))
    hidden, head_dim = found["hidden_size"], found["head_dim"]
    if hidden % head_dim:
        raise ValueError(f"{norm}: expected a divisor of the width {hidden}, got {head_dim}")
    expect_fields(f"{_LLM}: ", fields, found, _QWEN2)
    return {
        "hidden": hidden,
        "inter": found["intermediate_size"],
        "layers": found["num_hidden_layers"],
        "heads": found["num_attention_heads"],
        "kv": found["num_key_value_heads"],
        "vocab": found["vocab_size"],
        "rope_theta": rope_theta(fields),
        "eps": fields.get("rms_norm_eps", BagelConfig.eps),
    }


def _vit_fields(fields: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    tower = "vit_model.vision_model"
    pixels = f"{tower}.embeddings.patch_embedding.weight"
    width, numbers = sizes(pixels, 0), sizes(pixels, 1)
    patch = math.isqrt(numbers // 3)
    if 3 * patch**2 != numbers:
        raise ValueError(f"{pixels}: expected three numbers for each pixel of a square patch, got {numbers}")
    side = sizes.side(f"{tower}.embeddings.position_embedding.weight", 0)
    found = {
        "hidden_size": width,
        "intermediate_size": sizes(f"{tower}.encoder.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": sizes.count(_VIT_LAYERS) + 1,
        "patch_size": patch,
    }
    expect_fields(f"{_VIT}: ", fields, found, _SIGLIP)
    image = fields.get("image_size")
    if image is not None and not (is_int(image) and image // patch == side):
        raise ValueError(f"{_VIT}: image_size: expected {side} patches of {patch} pixels, got {shown(image)}")
    return {
        "vit": width,
        "vit_inter": found["intermediate_size"],
        "vit_layers": found["num_hidden_layers"],
        "vit_layers_kept": found["num_hidden_layers"] - 1,
        "vit_heads": fields.get("num_attention_heads", _SIGLIP_HEADS),
        "vit_side": side,
        "vit_patch": patch,
        "vit_eps": fields.get("layer_norm_eps", BagelConfig.vit_eps),
    }


def _drawing_fields(sizes: Sizes) -> dict[str, Any]:
    numbers = sizes("vae2llm.weight", 1)
    if numbers % _PATCH**2:
        raise ValueError(f"vae2llm.weight: expected numbers of {_PATCH} x {_PATCH} latents, got {numbers}")
    return {
        "latent_side": sizes.side("latent_pos_embed.pos_embed", 0),
        "latent_channels": numbers // _PATCH**2,
        "latent_patch": _PATCH,
    }


_LLM_LAYERS = r"language_model\.model\.layers\.(\d+)\."
_VIT_LAYERS = r"vit_model\.vision_model\.encoder\.layers\.(\d+)\."


def _layers(config: BagelConfig) -> list[tuple[str, str, int]]:
    return [("layers", _LLM_LAYERS, config.layers), ("vit_layers_kept", _VIT_LAYERS, config.vit_layers_kept)]


def _shallow(config: BagelConfig) -> BagelConfig:
    """One layer each, a tiny vocabulary and one place: such a model has the same buffers as the full one."""
    language = dataclasses.replace(config, layers=1, inter=1, vocab=1, latent_side=1)
    return dataclasses.replace(
        language, vit=1, vit_inter=1, vit_heads=1, vit_layers=1, vit_layers_kept=1, vit_side=1, vit_patch=1
    )


LAYOUT = Layout(
    name="BAGEL",
    language_model="language_model",
    config=BagelConfig,
    upstream=_upstream_format,
    layers=_layers,
    shallow=_shallow,
    configs=(_LLM, _VIT),
    files=Files(stems=("ema",)),
)

load, save, read_config = LAYOUT.load, LAYOUT.save, LAYOUT.read_config
