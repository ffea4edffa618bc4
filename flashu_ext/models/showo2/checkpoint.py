"""Checkpoint directories: upstream's (config.json of diffusers' ConfigMixin, .bin or .safetensors, sharded or not)
and ours. Loading is strict and executes no code; files are written atomically.

Values missing from upstream's config.json come from the weights (sizes of the diffusion head, layer counts), from the
config.json of language model and SigLIP where `llm_model_path` and `clip_pretrained_model_path` are folders, or from the
published names.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor, nn

from ...planning.groups import is_int, is_real
from ...planning.reading import exists, open_regular, read_json, refusal, shown
from ...planning.safe_files import load_safetensors, read_header, save_safetensors, write_text
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
        build: the model's class. It is called on the meta device, when the files' layers are known to be there.
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
    check_dtype(dtype)
    config_path = directory / "config.json"
    if not exists(config_path):
        raise FileNotFoundError(f"{directory}: expected config.json in the checkpoint folder")
    fields = _read_json(config_path)
    state = _read_weights(directory)
    config = _config(directory, fields, {name: tuple(t.shape) for name, t in state.items()})
    model = _on_meta(config_path, build, config)
    _check_names(directory, model, state)
    if dtype is None:
        dtype = state["showo.model.embed_tokens.weight"].dtype
    for name, tensor in state.items():
        state[name] = tensor.to(dtype)
    # assign=True makes the loaded tensors the parameters, so the weights are never in memory twice.
    model.load_state_dict(state, strict=True, assign=True)
    if config.llm.get("tie_word_embeddings"):
        model.showo.tie_weights()
    _restore_buffers(model, build)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def check_dtype(dtype: Any) -> None:
    """Of a model's weights. Raises ValueError, naming `dtype`."""
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype: expected None or a floating dtype of {_listed(_DTYPES)}, got {shown(dtype)}")


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
    write_text(directory / "config.json", model.config.to_json() + "\n")


def read_config(directory: str | os.PathLike[str]) -> Showo2Config:
    """The configuration of the model in a checkpoint folder; of safetensors only headers are read."""
    directory = Path(directory)
    fields = _read_json(directory / "config.json")
    return _config(directory, fields, _read_shapes(directory))


# ---- config.json


def _read_json(path: Path) -> dict[str, Any]:
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise refusal(path, f"expected a JSON object, got {type(fields).__name__}")
    return fields


