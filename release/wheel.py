"""Checks a wheel: name, size, contents, its record of them, what its libraries need, and its metadata.

    python -m release.wheel dist/*.whl

Prints what is wrong and exits with 1. The metadata is read by the library with which PyPI reads it. auditwheel has
looked at the libraries before, when it gave the platform tag.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path, PurePosixPath

from packaging.metadata import Metadata

from . import symbols

__all__ = ["LARGEST", "TAG", "check"]

LARGEST = 8_000_000
"""Bytes of a wheel."""
TAG = "py3-none-manylinux_2_28_x86_64"
WEIGHTS = "flashu_ext_nano"
LIBRARIES = {"flashu_ext/libflashu_torch.so": ["$ORIGIN/lib"], "flashu_ext/lib/libflashu.so": []}
"""Of flashu_ext, with where they may look for others."""
WANTED = {
    "flashu_ext": (
        *LIBRARIES,
        "flashu_ext/__init__.py",
        "flashu_ext/py.typed",
        "flashu_ext/include/flashu/flashu.h",
        "flashu_ext/lib/cmake/flashu/flashuConfig.cmake",
        "flashu_ext/lib/pkgconfig/flashu.pc",
        "flashu_ext/nano/data/config.json",
        "flashu_ext/nano/data/model.safetensors",
        "flashu_ext/nano/data/plan.safetensors",
        "flashu_ext/nano/data/tokenizer.json",
        "flashu_ext/planning/tuned.json",
    ),
    WEIGHTS: tuple(
        f"{WEIGHTS}/{family}/{name}"
        for family in ("bagel", "janusflow")
        for name in ("config.json", "model.safetensors", "plan.safetensors")
    ),
}
# Folders of the source and of builds, and what only builds write.
UNWANTED = re.compile(
    r"(^|/)(tests?|python_tests|cpp_tests|build|csrc|\.\w[^/]*|__pycache__)/|\.(pyc|o|a|whl|orig|tmp)$"
)
# A folder of the machine that built it. What follows the first name tells them from text that begins with a slash.
ABSOLUTE = re.compile(rb"/(?:root|home|tmp|work|build|github|opt/python)/[\w.+-]+[\w./+-]*")
CUDA_CODE = b".nv_fatbin\0"


class Wheel:
    """A wheel's name and files."""

    def __init__(self, path: Path):
        self.path = path
        parts = path.stem.split("-")
        if path.suffix != ".whl" or len(parts) != 5:
            raise ValueError(f"{path}: expected NAME-VERSION-PYTHON-ABI-PLATFORM.whl")
        if parts[0] not in WANTED:
            raise ValueError(f"{path}: expected a wheel of {' or '.join(WANTED)}, got one of {parts[0]}")
        self.name, self.version, self.tag = parts[0], parts[1], "-".join(parts[2:])
        try:
            with zipfile.ZipFile(path) as archive:
                members = [info for info in archive.infolist() if not info.is_dir()]
                self.files = {info.filename: archive.read(info) for info in members}
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{path}: expected a whole zip archive, got one that cannot be read: {error}") from error
        names = sorted(info.filename for info in members)
        self.twice = sorted({one for one, other in pairwise(names) if one == other})
        self.info = f"{self.name}-{self.version}.dist-info"

    @property
    def cpu_only(self) -> bool:
        """Built without CUDA kernels, by its version."""
        return self.version.endswith("+cpu")

    @property
    def tags(self) -> list[str]:
        """Of its file WHEEL."""
        return re.findall(
            r"^Tag: (\S+)$", self.files.get(f"{self.info}/WHEEL", b"").decode(errors="replace"), re.MULTILINE
        )


def name_of(wheel: Wheel) -> Iterator[str]:
    """One tag, that of every Python and of manylinux_2_28; pure wheels are of any platform."""
    expected = "py3-none-any" if wheel.name == WEIGHTS else TAG
    if wheel.tag != expected:
        yield f"name: expected the tag {expected}, got {wheel.tag}"
    if (tags := wheel.tags) != [expected]:
        yield f"WHEEL: expected the tag {expected}, got {', '.join(tags) or 'none'}"


def size(wheel: Wheel) -> Iterator[str]:
    """Of the file."""
    if (size := wheel.path.stat().st_size) > LARGEST:
        largest = sorted(wheel.files, key=lambda name: -len(wheel.files[name]))[:3]
        yield f"size: expected at most {LARGEST:,} bytes, got {size:,} (the largest files: {', '.join(largest)})"


def contents(wheel: Wheel) -> Iterator[str]:
    """All that is needed, nothing that is not, and no folder of the machine that built it."""
    for name in WANTED.get(wheel.name, ()):
        if name not in wheel.files:
            yield f"contents: {name} is missing"
    for name, data in wheel.files.items():
        parts = PurePosixPath(name).parts
        if not parts or parts[0] not in (wheel.name, wheel.info) or ".." in parts or "\\" in name:
            yield f"contents: expected files of {wheel.name} only, got {name}"
        elif UNWANTED.search(name):
            yield f"contents: {name} is none of a package's files"
        if name.endswith(".so") or b"\0" not in data[:4096]:
            # Pages may show a path of an example.
            if (
                (found := ABSOLUTE.search(data))
                and not name.startswith(wheel.info)
                and not name.endswith((".md", ".py"))
            ):
                yield f"contents: {name} has a path of the machine that built it: {found[0].decode()}"
    libraries = {name for name in wheel.files if re.search(r"\.so(\.\d+)*$", name)}
    known = set(LIBRARIES) if wheel.name == "flashu_ext" else set()
    if unknown := libraries - known:
        yield f"contents: expected no other library, got {', '.join(sorted(unknown))}"


