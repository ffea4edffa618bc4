"""What the compiler made of the CUDA kernels: registers, stack, spills, and the instructions that count.

Reads the built library with cuobjdump (of the CUDA toolkit, or the one in the triton package); no GPU is needed. With
`--ptxas` it reads what other versions of ptxas make of our sources instead (`make sass`).
Fails where a kernel spills or uses a stack, where an Ampere product has no HMMA, and where a Hopper product has no HGMMA or
UTMALDG, waits for every HGMMA, does not move registers between warpgroups, or may find its swizzled boxes misaligned.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click

from ..ops import native
from .ptxas import compiled

__all__ = ["Kernel", "find_cuobjdump", "inspect", "problems"]

# Tensor cores of Hopper and of Ampere, TMA loads and stores, cp.async, 16-byte loads and stores, local memory, setmaxnreg,
# fences of the whole device, arrivals at the barrier of a cluster.
INSTRUCTIONS = (
    *("HGMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDG.128", "STG.128", "LDL", "STL", "USETMAXREG"),
    *("MEMBAR.GPU", "UCGABAR_ARV"),
)

# gemm_sm90 is launched with three warpgroups of so many registers a thread; setmaxnreg then gives one of them 40 and two
# 232, exactly as many together. With fewer the two would wait for ever, and a block has no more.
SM90_REGISTERS = 168
# 128-byte swizzled boxes begin at multiples of this.
SWIZZLE_BYTES = 1024
# Of the products, those after which all are waited for: the last of a tile, which compilers copy at most twice.
MOST_WAITS = 1 / 4


@dataclass
class Kernel:
    """One kernel for one architecture.

    Attributes:
        counts: by instruction, of INSTRUCTIONS.
        waits: products (HGMMA) after which the next wait is for all of them.
        dynamic: offset of dynamic shared memory, and what its base is aligned to.
    """

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    instructions: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    waits: int = 0
    dynamic: tuple[int, int] = (0, 1)


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
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(
            [cuobjdump, "--extract-elf", "all", str(library.resolve())], cwd=directory, check=True, capture_output=True
        )
        kernels = [entry for cubin in sorted(Path(directory).iterdir()) for entry in inspect_cubin(cubin, cuobjdump)]
    if not kernels:
        raise ValueError(f"{library}: cuobjdump found no CUDA kernels; was it built with FLASHU_CUDA=1?")
    return sorted(kernels, key=lambda entry: (entry.arch, entry.name))


def inspect_cubin(cubin: Path, cuobjdump: str) -> list[Kernel]:
    """All kernels of one cubin."""
    kernels: dict[str, Kernel] = {}
    name = ""
    for line in _run(cuobjdump, "--dump-resource-usage", cubin).splitlines():
        if found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            kernels[name] = Kernel(name, "", numbers["REG"], numbers["STACK"], numbers["LOCAL"], numbers["SHARED"])
    sections = shared_sections(cubin.read_bytes())
    current: Kernel | None = None
    counts: Counter[str] = Counter()
    arch, product = "", False
    for line in _run(cuobjdump, "--dump-sass", cubin).splitlines():
        if found := re.match(r"\s*code for (sm_\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            current, counts, product = kernels[found[1]], Counter(), False
            current.arch, current.counts = arch, counts
            current.dynamic = sections.get(found[1], (0, 1))
        elif current is not None and (
            found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)", line)
        ):
            current.instructions += 1
            counts.update(_counted(found[1]))
            if found[1].startswith("HGMMA"):
                product = True
            elif found[1].startswith("WARPGROUP.DEPBAR"):
                current.waits += product and found[2].endswith(("0x0 ", "0x0"))
                product = False
    for entry, name in zip(kernels.values(), _demangled(list(kernels)), strict=True):
        entry.name = name
        entry.counts = {key: entry.counts.get(key, 0) for key in INSTRUCTIONS}
    return list(kernels.values())


def shared_sections(elf: bytes) -> dict[str, tuple[int, int]]:
    """Size and alignment of every kernel's section of shared memory in a cubin; dynamic shared memory lies behind it."""
    (start,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, start + i * size) for i in range(count)]
    strings = headers[names][4]
    prefix = b".nv.shared."
    found = {}
    for header in headers:
        at = strings + header[0]
        name = elf[at : elf.index(b"\0", at)]
        if name.startswith(prefix):
            found[name.removeprefix(prefix).decode()] = (header[5], header[8])
    return found


