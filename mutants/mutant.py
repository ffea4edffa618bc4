"""A planted fault, and the kinds of tests that must notice it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from .copy import Attempt, Copy

ISAS = ("avx512_bf16", "avx512", "avx2", "baseline")
SEEDS = 6  # random schedules of the emulator's threads


class Tests(Protocol):
    """A selection of tests. Equal selections run on the unchanged sources only once."""

    def attempts(self, copy: Copy) -> Iterator[Attempt]:
        """Builds and runs the tests, one attempt at a time; the caller stops at the first that fails."""


@dataclass(frozen=True)
class Mutant:
    """`old`, which is in `file` exactly once, is replaced by `new`; `tests` must then fail.

    Attributes:
        file: relative to the repository.
        quick: CI plants it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: Tests
    quick: bool = False

    def planted(self, text: str) -> str:
        """The file's text with the fault.

        Raises:
            LookupError: `old` is not there exactly once.
        """
        if (count := text.count(self.old)) != 1:
            raise LookupError(f"{self.name}: its text is in {self.file} {count} times, expected once")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Pytest:
    """Python tests, by pytest's arguments: `Pytest("python_tests/ops/test_ffn.py", "-k", "chunk")`."""

    arguments: tuple[str, ...]

    def __init__(self, *arguments: str):
        object.__setattr__(self, "arguments", arguments)

    def attempts(self, copy: Copy) -> Iterator[Attempt]:
        yield copy.pytest(self.arguments)


@dataclass(frozen=True)
class Cpp:
    """Tests of the C++ library on the CPU by a GoogleTest filter, with every instruction set of the machine."""

    filter: str

    def attempts(self, copy: Copy) -> Iterator[Attempt]:
        for isa in ISAS:
            yield copy.gtest("flashu_tests", self.filter, "", {"FLASHU_ISA": isa})


@dataclass(frozen=True)
class Emulated:
    """Tests of the CUDA kernels on the emulator by a GoogleTest filter, with one sanitizer after the other."""

    filter: str
    sanitizers: tuple[str, ...] = ("", "address,undefined")

    def attempts(self, copy: Copy) -> Iterator[Attempt]:
        for sanitizer in self.sanitizers:
            yield copy.gtest("flashu_emulated_tests", self.filter, sanitizer, {"FLASHU_SIMT_SEEDS": str(SEEDS)})


@dataclass(frozen=True)
class Ptx:
    """Device tests on the machine for nvcc's PTX by a GoogleTest filter, with asynchronous work done at random and late.
    Needs nvcc. capability: 90 or 80."""

    filter: str
    capability: int = 90

    def attempts(self, copy: Copy) -> Iterator[Attempt]:
        for when, seed in (("random", 0), ("late", 1), ("random", 2)):
            environment = {
                "FLASHU_PTX_CAPABILITY": str(self.capability),
                "FLASHU_PTX_WHEN": when,
                "FLASHU_PTX_SEED": str(seed),
            }
            environment |= {"FLASHU_PTX_SMS": "3", "OMP_NUM_THREADS": "1"}
            yield copy.gtest("ptx/flashu_ptx_tests", self.filter, "", environment, cuda=True)
