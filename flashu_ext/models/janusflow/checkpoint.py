"""Checkpoint directories: upstream's (config.json of transformers' kind, .safetensors, sharded or not) and ours.

Of upstream's config.json the language model's heads, epsilon and rotary base are read; all other sizes come from the weights,
or are fixed in upstream's code.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ...planning.groups import is_int
from ...planning.reading import shown
from .. import checkpoint
from ..llm import rope_theta
from ..weights import Sizes
from .config import PATCH, JanusFlowConfig

M = TypeVar("M", bound=nn.Module)

__all__ = ["LAYOUT", "load", "read_config", "save"]

_UPSTREAM_TYPE = "multi_modality"

_GRID = 24
"""Image tokens a side; fixed in upstream's code, and in no weight's shape."""

_SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16}
"""Heads of the published SigLIP towers by width: the only size that the weights do not determine."""

# What transformers' LlamaConfig says where a file says nothing.
_LLAMA_HEADS = 32
_LLAMA_PLAIN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None}
"""Fields that a checkpoint may only have as they are by default: the program here computes nothing else."""


def load(
    directory: str | os.PathLike[str], build: Callable[[JanusFlowConfig], M], dtype: torch.dtype | None = None
) -> M:
    """Load a model from a folder with config.json and weights, as `models.checkpoint.load`; `JanusFlow.from_pretrained` calls
    this."""
    return checkpoint.load(LAYOUT, directory, build, dtype)


def save(model: Any, directory: str | os.PathLike[str]) -> None:
    """Write `model.safetensors` and `config.json` (format flashu_ext.janusflow), as `models.checkpoint.save`."""
    checkpoint.save(LAYOUT, model, directory)


def read_config(directory: str | os.PathLike[str]) -> JanusFlowConfig:
    """The configuration of the model in a checkpoint folder; only headers of the weights are read."""
    return checkpoint.read_config(LAYOUT, directory)


# ---- upstream's config.json


def _upstream_format(directory: Path, fields: Mapping[str, Any], sizes: Sizes) -> JanusFlowConfig:
    if fields.get("model_type") != _UPSTREAM_TYPE:
        raise ValueError(
            f"expected model_type {_UPSTREAM_TYPE!r} or our own format, got {shown(fields.get('model_type'))}"
        )
    language = fields.get("language_config")
    if not isinstance(language, dict):
        raise ValueError(f"language_config: expected an object, got {shown(language)}")
    return JanusFlowConfig(**_llm_fields(language, sizes), **_vision_fields(sizes), **_drawing_fields(sizes))


def _llm_fields(language: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    for name, plain in {"model_type": "llama", **_LLAMA_PLAIN}.items():
        if language.get(name, plain) != plain:
            raise ValueError(f"language_config[{name!r}]: expected {plain!r}, got {shown(language[name])}")
    table, layer = "language_model.model.embed_tokens.weight", "language_model.model.layers.0"
    hidden, heads = sizes(table, 1), language.get("num_attention_heads", _LLAMA_HEADS)
    if not is_int(heads) or heads < 1 or hidden % heads:
        raise ValueError(
            f"language_config['num_attention_heads']: expected a divisor of the width {hidden}, got {shown(heads)}"
        )
    found = {
        "hidden_size": hidden,
        "intermediate_size": sizes(f"{layer}.mlp.gate_proj.weight", 0),
        "num_hidden_layers": sizes.count(_LLM_LAYERS),
        "num_key_value_heads": sizes(f"{layer}.self_attn.k_proj.weight", 0) * heads // hidden,
        "vocab_size": sizes(table, 0),
        "head_dim": hidden // heads,
    }
    for name, value in found.items():
        if language.get(name) not in (None, value):
            raise ValueError(
                f"language_config[{name!r}]: expected {value}, as the weights have, got {shown(language[name])}"
            )
    return {
        "hidden": hidden,
        "inter": found["intermediate_size"],
        "layers": found["num_hidden_layers"],
        "heads": heads,
        "kv": max(1, found["num_key_value_heads"]),
        "vocab": found["vocab_size"],
        "rope_theta": rope_theta(language),
        "eps": language.get("rms_norm_eps", JanusFlowConfig.eps),
        "tie_word_embeddings": language.get("tie_word_embeddings", False),
    }


def _vision_fields(sizes: Sizes) -> dict[str, Any]:
    tower = "vision_und_enc_model.vision_tower"
    width, patches = sizes(f"{tower}.pos_embed", 2), sizes(f"{tower}.pos_embed", 1)
    if width not in _SIGLIP_HEADS:
        known = ", ".join(map(str, _SIGLIP_HEADS))
        raise ValueError(f"{tower}.pos_embed: expected the width of a published SigLIP tower ({known}), got {width}")
    if math.isqrt(patches) ** 2 != patches:
        raise ValueError(f"{tower}.pos_embed: expected a square number of patches, got {patches}")
    patch = sizes(f"{tower}.patch_embed.proj.weight", 2)
    return {
        "vit": width,
        "vit_layers": sizes.count(_VISION_LAYERS),
        "vit_heads": _SIGLIP_HEADS[width],
        "vit_ratio": max(1, sizes(f"{tower}.blocks.0.mlp.fc1.weight", 0) // width),
        "vit_patch": patch,
        "image_size": math.isqrt(patches) * patch,
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


LAYOUT = checkpoint.Layout(
    name="JanusFlow",
    language_model="language_model",
    own=JanusFlowConfig.from_fields,
    upstream=_upstream_format,
    layers=_layers,
    shallow=_shallow,
)
