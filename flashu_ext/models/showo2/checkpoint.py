"""Checkpoint directories: upstream's (config.json of diffusers' ConfigMixin, .bin or .safetensors, sharded or not)
and ours.

Values missing from upstream's config.json come from the weights (sizes of the diffusion head, layer counts), from the
config.json of language model and SigLIP where `llm_model_path` and `clip_pretrained_model_path` are folders, or from the
published names.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...planning.groups import is_int
from ...planning.reading import exists, shown
from ..checkpoint import Configs, Layout, expect_fields
from ..llm import rope_theta
from ..weights import Files, Sizes, read_object
from .config import Showo2Config

__all__ = ["LAYOUT", "load", "read_config", "save"]

_UPSTREAM_CLASS = "Showo2Qwen2_5"

# Arguments of upstream's constructor and of its YAML files that end up in config.json.
_UPSTREAM_FIELDS = {
    *(
        "llm_vocab_size",
        "llm_model_path",
        "load_from_showo",
        "image_latent_dim",
        "image_latent_height",
        "image_latent_width",
    ),
    *(
        "video_latent_height",
        "video_latent_width",
        "patch_size",
        "hidden_size",
        "clip_latent_dim",
        "num_diffusion_layers",
    ),
    *("add_time_embeds", "add_qk_norm", "clip_pretrained_model_path", "model_name", "pretrained_model_path"),
    *("num_und_trans_layers", "num_refiner_layers", "gradient_checkpointing", "frozen_params", "params_not_load"),
}

_QWEN2_5 = {"0.5B": (14, 64), "1.5B": (12, 128), "3B": (16, 128), "7B": (28, 128)}
"""Attention heads and their size for the Qwen2.5 models: the only sizes that the weights do not determine."""

_SIGLIP_HEADS = {"so400m": 16, "base": 12, "large": 16}


# ---- config.json


def _upstream_format(directory: Path, configs: Configs, sizes: Sizes) -> Showo2Config:
    fields = configs["config.json"]
    name = fields.get("_class_name", fields.get("model_name"))
    if name not in (_UPSTREAM_CLASS, "Showo2"):
        raise ValueError(f"expected _class_name {_UPSTREAM_CLASS!r} or our own format, got {shown(name)}")
    unknown = sorted(key for key in fields if not key.startswith("_") and key not in _UPSTREAM_FIELDS)
    if unknown:
        raise ValueError(f"unknown field {shown(unknown[0])}")
    config = Showo2Config(
        llm=_llm_fields(directory, fields, sizes),
        vision=_vision_fields(directory, fields, sizes),
        head=_head_fields(sizes),
        **{key: fields[key] for key in _SHARED_FIELDS if fields.get(key) is not None},
    )
    expect_fields("", fields, {"hidden_size": config.hidden_size, "clip_latent_dim": config.clip_latent_dim})
    return config


def _layers(config: Showo2Config) -> list[tuple[str, str, int]]:
    return [
        ("llm['num_hidden_layers']", _LLM_LAYERS, config.llm["num_hidden_layers"]),
        ("vision['num_hidden_layers']", _VISION_LAYERS, config.vision["num_hidden_layers"]),
        ("head['num_layers']", _HEAD_LAYERS, config.head["num_layers"]),
    ]


_LLM_LAYERS = r"showo\.model\.layers\.(\d+)\."
_VISION_LAYERS = r"und_trans\.layers\.(\d+)\."
_HEAD_LAYERS = r"diffusion_head_a\.(\d+)\."


_SHARED_FIELDS = ("image_latent_dim", "image_latent_height", "image_latent_width", "patch_size", "add_time_embeds")


def _own_config(directory: Path, path: Any) -> dict[str, Any] | None:
    """The config.json of a folder named in upstream's config, absolute or relative to the checkpoint."""
    if not isinstance(path, str) or not path:
        return None
    for folder in (Path(path), directory / path):
        if exists(folder / "config.json"):
            return read_object(folder / "config.json")
    return None


