"""Faults in the CPU kernels and in what lies around them: csrc/core, csrc/cpu and csrc/api."""

from __future__ import annotations

from ..mutant import Cpp, Mutant

FFN = Cpp("*Ffn*")

MUTANTS = [
    Mutant("ffn: the residual of the first chunk in all of them", "csrc/cpu/ffn.cpp",
           "row_of(p.residual, first_row, p.type) + first * size;", "row_of(p.residual, 0, p.type) + first * size;", FFN),
]  # fmt: skip
