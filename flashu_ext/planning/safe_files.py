"""Reads safetensors strictly and writes files atomically; used by every loader of this package.

The safetensors library checks offsets and sizes. Checked here first: limits on header size and entry count, repeated keys,
NaN in JSON, unknown dtypes, shape products, and files shorter or longer than their header says.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import strict_json

__all__ = ["SafetensorsHeader", "TensorEntry", "atomic_path", "load_safetensors", "read_header", "save_safetensors"]

MAX_HEADER_BYTES = 100 * 2**20
MAX_ENTRIES = 1_000_000

_DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_DTYPE_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as described in the header: dtype name, shape, byte range after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Read and check the header of a safetensors file without reading its tensors.

    Raises:
        ValueError: the file is truncated, oversized, or describes impossible tensors; the message names file and entry.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"{path}: expected a safetensors file of at least 8 bytes, got {size}")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise ValueError(f"{path}: header claims {length} bytes; the file has {size - 8} after its length field")
        raw = file.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: header is not UTF-8: {error}") from error
    header = strict_json(text, f"{path}: header")
    if not isinstance(header, dict):
        raise ValueError(f"{path}: header: expected a JSON object, got {type(header).__name__}")
    if len(header) > MAX_ENTRIES:
        raise ValueError(f"{path}: header: expected at most {MAX_ENTRIES} entries, got {len(header)}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__: expected an object of strings")
    entries = {name: _entry(f"{path}: {name}", value) for name, value in header.items()}
    _check_ranges(path, entries, size - 8 - length)
    return SafetensorsHeader(entries, metadata)


def _entry(where: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: expected dtype, shape and data_offsets, got {value!r:.200}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in _DTYPE_BYTES:
        raise ValueError(f"{where}: unknown dtype {dtype!r:.40}")
    for name, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(
            isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in numbers
        ):
            raise ValueError(f"{where}: {name}: expected a list of integers in [0, 2^63), got {numbers!r:.200}")
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        raise ValueError(f"{where}: data_offsets: expected [begin, end] with begin <= end, got {offsets!r:.200}")
    expected = math.prod(shape) * _DTYPE_BYTES[dtype]
    if expected != offsets[1] - offsets[0]:
        raise ValueError(
            f"{where}: {dtype} {shape} needs {expected} bytes, data_offsets hold {offsets[1] - offsets[0]}"
        )
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _check_ranges(path: Path, entries: Mapping[str, TensorEntry], payload: int) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise ValueError(f"{path}: {name}: expected data at byte {position}, got {entry.begin} (overlap or gap)")
        position = entry.end
    if position != payload:
        raise ValueError(
            f"{path}: expected {position} bytes of tensor data, the file holds {payload} (truncated or padded)"
        )


def load_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors (on the CPU) and metadata of a checked safetensors file. Raises as `read_header` does."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_header(path)
    try:
        return load_file(path), header.metadata
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error


def save_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors atomically: the file at `path` is either the old or the complete new one."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path next to `path`; the block's end renames it to `path`, an exception deletes it."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def content_digest(tensors: list[Tensor]) -> str:
    """SHA-256 of the values as bf16, so that a cast to bf16 does not change the digest."""
    import hashlib

    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
