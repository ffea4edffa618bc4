"""Runs CUDA programs of others on the machine for PTX and compares what they print with what is expected.

    python cpp_tests/ptx/others.py FOLDER --machine build/.../cpp_tests/ptx/libflashu_ptx.a

FOLDER/cases.toml lists the programs, which stay outside the repository:

    [[case]]
    name = "gemm with TMA"
    sources = ["gemm.cu"]              # in FOLDER; whole programs, with main()
    flags = ["-Iinclude"]              # of nvcc, run in FOLDER
    arch = "90a"                       # "90a" where it is not given
    arguments = ["512"]
    environment = {FLASHU_PTX_PROXY = "0"}
    expected = "expected/gemm.txt"     # all that it prints; or
    prints = "errors: 0"               # a regular expression that is found in it
    timeout = 300                      # seconds

Exit code 1: a program does not compile, fails or prints something else. Needs nvcc and g++.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """A program and what it must print: `expected`, a file with all of it, or `prints`, a regular expression."""

    name: str
    sources: list[str]
    flags: list[str] = field(default_factory=list)
    arch: str = "90a"
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    expected: str = ""
    prints: str = ""
    timeout: float = 300

    def __post_init__(self) -> None:
        if bool(self.expected) == bool(self.prints):
            raise ValueError(f"{self.name}: expected one of 'expected' and 'prints'")

    def run(self, folder: Path, machine: Path, out: Path) -> str:
        """Compiles and runs it; returns "" or what is wrong."""
        program = out / "program"
        code = f"arch=compute_{self.arch},code=compute_{self.arch}"
        command = [
            "nvcc",
            "-std=c++20",
            "-O2",
            "-lineinfo",
            "-cudart",
            "none",
            "--no-compress",
            "-gencode",
            code,
            *self.flags,
        ]
        command += [*self.sources, str(machine), "-o", str(program)]
        compiled = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if compiled.returncode != 0:
            return f"does not compile: {compiled.stderr.strip()[-2000:]}"
        try:
            ran = subprocess.run(
                [str(program), *self.arguments],
                cwd=folder,
                env={**os.environ, **self.environment},
                capture_output=True,
                text=True,
                timeout=self.timeout,
            )
        except subprocess.TimeoutExpired:
            return f"does not end within {self.timeout} s"
        said = [line for line in ran.stderr.splitlines() if line.startswith("ptx:")]
        if ran.returncode != 0:
            return f"exit code {ran.returncode}: {(said or [ran.stderr.strip()[-500:]])[0]}"
        if self.expected:
            right = ran.stdout == (folder / self.expected).read_text()
        else:
            right = re.search(self.prints, ran.stdout) is not None
        return "" if right else f"prints something else: {ran.stdout[-500:]!r} {said[:1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--machine", type=Path, required=True, help="libflashu_ptx.a of a build")
    parser.add_argument("--only", default="", help="part of a case's name")
    arguments = parser.parse_args()
    cases = [Case(**case) for case in tomllib.loads((arguments.folder / "cases.toml").read_text())["case"]]
    cases = [case for case in cases if arguments.only in case.name]
    failed = 0
    for case in cases:
        with tempfile.TemporaryDirectory() as out:
            wrong = case.run(arguments.folder, arguments.machine.resolve(), Path(out))
        failed += bool(wrong)
        print(f"{case.name}: {wrong or 'as expected'}", flush=True)
    print(f"{len(cases) - failed} of {len(cases)} as expected")
    return 1 if failed or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
