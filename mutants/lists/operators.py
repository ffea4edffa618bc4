"""Faults between torch and the kernels: csrc/torch and flashu_ext/ops."""

from __future__ import annotations

from ..mutant import Mutant, Pytest

ROUTING = Pytest("python_tests/ops/test_routing.py")

MUTANTS = [
    Mutant("fake: `last` has the shape of `none`", "flashu_ext/ops/routing.py", "(1, x_in.dim(), 2)[reduce]", "(1, x_in.dim(), 1)[reduce]", ROUTING),
]  # fmt: skip