def _config(directory: Path, fields: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Showo2Config:
    """The configuration that config.json and weights give together. Errors name config.json."""
    path = directory / "config.json"
    sizes = _Sizes(shapes)
    try:
        if "format" in fields:
            config = Showo2Config.from_fields(fields)
        else:
            config = _upstream_format(directory, fields, sizes)
        _check_layers(config, sizes)
    except ValueError as error:
        raise refusal(path, error) from error
    return config


def _upstream_format(directory: Path, fields: dict[str, Any], sizes: _Sizes) -> Showo2Config:
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
    for key, value in (("hidden_size", config.hidden_size), ("clip_latent_dim", config.clip_latent_dim)):
        if fields.get(key) not in (None, value):
            raise ValueError(f"{key}: expected {value}, as the weights have, got {shown(fields[key])}")
    return config


def _check_layers(config: Showo2Config, sizes: _Sizes) -> None:
    """Before a layer is built: as many as the weights have."""
    for where, pattern, asked in (
        ("llm['num_hidden_layers']", _LLM_LAYERS, config.llm["num_hidden_layers"]),
        ("vision['num_hidden_layers']", _VISION_LAYERS, config.vision["num_hidden_layers"]),
        ("head['num_layers']", _HEAD_LAYERS, config.head["num_layers"]),
    ):
        if sizes.count(pattern) != asked:
            raise ValueError(f"{where}: expected {sizes.count(pattern)}, as the weights have, got {asked}")


_LLM_LAYERS = r"showo\.model\.layers\.(\d+)\."
_VISION_LAYERS = r"und_trans\.layers\.(\d+)\."
_HEAD_LAYERS = r"diffusion_head_a\.(\d+)\."


_SHARED_FIELDS = ("image_latent_dim", "image_latent_height", "image_latent_width", "patch_size", "add_time_embeds")


class _Sizes:
    """Sizes read from the shapes of weights; errors name the weight."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = shapes

    def __call__(self, name: str, dim: int) -> int:
        shape = self.shapes.get(name)
        if shape is None or len(shape) <= dim or shape[dim] < 1:
            got = "none" if shape is None else f"one of shape {shown(list(shape))}"
            raise ValueError(f"expected a weight {name} with at least {dim + 1} dimensions, none of them 0, got {got}")
        return shape[dim]

    def count(self, pattern: str) -> int:
        """How many layers there are in names that match `pattern`; they are numbered from 0 without a gap."""
        found = {match[1]: name for name in self.shapes if (match := re.match(pattern, name))}
        layers = {str(number) for number in range(len(found))}
        for number in found.keys() - layers:  # as text: a number may have any length
            raise ValueError(f"{found[number]:.200}: expected layers 0 to {len(found) - 1}, got layer {number:.20}")
        return len(found)


def _own_config(directory: Path, path: Any) -> dict[str, Any] | None:
    """The config.json of a folder named in upstream's config, absolute or relative to the checkpoint."""
    if not isinstance(path, str) or not path:
        return None
    for folder in (Path(path), directory / path):
        if exists(folder / "config.json"):
            return _read_json(folder / "config.json")
    return None


def _llm_fields(directory: Path, fields: Mapping[str, Any], sizes: _Sizes) -> dict[str, Any]:
    layer = "showo.model.layers.0"
    table = "showo.model.embed_tokens.weight"
    queries = sizes(f"{layer}.self_attn.q_proj.weight", 0)
    own = _own_config(directory, fields.get("llm_model_path"))
    if own is not None:
        heads, rope, eps = own.get("num_attention_heads"), _rope_theta(own), own.get("rms_norm_eps", 1e-6)
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
    head_dim = queries // heads
    result = {
        "hidden_size": sizes(table, 1),
        "intermediate_size": sizes(f"{layer}.mlp.gate_proj.weight", 0),
        "num_hidden_layers": sizes.count(_LLM_LAYERS),
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


def _rope_theta(config: Mapping[str, Any]) -> Any:
    """The base as transformers writes it, in either place; 10000 where it is in neither."""
    nested = config.get("rope_parameters")
    if "rope_theta" in config or not isinstance(nested, dict):
        return _base(config.get("rope_theta", 10000.0))
    return _base(nested.get("rope_theta", 10000.0))


def _base(value: Any) -> float:
    if not is_real(value):
        raise ValueError(f"the language model's rope_theta: expected a finite number > 0, got {shown(value)}")
    return float(value)


def _vision_fields(directory: Path, fields: Mapping[str, Any], sizes: _Sizes) -> dict[str, Any]:
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


def _head_fields(sizes: _Sizes) -> dict[str, Any]:
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


# ---- weights


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files and, for shards, the index: tensor name -> file name."""
    for stem in STEMS:
        for suffix in ("safetensors", "bin"):
            index = directory / f"{stem}.{suffix}.index.json"
            if exists(index):
                weight_map = _weight_map(index)
                return [directory / name for name in sorted(set(weight_map.values()))], weight_map
            if exists(directory / f"{stem}.{suffix}"):
                return [directory / f"{stem}.{suffix}"], None
    names = ", ".join(f"{stem}.safetensors" for stem in STEMS)
    raise FileNotFoundError(
        f"{directory}: expected weights: {names}, the same as .bin, or their .index.json with shards"
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise refusal(index, "weight_map: expected an object from tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.(safetensors|bin)", file):
            raise refusal(
                index, f"{name:.200}: expected the name of a .safetensors or .bin file in the folder, got {shown(file)}"
            )
    for file, name in {file: name for name, file in weight_map.items()}.items():
        if not exists(index.parent / file):
            raise refusal(index, f"{name:.200}: its shard {file:.200} is missing", FileNotFoundError)
    return weight_map


def _read_weights(directory: Path) -> dict[str, Tensor]:
    files, weight_map = _weight_files(directory)
    state: dict[str, Tensor] = {}
    for path in files:
        shard = load_safetensors(path)[0] if path.suffix == ".safetensors" else _load_bin(path)
        _check_shard(path, shard, state, weight_map)
        _check_plain(path, shard)
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
            raise refusal(path, f"{name:.200}: expected each tensor in one shard, got it in two")
        if weight_map is not None and weight_map.get(name) != path.name:
            raise refusal(path, f"{name:.200}: the index says {shown(weight_map.get(name))}")


def _complete(files: list[Path], found: dict[str, Any], weight_map: Mapping[str, str] | None) -> dict[str, Any]:
    missing = sorted(set(weight_map or ()) - set(found))
    if missing:
        raise refusal(files[0].parent, f"the index names {_listed(missing)}, missing from all shards")
    return found


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_plain(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor one that holds its numbers itself, in a dtype that is computed with."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise refusal(path, f"{name:.200}: expected a floating dtype of {_listed(_DTYPES)}, got {tensor.dtype}")
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
            got = f"a {type(tensor).__name__} of {tensor.layout} on {tensor.device}"
            raise refusal(path, f"{name:.200}: expected a dense tensor, got {got}")
        # One number repeated by strides of 0 would become as large as its shape says when it is first copied.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise refusal(
                path, f"{name:.200}: expected a number for every element, got {shown(list(tensor.shape))} of fewer"
            )


def _load_bin(path: Path) -> dict[str, Tensor]:
    with open_regular(path) as file:
        _check_stored(path, file)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what a broken pickle ends in is anything
        reason = str(error).strip().splitlines()
        raise refusal(path, f"not a file of plain tensors: {reason[0] if reason else type(error).__name__}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise refusal(path, f"expected a dict from names to tensors, got {type(state).__name__}")
    return dict(state)


def _check_stored(path: Path, file: BinaryIO) -> None:
    """A zip file's entries as torch writes them, which are as large as they lie there; other files are not looked into."""
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise refusal(path, f"not a file of plain tensors: {error}") from error
    if packed:
        raise refusal(path, f"{packed[0]:.200}: expected an entry that is stored as it is, got a compressed one")


# ---- model


def _on_meta(path: Path, build: Callable[[Showo2Config], Any], config: Showo2Config) -> Any:
    """The model without memory for its weights."""
    try:
        with torch.device("meta"):
            return build(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        raise refusal(path, f"no model can be built of it: {error}") from error


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
            problems.append(f"{name}: expected shape {list(expected[name])}, got {shown(list(state[name].shape))}")
    if problems:
        raise refusal(directory, "the weights do not match the model: " + "; ".join(problems[:8]))


def _listed(names: Iterable[object], limit: int = 6) -> str:
    listed = [f"{name!s:.100}" for name in names]
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


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
