"""Reads safetensors strictly and writes files atomically; used by every loader of this package.

The safetensors library checks offsets and sizes. Checked here first: a limit on the header's size, repeated keys, NaN in JSON,
unknown dtypes, numbers of dimensions, shape products, and files shorter or longer than their header says.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reading import MAX_JSON_BYTES, open_regular, os_refusal, refusal, shown, strict_json

__all__ = [
    "SafetensorsHeader",
    "TensorEntry",
    "atomic_path",
    "load_safetensors",
    "read_header",
    "save_safetensors",
    "try_lock",
    "write_text",
]

MAX_DIMENSIONS = 64
"""As many as a torch tensor may have."""

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
        ValueError: not a regular file, truncated, oversized, or of impossible tensors; the message names file and entry.
        OSError: the file cannot be opened.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            raise refusal(path, f"expected a safetensors file of at least 8 bytes, got {size}")
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            raise refusal(path, f"header claims {length} bytes; the file has {size - 8} after its length field")
        if length > MAX_JSON_BYTES:
            raise refusal(path, f"expected a header of at most {MAX_JSON_BYTES} bytes, got {length}")
        raw = file.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refusal(path, f"header is not UTF-8: {error}") from error
    header = strict_json(text, f"{os.fspath(path)}: header")
    try:
        return _header(header, size - 8 - length)
    except ValueError as error:
        raise refusal(path, error) from error


def _header(header: Any, payload: int) -> SafetensorsHeader:
    if not isinstance(header, dict):
        raise ValueError(f"header: expected a JSON object, got {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__: expected an object of strings")
    entries = {name: _entry(name, value) for name, value in header.items()}
    _check_ranges(entries, payload)
    return SafetensorsHeader(entries, metadata)


def _entry(name: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name:.200}: expected dtype, shape and data_offsets, got {shown(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise ValueError(f"{name:.200}: unknown dtype {shown(dtype, 40)}")
    for field, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(
            isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in numbers
        ):
            raise ValueError(f"{name:.200}: {field}: expected a list of integers in [0, 2^63), got {shown(numbers)}")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name:.200}: shape: expected at most {MAX_DIMENSIONS} dimensions, got {len(shape)}")
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        raise ValueError(f"{name:.200}: data_offsets: expected [begin, end] with begin <= end, got {shown(offsets)}")
    expected = math.prod(shape) * _DTYPE_BYTES[dtype]
    if expected != offsets[1] - offsets[0]:
        raise ValueError(
            f"{name:.200}: {dtype} {shown(shape)} needs {shown(expected)} bytes, "
            f"data_offsets hold {offsets[1] - offsets[0]}"
        )
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _check_ranges(entries: Mapping[str, TensorEntry], payload: int) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise ValueError(f"{name:.200}: expected data at byte {position}, got {entry.begin} (overlap or gap)")
        position = entry.end
    if position != payload:
        raise ValueError(f"expected {position} bytes of tensor data, the file holds {payload} (truncated or padded)")


def load_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors (on the CPU) and metadata of a checked safetensors file. Raises as `read_header` does."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_header(path)
    try:
        return load_file(path), header.metadata
    except SafetensorError as error:
        raise refusal(path, error) from error


def save_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors atomically: the file at `path` is either the old or the complete new one.

    Raises:
        ValueError: `load_safetensors` would refuse the file. OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            # The operating system's error is a text here: "... (os error 28)" for a full disk.
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise refusal(path, error) from error
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        try:
            read_header(temporary)
        except ValueError as error:
            raise refusal(path, f"could not be read again: {error}") from error


# ---- writing


_DRAFTS = f".flashu-{hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]}-"
"""Begins the names of this machine's folders of drafts: the lock that a writer holds while it lives may be known there only."""

_swept: set[Path] = set()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, in a folder of its own next to `path`; the block's end moves the file there, an exception deletes it.

    What processes that were killed left in the folder is deleted when a process first writes there.

    Raises:
        OSError: as the block's, or the file cannot be written; it names `path`. ValueError: no file can have this name.
    """
    path = Path(path)
    if "\0" in str(path):
        raise refusal(path, "expected a file's name, got one with a null byte")
    try:
        _sweep(path.parent.absolute())
        folder, lock = _make_draft(path.parent)
        try:
            temporary = folder / path.name
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        if error.errno is None or not (error.filename is None or _DRAFTS in str(error.filename)):
            raise  # about another file
        raise os_refusal(path, error) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text as UTF-8, atomically. Raises OSError."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def try_lock(handle: int, kind: int) -> bool:
    """Lock an open file or folder (LOCK_EX: alone, LOCK_SH: with others); False where another one holds it. A process that ends
    lets go of its locks, however it ends. Raises OSError: the file system has none."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _make_draft(parent: Path) -> tuple[Path, int]:
    """A new folder in `parent`, and the handle that it is locked by."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_DRAFTS, dir=parent))
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # of a file system without locks, where nobody sweeps either
            try_lock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return folder, handle
        os.close(handle)  # swept between the two calls


def _sweep(parent: Path) -> None:
    """Delete the drafts of dead writers, once for each folder."""
    if parent in _swept:
        return
    _swept.add(parent)
    with contextlib.suppress(OSError):
        for folder in [name for name in os.listdir(parent) if name.startswith(_DRAFTS)]:
            _delete_dead(parent / folder)


def _delete_dead(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another process deletes it too
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if try_lock(handle, fcntl.LOCK_EX):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def content_digest(tensors: list[Tensor]) -> str:
    """SHA-256 of the values as bf16, so that a cast to bf16 does not change the digest."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
