"""Checkpoint directories: upstream's (config.json of diffusers' ConfigMixin, .bin or .safetensors, sharded or not)
and ours. Loading is strict and executes no code; files are written atomically.

Values missing from upstream's config.json come from the weights (sizes of the diffusion head, layer counts), from the
config.json of language model and SigLIP where `llm_model_path` and `clip_pretrained_model_path` are folders, or from the
published names.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...planning.config import strict_json
from ...planning.safe_files import atomic_path, load_safetensors, read_header, save_safetensors
from .config import Showo2Config

M = TypeVar("M", bound=nn.Module)

__all__ = ["load", "read_config", "save"]

STEMS = ("diffusion_pytorch_model", "pytorch_model", "model")
"""Names of the weights file: diffusers', upstream's own, transformers'."""

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


def load(directory: str | os.PathLike[str], build: Callable[[Showo2Config], M], dtype: torch.dtype | None = None) -> M:
    """Load a model from a folder with config.json and weights; `Showo2.from_pretrained` calls this.

    Args:
        directory: upstream's layout, or one written by `save`.
        build: the model's class.
        dtype: of the parameters; None keeps the token embedding's.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        FileNotFoundError: the folder, its config.json or its weights are missing.
        ValueError: a file is malformed, or names, shapes or dtypes do not match the model; the message lists them.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: expected a folder with a Show-o2 checkpoint")
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"{directory}: expected config.json in the checkpoint folder")
    fields = _read_json(config_path)
    state = _read_weights(directory)
    config = _config(directory, fields, {name: tuple(t.shape) for name, t in state.items()})
    with torch.device("meta"):
        model: Any = build(config)
    _check_names(directory, model, state)
    if dtype is None:
        dtype = state["showo.model.embed_tokens.weight"].dtype
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{directory}: {name}: expected a floating dtype, got {tensor.dtype}")
        state[name] = tensor.to(dtype)
    # assign=True makes the loaded tensors the parameters, so the weights are never in memory twice.
    model.load_state_dict(state, strict=True, assign=True)
    if config.llm.get("tie_word_embeddings"):
        model.showo.tie_weights()
    _restore_buffers(model, build)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def save(model: Any, directory: str | os.PathLike[str]) -> None:
    """Write `model.safetensors` and `config.json` (format flashu_ext.showo2), each atomically.

    Args:
        directory: created if missing; existing files of these names are replaced.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    if model.config.llm.get("tie_word_embeddings"):
        state.pop("showo.lm_head.weight", None)
    save_safetensors(directory / "model.safetensors", state)
    with atomic_path(directory / "config.json") as path:
        path.write_text(model.config.to_json() + "\n", encoding="utf-8")


def read_config(directory: str | os.PathLike[str]) -> Showo2Config:
    """The configuration of the model in a checkpoint folder; of safetensors only headers are read."""
    directory = Path(directory)
    fields = _read_json(directory / "config.json")
    return _config(directory, fields, _read_shapes(directory))


# ---- config.json


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    fields = strict_json(text, str(path))
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(fields).__name__}")
    return fields