def _llm_fields(directory: Path, fields: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    queries = sizes("showo.model.layers.0.self_attn.q_proj.weight", 0)
    own = _own_config(directory, fields.get("llm_model_path"))
    if own is not None:
        heads, rope, eps = own.get("num_attention_heads"), rope_theta(own), own.get("rms_norm_eps", 1e-6)
        longest, tied = own.get("max_position_embeddings", 32768), own.get("tie_word_embeddings", False)
    else:
        known = re.search(r"Qwen2\.5-(\d+(?:\.\d+)?B)", str(fields.get("llm_model_path"))[:1000])
        if known is None or known[1] not in _QWEN2_5:
            raise ValueError(
                f"llm_model_path: expected a folder with the language model's config.json or the name of a "
                f"Qwen2.5 model ({', '.join(_QWEN2_5)}), got {shown(fields.get('llm_model_path'))}"
            )
        heads, head_dim = _QWEN2_5[known[1]]
        if queries != heads * head_dim:
            raise ValueError(
                f"llm_model_path: Qwen2.5-{known[1]} has queries of {heads} x {head_dim}, the weights have {queries}"
            )
        rope, eps, longest, tied = 1e6, 1e-6, 32768, known[1] in ("0.5B", "1.5B", "3B")
    if not is_int(heads) or heads < 1 or queries % heads:
        raise ValueError(f"the language model's num_attention_heads {shown(heads)} does not divide its queries")
    found = sizes.decoder("showo", _LLM_LAYERS, queries // heads)
    if queries == found["hidden_size"]:
        del found["head_dim"]
    return {
        **found,
        "max_position_embeddings": longest,
        "rope_theta": rope,
        "rms_norm_eps": eps,
        "tie_word_embeddings": tied,
    }


def _vision_fields(directory: Path, fields: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    own = _own_config(directory, fields.get("clip_pretrained_model_path")) or {}
    own = own.get("vision_config", own)
    if not isinstance(own, dict):
        raise ValueError(f"SigLIP's vision_config: expected an object, got {shown(own)}")
    heads = own.get("num_attention_heads")
    if heads is None:
        name = str(fields.get("clip_pretrained_model_path", "google/siglip-so400m-patch14-384"))
        heads = next((count for key, count in _SIGLIP_HEADS.items() if key in name), None)
        if heads is None:
            raise ValueError(
                f"clip_pretrained_model_path: expected a folder with SigLIP's config.json or one of the published "
                f"sizes ({', '.join(_SIGLIP_HEADS)}), got {shown(name)}"
            )
    result = {
        "hidden_size": sizes("und_trans.layers.0.layer_norm1.weight", 0),
        "intermediate_size": sizes("und_trans.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": sizes.count(_VISION_LAYERS),
        "num_attention_heads": heads,
        # image_size and patch_size only have to give the table's number of rows.
        **_square(sizes("position_embedding.weight", 0), fields),
    }
    for key in ("hidden_act", "layer_norm_eps"):
        if key in own:
            result[key] = own[key]
    return result


def _square(rows: int, fields: Mapping[str, Any]) -> dict[str, int]:
    sides: list[Any] = [fields.get("image_latent_height"), fields.get("image_latent_width")]
    if all(map(is_int, sides)) and rows == math.prod(sides):  # of other values Showo2Config says what they should be
        return {}
    side = math.isqrt(rows)
    if side * side != rows:
        raise ValueError(f"position_embedding.weight: expected one row per patch or a square number, got {rows}")
    return {"image_size": side, "patch_size": 1}


def _head_fields(sizes: Sizes) -> dict[str, Any]:
    block = "diffusion_head_a.0"
    head_dim = sizes(f"{block}.self_attn.q_norm.weight", 0)
    return {
        "hidden_size": sizes("diffusion_head_b.linear.weight", 1),
        "intermediate_size": sizes(f"{block}.mlp.gate_proj.weight", 0),
        "num_attention_heads": sizes(f"{block}.self_attn.q_proj.weight", 0) // head_dim,
        "num_key_value_heads": sizes(f"{block}.self_attn.k_proj.weight", 0) // head_dim,
        "head_dim": head_dim,
        "num_layers": sizes.count(_HEAD_LAYERS),
    }


def _shallow(config: Showo2Config) -> Showo2Config:
    """One layer each and a tiny vocabulary: such a model has the same buffers as the full one."""
    return dataclasses.replace(
        config,
        llm={**config.llm, "num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 8},
        vision={**config.vision, "num_hidden_layers": 1, "intermediate_size": 8},
        head={**config.head, "num_layers": 1, "intermediate_size": 8},
    )


LAYOUT = Layout(
    name="Show-o2",
    language_model="showo",
    config=Showo2Config,
    upstream=_upstream_format,
    layers=_layers,
    shallow=_shallow,
    files=Files(suffixes=("safetensors", "bin")),
)

load, save, read_config = LAYOUT.load, LAYOUT.save, LAYOUT.read_config
