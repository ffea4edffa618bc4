"""Our CUDA sources compiled by several versions of ptxas, with what each says about them. No GPU is needed.

nvcc makes PTX once, and every ptxas makes cubins of it. ptxas takes no PTX that is newer than itself; the sources use no
instruction that PTX 8.5 (CUDA 12.5, the oldest supported) lacks, so for an older ptxas the PTX is said to be of that version.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

__all__ = ["ADVISORIES", "Build", "advisories", "compiled", "find_nvcc"]

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c++20", "-O2", "-DNDEBUG", "--expt-relaxed-constexpr", "-DFLASHU_HAS_CUDA=1", "-DFLASHU_HAS_SM90=1")
OLDEST_PTX = "8.5"
# setmaxnreg ignored; wgmma serialised, for whatever reason. ptxas calls them information, so -Werror does not see them.
ADVISORIES = {7505, 7508, *range(7510, 7521)}


@dataclass(frozen=True)
class Build:
    """What one ptxas made: its name ("ptxas 12.5.82"), the cubins, and the advisories that must not be, as sentences."""

    name: str
    cubins: tuple[Path, ...]
    advisories: tuple[str, ...]


def find_nvcc() -> str | None:
    """nvcc on PATH or in /usr/local/cuda."""
    place = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return place if Path(place).is_file() else None


def compiled(compilers: Sequence[Path], directory: Path) -> Iterator[Build]:
    """A `Build` of all sources for each ptxas, with its files under `directory`.

    Raises:
        RuntimeError: nvcc was not found, or a compiler fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc on PATH or in /usr/local/cuda: it makes the PTX")
    sources = [
        (source, arch)
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        for arch in (("90a",) if source.stem.endswith("_sm90") else ("80", "90a"))
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ptx = list(pool.map(partial(_ptx, nvcc, directory), sources))
        for number, compiler in enumerate(compilers):
            target = directory / str(number)
            target.mkdir()
            results = list(pool.map(partial(_cubin, compiler, target), ptx))
            messages = [line for _, log in results for line in advisories(log)]
            yield Build(f"ptxas {version(compiler)}", tuple(cubin for cubin, _ in results), tuple(messages))


def version(compiler: Path) -> str:
    """12.5.82, of a ptxas or nvcc."""
    found = re.search(r"V(\d+\.\d+\.\d+)", _run(str(compiler), "--version"))
    if found is None:
        raise RuntimeError(f"{compiler}: expected a version like V12.5.82 from --version")
    return found[1]


def advisories(log: str) -> list[str]:
    """The lines of a ptxas's output that hold one of ADVISORIES."""
    return [
        line
        for line in log.splitlines()
        if (found := re.search(r"\(C(\d+)\)", line)) is not None and int(found[1]) in ADVISORIES
    ]


def _ptx(nvcc: str, directory: Path, unit: tuple[Path, str]) -> Path:
    source, arch = unit
    target = directory / f"{source.stem}.sm_{arch}.ptx"
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    code = f"arch=compute_{arch},code=compute_{arch}"
    _run(nvcc, *FLAGS, *include, "-ptx", "-gencode", code, str(source), "-o", str(target))
    return target


def _cubin(compiler: Path, directory: Path, ptx: Path) -> tuple[Path, str]:
    text = ptx.read_text(encoding="utf-8")
    made_by = re.search(r"release (\d+)\.(\d+)", text)
    if made_by is None or _release(version(compiler)) < (int(made_by[1]), int(made_by[2])):
        text = re.sub(r"^\.version .*$", f".version {OLDEST_PTX}", text, count=1, flags=re.MULTILINE)
    own = directory / ptx.name
    own.write_text(text, encoding="utf-8")
    cubin = own.with_suffix(".cubin")
    arch = ptx.stem.split(".")[-1]
    return cubin, _run(str(compiler), "-v", "-warn-spills", f"-arch={arch}", str(own), "-o", str(cubin))


def _release(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stdout.strip()[-2000:]}")
    return done.stdout
