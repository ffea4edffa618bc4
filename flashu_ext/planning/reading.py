"""Reads files whose origin is unknown: regular files of a bounded size, strict JSON, images, and errors that name the file.

Imports no torch. What a file holds is foreign text: it enters an error by `refusal` or `shown`, which cut it and take control
codes out of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .extras import extra

__all__ = [
    "decoded_image",
    "in_rgb",
    "open_regular",
    "os_refusal",
    "printable",
    "read_image",
    "read_json",
    "read_text",
    "refusal",
    "shown",
    "strict_json",
]

MESSAGE_CHARACTERS = 500
"""Longest text of an error about a file."""

MAX_JSON_BYTES = 2 * 2**20
"""A model's configuration, index or header: twenty thousand tensors, and parsed within a second whatever it holds."""
MAX_LIST_BYTES = 64 * 2**20
"""A list of prompts or samples."""
MAX_DEPTH = 64
"""Nested lists and objects."""
MAX_DIGITS = 308
"""Of a whole number, so that it is a finite float too."""
MAX_PIXELS = 2**26
"""Of an image, 200 MB when it is decoded."""

Where = str | os.PathLike[str]

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}

# Of PIL's formats those that hold pixels only; its EPS reader, for one, starts another program.
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


# ---- errors


def printable(text: str, limit: int = MESSAGE_CHARACTERS) -> str:
    """A text as one line: control codes and lone surrogates escaped, the middle left out beyond `limit` characters."""
    text = _without_middle(text, limit)  # first, so that a long text takes no time
    return _without_middle("".join(c if c.isprintable() else _escaped(c) for c in text), limit)


def _escaped(character: str) -> str:
    return " " if character in "\n\r\t" else character.encode("unicode_escape").decode("ascii")


def _without_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    tail = (limit - 5) // 3
    return f"{text[: limit - 5 - tail]} ... {text[len(text) - tail :]}"


def shown(value: object, limit: int = 100) -> str:
    """`repr(value)` for a message, of any value and at most `limit` characters."""
    try:
        return printable(repr(value), limit)
    except (ValueError, RecursionError):  # a number of more digits than Python prints; lists nested too deeply
        return f"an unprintable {type(value).__name__}"


def refusal(where: Where, what: object, kind: type[Exception] = ValueError) -> Exception:
    """The error for a file: its name and what is wrong, of at most `MESSAGE_CHARACTERS` on one line."""
    return kind(printable(f"{printable(os.fspath(where), 250)}: {what}"))


def os_refusal(where: Where, error: OSError) -> OSError:
    """The operating system's error, with the file's name shortened where it is long."""
    name = os.fspath(where)
    return OSError(error.errno, error.strerror, name if len(repr(name)) <= 252 else printable(name, 250))


# ---- files


