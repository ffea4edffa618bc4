"""Files of weights of all models: .safetensors or plain .bin, sharded or not, and the sizes that their shapes give.

Reading is strict and executes no code.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..planning.reading import exists, open_regular, read_json, refusal, shown
from ..planning.safe_files import load_safetensors, read_header

__all__ = ["DTYPES", "USUAL", "Files", "Shapes", "Sizes", "listed", "read_object", "read_shapes", "read_weights"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Shapes = Mapping[str, tuple[int, ...]]
"""Of weights, by name."""


@dataclass(frozen=True)
class Files:
    """Which files of a folder are weights.

    Attributes:
        stems: their names without ending, the first that is there counts. By default ours and transformers', upstream's own
            and diffusers'.
        suffixes: their kinds.
    """

    stems: tuple[str, ...] = ("model", "pytorch_model", "diffusion_pytorch_model")
    suffixes: tuple[str, ...] = ("safetensors",)


USUAL = Files()


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError or OSError, naming the file."""
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise refusal(path, f"expected a JSON object, got {type(fields).__name__}")
    return fields


class Sizes:
    """Sizes read from the shapes of weights; errors name the weight."""

    def __init__(self, shapes: Shapes):
        self.shapes = shapes

    def __call__(self, name: str, dim: int) -> int:
        shape = self.shapes.get(name)
        if shape is None or len(shape) <= dim or shape[dim] < 1:
            got = "none" if shape is None else f"one of shape {shown(list(shape))}"
            raise ValueError(f"expected a weight {name} with at least {dim + 1} dimensions, none of them 0, got {got}")
        return shape[dim]

    def side(self, name: str, dim: int) -> int:
        """The side of a square whose places a dimension counts."""
        places = self(name, dim)
        if math.isqrt(places) ** 2 != places:
            raise ValueError(f"{name}: expected a square number of places, got {places}")
        return math.isqrt(places)

    def decoder(self, path: str, pattern: str, head_dim: int) -> dict[str, int]:
        """Of a decoder at a path, under the names of transformers' configs. pattern: of its layers."""
        layer, table = f"{path}.model.layers.0", f"{path}.model.embed_tokens.weight"
        return {
            "hidden_size": self(table, 1),
            "intermediate_size": self(f"{layer}.mlp.gate_proj.weight", 0),
            "num_hidden_layers": self.count(pattern),
            "num_attention_heads": max(1, self(f"{layer}.self_attn.q_proj.weight", 0) // head_dim),
            "num_key_value_heads": max(1, self(f"{layer}.self_attn.k_proj.weight", 0) // head_dim),
            "vocab_size": self(table, 0),
            "head_dim": head_dim,
        }

    def count(self, pattern: str) -> int:
        """How many layers there are in names that match `pattern`; they are numbered from 0 without a gap."""
        found = {match[1]: name for name in self.shapes if (match := re.match(pattern, name))}
        layers = {str(number) for number in range(len(found))}
        for number in found.keys() - layers:  # as text: a number may have any length
            raise ValueError(f"{found[number]:.200}: expected layers 0 to {len(found) - 1}, got layer {number:.20}")
        return len(found)


# ---- files


def _weight_files(directory: Path, files: Files) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files and, for shards, the index: tensor name -> file name."""
    for stem in files.stems:
        for suffix in files.suffixes:
            # The whole file goes first: `save` writes it beside shards that may be there already.
            if exists(directory / f"{stem}.{suffix}"):
                return [directory / f"{stem}.{suffix}"], None
            index = directory / f"{stem}.{suffix}.index.json"
            if exists(index):
                weight_map = _weight_map(index, files.suffixes)
                return [directory / name for name in sorted(set(weight_map.values()))], weight_map
    names = ", ".join(f"{stem}.{files.suffixes[0]}" for stem in files.stems)
    others = "".join(f", the same as .{suffix}" for suffix in files.suffixes[1:])
    raise FileNotFoundError(f"{directory}: expected weights: {names}{others}, or their .index.json with shards")


def _weight_map(index: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise refusal(index, "weight_map: expected an object from tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(
            rf"[A-Za-z0-9_-][A-Za-z0-9._-]*\.({'|'.join(suffixes)})", file
        ):
            kinds = " or ".join(f".{suffix}" for suffix in suffixes)
            raise refusal(index, f"{name:.200}: expected the name of a {kinds} file in the folder, got {shown(file)}")
    for file, name in {file: name for name, file in weight_map.items()}.items():
        if not exists(index.parent / file):
            raise refusal(index, f"{name:.200}: its shard {file:.200} is missing", FileNotFoundError)
    return weight_map


def read_weights(directory: Path, files: Files) -> dict[str, Tensor]:
    """All weights of a folder, on the CPU."""
    paths, weight_map = _weight_files(directory, files)
    state: dict[str, Tensor] = {}
    for path in paths:
        shard = load_safetensors(path)[0] if path.suffix == ".safetensors" else _load_bin(path)
        _check_shard(path, shard, state, weight_map)
        _check_plain(path, shard)
        state.update(shard)
    return _complete(paths, state, weight_map)


def read_shapes(directory: Path, files: Files) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights of a folder; of safetensors only headers are read."""
    paths, weight_map = _weight_files(directory, files)
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            shard = {name: entry.shape for name, entry in read_header(path).entries.items()}
        else:
            shard = {name: tuple(tensor.shape) for name, tensor in _load_bin(path).items()}
        _check_shard(path, shard, shapes, weight_map)
        shapes.update(shard)
    return _complete(paths, shapes, weight_map)


def _check_shard(
    path: Path, shard: Mapping[str, Any], seen: Mapping[str, Any], weight_map: Mapping[str, str] | None
) -> None:
    for name in shard:
        if name in seen:
            raise refusal(path, f"{name:.200}: expected each tensor in one shard, got it in two")
        if weight_map is not None and weight_map.get(name) != path.name:
            raise refusal(path, f"{name:.200}: the index says {shown(weight_map.get(name))}")


def _complete(paths: list[Path], found: dict[str, Any], weight_map: Mapping[str, str] | None) -> dict[str, Any]:
    missing = sorted(set(weight_map or ()) - set(found))
    if missing:
        raise refusal(paths[0].parent, f"the index names {listed(missing)}, missing from all shards")
    return found


def _check_plain(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor one that holds its numbers itself, in a dtype that is computed with."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise refusal(path, f"{name:.200}: expected a floating dtype of {listed(DTYPES)}, got {tensor.dtype}")
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


def listed(names: Iterable[object], limit: int = 6) -> str:
    """The first names, for a message."""
    shortened = [f"{name!s:.100}" for name in names]
    return ", ".join(shortened[:limit]) + (f" and {len(shortened) - limit} more" if len(shortened) > limit else "")
