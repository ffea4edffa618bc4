"""What the compiler made of the CUDA kernels: registers, stack, spills, and the instructions that count.

Reads the built library with cuobjdump (of the CUDA toolkit, or the one in the triton package); no GPU is needed.
Fails where a kernel spills or uses a stack, where a Hopper product has no HGMMA or no UTMALDG, or where an Ampere product
has no HMMA or no LDGSTS.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click

from ..ops import native

__all__ = ["Kernel", "find_cuobjdump", "inspect", "problems"]

# Tensor cores of Hopper and of Ampere, TMA loads and stores, cp.async, 16-byte loads and stores, local memory.
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDG.128", "STG.128", "LDL", "STL")


@dataclass
class Kernel:
    """One kernel for one architecture. `counts` by instruction, of INSTRUCTIONS."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    instructions: int = 0
    counts: dict[str, int] = field(default_factory=dict)


def find_cuobjdump() -> str | None:
    """cuobjdump on PATH, in /usr/local/cuda, or inside the triton package; None where there is none."""
    for place in (shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"):
        if place and Path(place).is_file():
            return place
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.submodule_search_locations:
        inside = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if inside.is_file():
            return str(inside)
    return None


def inspect(library: Path, cuobjdump: str) -> list[Kernel]:
    """All kernels in a library.

    Raises:
        ValueError: cuobjdump found no kernels there.
    """
    kernels: dict[tuple[str, str], Kernel] = {}

    def kernel(arch: str, name: str) -> Kernel:
        return kernels.setdefault((arch, name), Kernel(name, arch))

    arch = ""
    for line in _run(cuobjdump, "--dump-resource-usage", library).splitlines():
        if found := re.match(r"\s*arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            entry = kernel(arch, name)
            entry.registers, entry.stack = numbers["REG"], numbers["STACK"]
            entry.local, entry.shared = numbers["LOCAL"], numbers["SHARED"]
    current: Kernel | None = None
    counts: Counter[str] = Counter()
    for line in _run(cuobjdump, "--dump-sass", library).splitlines():
        if found := re.match(r"\s*arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            current = kernel(arch, found[1])
            counts = Counter()
            current.counts = counts
        elif current is not None and (found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)):
            current.instructions += 1
            for name in _counted(found[1]):
                counts[name] += 1
    if not kernels:
        raise ValueError(f"{library}: cuobjdump found no CUDA kernels; was it built with FLASHU_CUDA=1?")
    names = _demangled([entry.name for entry in kernels.values()])
    for entry, name in zip(kernels.values(), names, strict=True):
        entry.name = name
        entry.counts = {key: entry.counts.get(key, 0) for key in INSTRUCTIONS}
    return sorted(kernels.values(), key=lambda entry: (entry.arch, entry.name))


def _run(tool: str, option: str, library: Path) -> str:
    return subprocess.run([tool, option, str(library)], check=True, capture_output=True, text=True).stdout


def _counted(instruction: str) -> list[str]:
    parts = instruction.split(".")
    if parts[0] in ("LDG", "STG"):
        return [f"{parts[0]}.128"] if "128" in parts else []
    return [parts[0]] if parts[0] in INSTRUCTIONS else []


def _demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    text = subprocess.run([tool], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    prefix, arguments = r"flashu::(cuda::)?(\(anonymous namespace\)::)?", r"\(.*\)$"
    return [re.sub(arguments, "", re.sub(prefix, "", line)) for line in text.splitlines()]


def problems(kernels: list[Kernel]) -> list[str]:
    """What must not be, as sentences."""
    found = []
    for entry in kernels:
        where = f"{entry.arch} {entry.name}"
        if entry.stack or entry.local or entry.counts["LDL"] or entry.counts["STL"]:
            found.append(f"{where}: uses local memory (stack {entry.stack}, local {entry.local} bytes)")
        if "gemm_sm90" in entry.name:
            found += [f"{where}: no {name}" for name in ("HGMMA", "UTMALDG", "UTMASTG") if not entry.counts[name]]
        if "gemm_sm80" in entry.name and not entry.counts["HMMA"]:
            found.append(f"{where}: no HMMA")
        if "decode_neurons" in entry.name:
            found += [f"{where}: no {name}" for name in ("HMMA", "LDG.128") if not entry.counts[name]]
        if ("norm_vectors" in entry.name or "rotary_vectors" in entry.name) and not entry.counts["LDG.128"]:
            found.append(f"{where}: no 16-byte loads")
    return found


def table(kernels: list[Kernel]) -> str:
    """One line a kernel."""
    header = ("arch", "kernel", "regs", "stack", "shared", "instr", *INSTRUCTIONS)
    rows: list[tuple[str, ...]] = [header]
    for entry in kernels:
        numbers = (entry.registers, entry.stack, entry.shared, entry.instructions, *entry.counts.values())
        rows.append((entry.arch, entry.name[:88], *(str(n) for n in numbers)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


@click.command(epilog="Example: python -m flashu_ext.bench.sass --json sass.json")
@click.option(
    "--library",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="Library to read (default: the package's own).",
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures here."
)
@click.option("--quiet", is_flag=True, help="Print the totals and problems only.")
def main(library: Path | None, json_file: Path | None, quiet: bool) -> None:
    """Report what the compiler made of the CUDA kernels; exit 1 where it is not what they are written for."""
    tool = find_cuobjdump()
    if tool is None:
        click.echo("skipped: no cuobjdump on PATH, in /usr/local/cuda/bin, or in a triton package")
        return
    kernels = inspect(library or native.LIBRARY, tool)
    if not quiet:
        click.echo(table(kernels))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(entry) for entry in kernels], indent=1) + "\n", encoding="utf-8")
    by_arch = Counter(entry.arch for entry in kernels)
    click.echo(", ".join(f"{arch}: {count} kernels" for arch, count in sorted(by_arch.items())))
    bad = problems(kernels)
    for line in bad:
        click.echo(line, err=True)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