def _run(tool: str, option: str, library: Path) -> str:
    return subprocess.run([tool, option, str(library)], check=True, capture_output=True, text=True).stdout


def _counted(instruction: str) -> list[str]:
    parts = instruction.split(".")
    if parts[0] in ("LDG", "STG"):
        return [f"{parts[0]}.128"] if "128" in parts else []
    if parts[0] == "MEMBAR":
        return ["MEMBAR.GPU"] if "GPU" in parts else []
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
            if entry.waits > MOST_WAITS * entry.counts["HGMMA"]:
                found.append(f"{where}: {entry.waits} of {entry.counts['HGMMA']} HGMMA are waited for one by one")
            if entry.registers != SM90_REGISTERS:
                found.append(f"{where}: {entry.registers} registers, setmaxnreg counts on {SM90_REGISTERS}")
            if entry.counts["USETMAXREG"] < 2:
                found.append(f"{where}: setmaxnreg was ignored ({entry.counts['USETMAXREG']} USETMAXREG, expected 2)")
            if entry.counts["MEMBAR.GPU"] > entry.counts["UCGABAR_ARV"]:
                found.append(
                    f"{where}: {entry.counts['MEMBAR.GPU']} fences of the whole device for {entry.counts['UCGABAR_ARV']} "
                    "arrivals at the barrier of a cluster: arrivals at mbarriers have them too"
                )
            offset, alignment = entry.dynamic
            if offset % SWIZZLE_BYTES or alignment % SWIZZLE_BYTES:
                found.append(
                    f"{where}: dynamic shared memory at {offset} of a base aligned to {alignment} bytes, "
                    f"expected multiples of {SWIZZLE_BYTES}"
                )
        if "gemm_sm80" in entry.name and not entry.counts["HMMA"]:
            found.append(f"{where}: no HMMA")
        if "decode_neurons" in entry.name:
            found += [f"{where}: no {name}" for name in ("HMMA", "LDG.128") if not entry.counts[name]]
        if vectors := re.search(r"multiply_few_rows<(\w+), \d, true>", entry.name):
            needed = ("LDG.128",) if vectors[1] == "float" else ("HMMA", "LDG.128")
            found += [f"{where}: no {name}" for name in needed if not entry.counts[name]]
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
    "--ptxas",
    "compilers",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Read what this ptxas makes of our sources instead; needs nvcc. May be repeated.",
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures here."
)
@click.option("--quiet", is_flag=True, help="Print the totals and problems only.")
def main(library: Path | None, compilers: tuple[Path, ...], json_file: Path | None, quiet: bool) -> None:
    """Report what the compiler made of the CUDA kernels; exit 1 where it is not what they are written for."""
    tool = find_cuobjdump()
    if tool is None:
        click.echo("skipped: no cuobjdump on PATH, in /usr/local/cuda/bin, or in a triton package")
        return
    found: dict[str, list[Kernel]] = {}
    bad: list[str] = []
    if compilers:
        with tempfile.TemporaryDirectory() as directory:
            for build in compiled(compilers, Path(directory)):
                found[build.name] = [entry for cubin in build.cubins for entry in inspect_cubin(cubin, tool)]
                bad += [f"{build.name}: {line}" for line in (*build.advisories, *problems(found[build.name]))]
    else:
        found["library"] = inspect(library or native.PACKAGE / "lib" / "libflashu.so", tool)
        bad += problems(found["library"])
    for name, kernels in found.items():
        if not quiet:
            click.echo(table(kernels))
        by_arch = Counter(entry.arch for entry in kernels)
        click.echo(f"{name}: " + ", ".join(f"{arch}: {count} kernels" for arch, count in sorted(by_arch.items())))
    if json_file is not None:
        figures = {name: [asdict(entry) for entry in kernels] for name, kernels in found.items()}
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for line in bad:
        click.echo(line, err=True)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
