"""What a shared library needs of the system, of torch and of Python, by its symbols. Reads them with objdump."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

__all__ = ["NEWEST", "foreign", "needed", "not_stable", "of_python", "search_paths", "symbols", "too_new"]

NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
"""manylinux_2_28, and GCC's runtime as the Hugging Face hub's requirements have it."""
# glibc's and GCC's, which manylinux_2_28 lets a wheel need, and torch's.
LIBRARIES = re.compile(
    r"lib(torch|torch_cpu|c|m|dl|rt|pthread|gcc_s)\.so[.\d]*|libstdc\+\+\.so\.6|ld-linux-[\w-]+\.so\.\d"
)
OF_TORCH = re.compile(r"(aoti_torch|torch)_\w+")
OF_PYTHON = re.compile(r"_?Py[A-Z_]")
OURS = re.compile(r"flashu_\w+|_ZNK?6flashu\w+")


def symbols(library: Path) -> str:
    """The table of dynamic symbols, as `objdump -T` prints it."""
    return _objdump("-T", library)


def needed(library: Path) -> list[str]:
    """The libraries that it names as needed."""
    return re.findall(r"NEEDED +(\S+)", _objdump("-p", library))


def search_paths(library: Path) -> list[str]:
    """Where it lets the loader look for them."""
    return [
        path for line in re.findall(r"(?:RPATH|RUNPATH) +(\S+)", _objdump("-p", library)) for path in line.split(":")
    ]


def undefined(table: str, weak: bool = True) -> list[tuple[str, str, str]]:
    """(kind of version, its number, name) of what is missing in a table; the first two are empty where there is no version.

    weak: also what need not be found.
    """
    rows = re.findall(
        r"^[0-9a-f]+ (.{7}) \*UND\*\s+[0-9a-f]+\s+(?:\(?([A-Za-z]\w*?)(?:_([\d.]+))?\)?\s+)?(\S+)$", table, re.MULTILINE
    )
    return [(kind if number else "", number, name) for flags, kind, number, name in rows if weak or "w" not in flags]


def too_new(table: str) -> list[str]:
    """What is newer than manylinux_2_28 in a table of symbols, version by version."""
    found: dict[str, list[str]] = {}
    for kind, number, name in undefined(table):
        if number and tuple(map(int, number.split("."))) > NEWEST.get(kind, (sys.maxsize,)):
            found.setdefault(f"{kind}_{number}", []).append(name)
    return [f"{version} for {', '.join(found[version])}" for version in sorted(found)]


def of_python(table: str) -> list[str]:
    """Symbols of CPython that are missing in a table."""
    return [name for _, _, name in undefined(table) if OF_PYTHON.match(name)]


def not_stable(table: str) -> list[str]:
    """What is missing in a table and promised by nobody: without a version, neither of torch's stable ABI nor ours."""
    return [
        name
        for _, number, name in undefined(table, weak=False)
        if not number and not OF_TORCH.fullmatch(name) and not OURS.fullmatch(name) and not OF_PYTHON.match(name)
    ]


def foreign(names: list[str], own: tuple[str, ...] = ()) -> list[str]:
    """Needed libraries that are neither the system's nor torch's nor `own`."""
    return [name for name in names if name not in own and not LIBRARIES.fullmatch(name)]


def _objdump(option: str, library: Path) -> str:
    return subprocess.run(["objdump", option, library], check=True, capture_output=True, text=True).stdout