@contextlib.contextmanager
def open_regular(path: Where) -> Iterator[BinaryIO]:
    """Open a regular file for reading; a FIFO, device, socket or directory is refused and not waited for.

    Raises:
        ValueError: it is another kind of file. TypeError: `path` is no path. OSError: it cannot be opened, or read in the
            block; it names `path`.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a string or a path, got {shown(path)}")
    try:
        with _open(path) as file:
            yield file
    except OSError as error:
        if error.errno is None or error.filename not in (None, os.fspath(path)):
            raise  # about another file
        raise os_refusal(path, error) from error  # a read's error names no file, an opening's a name of any length


def _open(path: Where) -> BinaryIO:
    try:
        _check_regular(path, os.stat(path))  # before it is opened: opening a device may already do something
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise refusal(path, str(error).removeprefix(f"{path}: ")) from error  # of a name with NUL in it, by Python
    try:
        _check_regular(path, os.fstat(handle))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _check_regular(path: Where, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "another kind of file")
        raise refusal(path, f"expected a regular file, got {kind}")


def read_text(path: Where, limit: int = MAX_JSON_BYTES, encoding: str = "utf-8") -> str:
    r"""The text of a file of at most `limit` bytes, with \n at the end of every line.

    Raises:
        ValueError: not a regular file, too long, or not UTF-8. OSError: it cannot be read.
    """
    with open_regular(path) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise refusal(path, f"expected at most {limit} bytes, got more")
    try:
        return io.TextIOWrapper(io.BytesIO(raw), encoding).read()
    except UnicodeDecodeError as error:
        raise refusal(path, f"not UTF-8: {error}") from error


def read_image(path: Where) -> Any:
    """A file's first picture as a PIL image in RGB.

    Raises:
        ValueError: not an image of a format that holds pixels only, damaged, or of more than `MAX_PIXELS`. OSError: it cannot
            be opened.
    """
    with open_regular(path) as raw:
        return decoded_image(raw, path)


def in_rgb(image: Any) -> Any:
    """A PIL image in RGB; of 16 bits grey the upper 8, as PIL itself does for colours of 16 bits.

    Raises:
        ValueError: its numbers have no known range. Others of PIL's, for a damaged file.
    """
    if image.mode.startswith("I;16"):  # PIL would take 256 and more for white
        import numpy as np  # not before: commands that read no picture start without it
        from PIL import Image

        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits a channel, got mode {image.mode}, whose numbers have no known range")
    return image.convert("RGB")


def decoded_image(
    raw: BinaryIO, where: Where, limit: int = MAX_PIXELS, formats: tuple[str, ...] = _IMAGE_FORMATS
) -> Any:
    """The first picture of an open file as a PIL image in RGB.

    Args:
        where: its name, for messages.
        limit: pixels. A picture of more is refused before it is decoded.
        formats: PIL's names of those that are read.

    Raises:
        ValueError: not an image of these formats, damaged, or of more pixels.
    """
    with extra("showo2"):
        from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(raw, formats=formats) as image:
            width, height = image.size
            if width * height <= limit:
                return in_rgb(image)
    except UnidentifiedImageError as error:
        raise refusal(where, "not an image") from error
    except Exception as error:  # damaged files end in errors of all kinds, also of zlib and struct
        raise refusal(where, f"not a whole image: {error}") from error
    raise refusal(where, f"expected an image of at most {limit} pixels, got {width} x {height}")


# ---- JSON


def read_json(path: Where, limit: int = MAX_JSON_BYTES) -> Any:
    """What a JSON file holds, read as by `read_text` and `strict_json`."""
    return strict_json(read_text(path, limit), path, limit)


def strict_json(text: str, where: Where, limit: int = MAX_JSON_BYTES) -> Any:
    """`json.loads` that refuses repeated keys, numbers that are not finite or too long, deep nesting and long texts.

    Raises:
        ValueError: beginning with `where`. TypeError: `text` is not a string.
    """
    if not isinstance(text, str):
        raise TypeError(f"{printable(os.fspath(where))}: expected a string of JSON, got {type(text).__name__}")
    if len(text) > limit:
        raise refusal(where, f"expected at most {limit} characters of JSON, got {len(text)}")
    try:
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_int, parse_float=_float)
        _check_depth(data)
    except json.JSONDecodeError as error:
        raise refusal(where, f"not valid JSON: {error}") from error
    except RecursionError as error:
        raise refusal(where, "not valid JSON here: nested too deeply") from error
    except ValueError as error:
        raise refusal(where, error) from error
    return data


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(items)
    if len(result) < len(items):
        seen: set[str] = set()
        twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(twice)} appears twice")
    return result


def _constant(token: str) -> None:
    raise ValueError(f"{token} is not allowed")


def _int(token: str) -> int:
    if len(token) > MAX_DIGITS:
        raise ValueError(f"expected numbers of at most {MAX_DIGITS} digits, got one of {len(token)}")
    return int(token)


def _float(token: str) -> float:
    value = float(token)
    if not math.isfinite(value):
        raise ValueError(f"expected finite numbers, got {shown(token)}")
    return value


def _check_depth(data: Any) -> None:
    level: list[Any] = [[data]]
    for _ in range(MAX_DEPTH + 1):
        children = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return
    raise ValueError(f"expected at most {MAX_DEPTH} lists and objects within each other, got more")


def exists(path: Path) -> bool:
    """Whether something of any kind is there; False for a name that no file can have."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True