def record(wheel: Wheel) -> Iterator[str]:
    """RECORD names every other file once, with its digest and size: what was changed after the build differs."""
    own = f"{wheel.info}/RECORD"
    for name in wheel.twice:
        yield f"RECORD: expected one file of a name, got several {name}"
    rows = [row for row in csv.reader(wheel.files.get(own, b"").decode(errors="replace").splitlines()) if row]
    recorded = {row[0]: row[1:] for row in rows}
    for name in sorted(wheel.files.keys() | recorded.keys()):
        if name not in recorded or name not in wheel.files:
            yield f"RECORD: {name} is {'not in it' if name not in recorded else 'in it and not in the wheel'}"
        elif name != own:
            data = wheel.files[name]
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            if recorded[name] != [f"sha256={digest}", str(len(data))]:
                yield f"RECORD: {name} is another file than the one it was made of"


def licence(wheel: Wheel) -> Iterator[str]:
    """Its text; the metadata has its name."""
    if not wheel.files.get(f"{wheel.info}/licenses/LICENSE", b"").strip():
        yield f"licence: {wheel.info}/licenses/LICENSE is missing"


def cuda(wheel: Wheel) -> Iterator[str]:
    """Whether it has CUDA kernels is what its version says."""
    library = wheel.files.get("flashu_ext/lib/libflashu.so", b"")
    if wheel.name == "flashu_ext" and (CUDA_CODE in library) == wheel.cpu_only:
        yield f"CUDA kernels: expected {'none' if wheel.cpu_only else 'some'} in a wheel of version {wheel.version}"


def abi(wheel: Wheel) -> Iterator[str]:
    """What the libraries need: of torch the stable ABI, of Python nothing, of the system what manylinux_2_28 has."""
    newest = ", ".join(f"{kind} {'.'.join(map(str, number))}" for kind, number in symbols.NEWEST.items())
    with tempfile.TemporaryDirectory() as folder:
        for name, paths in LIBRARIES.items():
            if name not in wheel.files:
                continue
            library = Path(folder) / Path(name).name
            library.write_bytes(wheel.files[name])
            try:
                table = symbols.symbols(library)
            except subprocess.CalledProcessError as error:
                yield f"{name}: expected a shared library, which objdump does not read: {error.stderr.strip()}"
                continue
            if wrong := symbols.too_new(table):
                yield f"{name}: expected at most {newest}, needs {'; '.join(wrong)}"
            if wrong := symbols.of_python(table):
                yield f"{name}: expected no symbol of CPython, needs {', '.join(wrong[:5])}"
            if wrong := symbols.not_stable(table):
                yield f"{name}: expected symbols of torch's stable ABI only, needs {', '.join(wrong[:5])}"
            of_torch = () if name.endswith("torch.so") else ("libtorch.so", "libtorch_cpu.so")
            needed = symbols.needed(library)
            own = ("libflashu.so",) if name.endswith("torch.so") else ()
            if wrong := [*symbols.foreign(needed, own), *(each for each in needed if each in of_torch)]:
                yield f"{name}: expected to need the system's libraries{' and torch' * bool(own)} only, needs {', '.join(wrong)}"
            if (found := symbols.search_paths(library)) != paths:
                yield f"{name}: expected to look for libraries in {paths or 'no folder of its own'}, got {found or 'none'}"


def metadata(wheel: Wheel) -> Iterator[str]:
    """As an index reads it (by the library that PyPI checks it with), and what ours says."""
    try:
        found = Metadata.from_email(wheel.files.get(f"{wheel.info}/METADATA", b""), validate=True)
    except ExceptionGroup as errors:
        yield f"metadata: {'; '.join(str(error) for error in errors.exceptions)}"
        return
    for field, got, expected in (
        ("Name", found.name, wheel.name),
        ("Version", str(found.version), wheel.version),
        ("License-Expression", found.license_expression, "Apache-2.0"),
        ("License-File", found.license_files, ["LICENSE"]),
        ("Requires-Python", str(found.requires_python), ">=3.11"),
        ("Description-Content-Type", found.description_content_type, "text/markdown"),
    ):
        if got != expected:
            yield f"metadata: {field}: expected {expected}, got {got}"
    if re.search(r"\]\((?!https?:)", found.description or ""):
        yield "metadata: the description has links to files, which an index page does not have"


CHECKS: tuple[Callable[[Wheel], Iterator[str]], ...] = (name_of, size, contents, record, licence, cuda, abi, metadata)


def check(path: Path) -> list[str]:
    """What is wrong with a wheel; empty if nothing is.

    Raises:
        ValueError: it is not named as a wheel of ours, or no whole zip archive. OSError: it cannot be read.
    """
    wheel = Wheel(path)
    return [problem for each in CHECKS for problem in each(wheel)]


def main(paths: list[Path]) -> int:
    """Check wheels; 1 if something is wrong with one of them."""
    wrong = False
    for path in paths:
        try:
            problems = check(path)
        except (ValueError, OSError) as error:
            print(error)
            wrong = True
            continue
        wrong |= bool(problems)
        print(f"{path.name}: {path.stat().st_size:,} bytes, {'; '.join(problems) or 'as it should be'}")
    return int(wrong)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: python -m release.wheel WHEEL... (checks: {', '.join(each.__name__ for each in CHECKS)})")
    sys.exit(main([Path(argument) for argument in sys.argv[1:]]))