def _config(directory: Path, fields: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Showo2Config:
    path = directory / "config.json"
    if "format" in fields:
        return Showo2Config.from_json(path.read_text(encoding="utf-8"), str(path))
    name = fields.get("_class_name", fields.get("model_name"))
    if name not in (_UPSTREAM_CLASS, "Showo2"):
        raise ValueError(f"{path}: expected _class_name {_UPSTREAM_CLASS!r} or our own format, got {name!r}")
    unknown = sorted(key for key in fields if not key.startswith("_") and key not in _UPSTREAM_FIELDS)
    if unknown:
        raise ValueError(f"{path}: unknown field {unknown[0]!r}")
    sizes = _Sizes(path, shapes)
    try:
        config = Showo2Config(
            llm=_llm_fields(directory, fields, sizes),
            vision=_vision_fields(directory, fields, sizes),
            head=_head_fields(sizes),
            **{key: fields[key] for key in _SHARED_FIELDS if fields.get(key) is not None},
        )
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
    for key, value in (("hidden_size", config.hidden_size), ("clip_latent_dim", config.clip_latent_dim)):
        if fields.get(key) not in (None, value):
            raise ValueError(f"{path}: {key}: expected {value}, as the weights have, got {fields[key]!r}")
    return config


_SHARED_FIELDS = ("image_latent_dim", "image_latent_height", "image_latent_width", "patch_size", "add_time_embeds")


class _Sizes:
    """Sizes read from the shapes of weights; errors name the config file and the weight."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]):
        self.path = path
        self.shapes = shapes

    def __call__(self, name: str, dim: int) -> int:
        shape = self.shapes.get(name)
        if shape is None or len(shape) <= dim:
            raise ValueError(f"{self.path}: expected a weight {name} with at least {dim + 1} dimensions")
        return shape[dim]

    def count(self, pattern: str) -> int:
        """One more than the largest layer number in names that match `pattern`."""
        numbers = [int(found[1]) for found in (re.match(pattern, name) for name in self.shapes) if found]
        return max(numbers) + 1 if numbers else 0


def _own_config(directory: Path, path: Any) -> dict[str, Any] | None:
    """The config.json of a folder named in upstream's config, absolute or relative to the checkpoint."""
    if not isinstance(path, str) or not path:
        return None
    for folder in (Path(path), directory / path):
        if (folder / "config.json").is_file():
            return _read_json(folder / "config.json")
    return None


def _llm_fields(directory: Path, fields: Mapping[str, Any], sizes: _Sizes) -> dict[str, Any]:
    layer = "showo.model.layers.0"
    table = "showo.model.embed_tokens.weight"
    own = _own_config(directory, fields.get("llm_model_path"))
    if own is not None:
        heads, rope, eps = own.get("num_attention_heads"), _rope_theta(own), own.get("rms_norm_eps", 1e-6)
        longest, tied = own.get("max_position_embeddings", 32768), bool(own.get("tie_word_embeddings", False))
    else:
        known = re.search(r"Qwen2\.5-(\d+(?:\.\d+)?B)", str(fields.get("llm_model_path")))
        if known is None or known[1] not in _QWEN2_5:
            raise ValueError(
                f"{sizes.path}: llm_model_path: expected a folder with the language model's config.json or the name of a "
                f"Qwen2.5 model ({', '.join(_QWEN2_5)}), got {fields.get('llm_model_path')!r}"
            )
        heads, head_dim = _QWEN2_5[known[1]]
        if sizes(f"{layer}.self_attn.q_proj.weight", 0) != heads * head_dim:
            raise ValueError(
                f"{sizes.path}: llm_model_path: Qwen2.5-{known[1]} has queries of {heads} x {head_dim}, "
                f"the weights have {sizes(f'{layer}.self_attn.q_proj.weight', 0)}"
            )
        rope, eps, longest, tied = 1e6, 1e-6, 32768, known[1] in ("0.5B", "1.5B", "3B")
    if not isinstance(heads, int) or heads < 1 or sizes(f"{layer}.self_attn.q_proj.weight", 0) % heads:
        raise ValueError(
            f"{sizes.path}: the language model's num_attention_heads {heads!r} does not divide its queries"
        )
    head_dim = sizes(f"{layer}.self_attn.q_proj.weight", 0) // heads
    result = {
        "hidden_size": sizes(table, 1),
        "intermediate_size": sizes(f"{layer}.mlp.gate_proj.weight", 0),
        "num_hidden_layers": sizes.count(r"showo\.model\.layers\.(\d+)\."),
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, sizes(f"{layer}.self_attn.k_proj.weight", 0) // head_dim),
        "vocab_size": sizes(table, 0),
        "max_position_embeddings": longest,
        "rope_theta": rope,
        "rms_norm_eps": eps,
        "tie_word_embeddings": tied,
    }
    if head_dim * heads != result["hidden_size"]:
        result["head_dim"] = head_dim
    return result


def _rope_theta(config: Mapping[str, Any]) -> float:
    nested = config.get("rope_parameters")
    value = config.get("rope_theta", nested.get("rope_theta") if isinstance(nested, dict) else None)
    return float(value) if isinstance(value, (int, float)) else 10000.0


def _vision_fields(directory: Path, fields: Mapping[str, Any], sizes: _Sizes) -> dict[str, Any]:
    own = _own_config(directory, fields.get("clip_pretrained_model_path")) or {}
    own = own.get("vision_config", own)
    heads = own.get("num_attention_heads")
    if heads is None:
        name = str(fields.get("clip_pretrained_model_path", "google/siglip-so400m-patch14-384"))
        heads = next((count for key, count in _SIGLIP_HEADS.items() if key in name), None)
        if heads is None:
            raise ValueError(
                f"{sizes.path}: clip_pretrained_model_path: expected a folder with SigLIP's config.json or one of the published "
                f"sizes ({', '.join(_SIGLIP_HEADS)}), got {name!r}"
            )
    result = {
        "hidden_size": sizes("und_trans.layers.0.layer_norm1.weight", 0),
        "intermediate_size": sizes("und_trans.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": sizes.count(r"und_trans\.layers\.(\d+)\."),
        "num_attention_heads": heads,
        # image_size and patch_size only have to give the table's number of rows.
        **_square(sizes("position_embedding.weight", 0), fields),
    }
    for key in ("hidden_act", "layer_norm_eps"):
        if key in own:
            result[key] = own[key]
    return result


def _square(rows: int, fields: Mapping[str, Any]) -> dict[str, int]:
    if rows == int(fields.get("image_latent_height") or 0) * int(fields.get("image_latent_width") or 0):
        return {}
    side = round(rows**0.5)
    if side * side != rows:
        raise ValueError(f"position_embedding.weight: expected one row per patch or a square number, got {rows}")
    return {"image_size": side, "patch_size": 1}


def _head_fields(sizes: _Sizes) -> dict[str, Any]:
    block = "diffusion_head_a.0"
    head_dim = sizes(f"{block}.self_attn.q_norm.weight", 0)
    return {
        "hidden_size": sizes("diffusion_head_b.linear.weight", 1),
        "intermediate_size": sizes(f"{block}.mlp.gate_proj.weight", 0),
        "num_attention_heads": sizes(f"{block}.self_attn.q_proj.weight", 0) // max(1, head_dim),
        "num_key_value_heads": sizes(f"{block}.self_attn.k_proj.weight", 0) // max(1, head_dim),
        "head_dim": head_dim,
        "num_layers": sizes.count(r"diffusion_head_a\.(\d+)\."),
    }


# ---- weights


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files and, for shards, the index: tensor name -> file name."""
    for stem in STEMS:
        for suffix in ("safetensors", "bin"):
            index = directory / f"{stem}.{suffix}.index.json"
            if index.is_file():
                weight_map = _weight_map(index)
                return [directory / name for name in sorted(set(weight_map.values()))], weight_map
            if (directory / f"{stem}.{suffix}").is_file():
                return [directory / f"{stem}.{suffix}"], None
    names = ", ".join(f"{stem}.safetensors" for stem in STEMS)
    raise FileNotFoundError(
        f"{directory}: expected weights: {names}, the same as .bin, or their .index.json with shards"
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map: expected an object from tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.(safetensors|bin)", file):
            raise ValueError(
                f"{index}: {name}: expected the name of a .safetensors or .bin file in the folder, got {file!r:.100}"
            )
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"{index}: {name}: its shard {file} is missing")
    return weight_map


def _read_weights(directory: Path) -> dict[str, Tensor]:
    files, weight_map = _weight_files(directory)
    state: dict[str, Tensor] = {}
    for path in files:
        shard = load_safetensors(path)[0] if path.suffix == ".safetensors" else _load_bin(path)
        _check_shard(path, shard, state, weight_map)
        state.update(shard)
    return _complete(files, state, weight_map)


def _read_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    files, weight_map = _weight_files(directory)
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        if path.suffix == ".safetensors":
            shard = {name: entry.shape for name, entry in read_header(path).entries.items()}
        else:
            shard = {name: tuple(tensor.shape) for name, tensor in _load_bin(path).items()}
        _check_shard(path, shard, shapes, weight_map)
        shapes.update(shard)
    return _complete(files, shapes, weight_map)


def _check_shard(
    path: Path, shard: Mapping[str, Any], seen: Mapping[str, Any], weight_map: Mapping[str, str] | None
) -> None:
    for name in shard:
        if name in seen:
            raise ValueError(f"{path}: {name}: expected each tensor in one shard, got it in two")
        if weight_map is not None and weight_map.get(name) != path.name:
            raise ValueError(f"{path}: {name}: the index says {weight_map.get(name)!r}")


def _complete(files: list[Path], found: dict[str, Any], weight_map: Mapping[str, str] | None) -> dict[str, Any]:
    missing = sorted(set(weight_map or ()) - set(found))
    if missing:
        raise ValueError(f"{files[0].parent}: the index names {_listed(missing)}, missing from all shards")
    return found


def _load_bin(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        IndexError,
    ) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{path}: not a file of plain tensors: {reason[0] if reason else type(error).__name__}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{path}: expected a dict from names to tensors, got {type(state).__name__}")
    return dict(state)


# ---- model


def _check_names(directory: Path, model: Any, state: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    optional = {"showo.lm_head.weight"} if model.config.llm.get("tie_word_embeddings") else set()
    missing = sorted(set(expected) - set(state) - optional)
    unexpected = sorted(set(state) - set(expected))
    problems = []
    if missing:
        problems.append(f"missing: {_listed(missing)}")
    if unexpected:
        problems.append(f"unexpected: {_listed(unexpected)}")
    for name in sorted(set(expected) & set(state)):
        if tuple(state[name].shape) != expected[name]:
            problems.append(f"{name}: expected shape {list(expected[name])}, got {list(state[name].shape)}")
    if problems:
        raise ValueError(f"{directory}: the weights do not match the model: " + "; ".join(problems[:8]))


def _listed(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _restore_buffers(model: Any, build: Callable[[Showo2Config], Any]) -> None:
    """Compute the buffers that are not in checkpoints (rotary frequencies, position ids) and are still on meta."""
    twin = None
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            continue
        if twin is None:
            with torch.device("cpu"):
                twin = dict(build(_shallow(model.config)).named_buffers())
        owner, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        value = twin[re.sub(r"diffusion_head_a\.\d+\.", "diffusion_head_a.0.", name)]
        module._buffers[leaf] = value.clone()
        if leaf == "inv_freq" and hasattr(module, "original_inv_freq"):
            module.original_inv_freq = module._buffers[leaf]


def _shallow(config: Showo2Config) -> Showo2Config:
    """One layer each and a tiny vocabulary: such a model has the same buffers as the full one."""
    return dataclasses.replace(
        config,
        llm={**config.llm, "num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 8},
        vision={**config.vision, "num_hidden_layers": 1, "intermediate_size": 8},
        head={**config.head, "num_layers": 1, "intermediate_size": 8},
    )
