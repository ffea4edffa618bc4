"""Runs drivers of upstream programs in interpreters with the versions that these pin: `make upstream-env` prepares them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

__all__ = ["BAGEL", "JANUS", "ROOT", "SHOWO2", "Program"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Program:
    """A program whose checkout the environment names in `{name}_UPSTREAM`, and an interpreter in `{name}_PYTHON`."""

    name: str
    called: str
    pins: str
    """The checkout's file that says which transformers it needs."""

    @property
    def missing(self) -> pytest.MarkDecorator:
        variable = f"{self.name}_UPSTREAM"
        return pytest.mark.skipif(not os.environ.get(variable), reason=f"{variable} names no checkout of {self.called}")

    def interpreter(self) -> str:
        prepared = ROOT / f".venv-{self.name.lower()}" / "bin" / "python"
        return os.environ.get(f"{self.name}_PYTHON") or (str(prepared) if prepared.is_file() else sys.executable)

    def pinned(self, checkout: Path) -> str:
        """The version of transformers that a checkout asks for, or the oldest."""
        match = re.search(r"transformers[=>]=([\w.]+)", (checkout / self.pins).read_text(encoding="utf-8"))
        assert match is not None, f"{checkout / self.pins} pins no transformers"
        return match[1]

    def run(self, driver: Path, out: Path, *arguments: str) -> dict[str, Any]:
        """What a driver has written to facts.json; called with the checkout, the arguments and the folder `out`."""
        checkout = Path(os.environ[f"{self.name}_UPSTREAM"]).resolve()
        python = self.interpreter()
        ask = [python, "-c", "from importlib.metadata import version; print(version('transformers'))"]
        found = subprocess.run(ask, capture_output=True, text=True, timeout=60).stdout.strip()
        if found != self.pinned(checkout):
            pytest.fail(
                f"{python} has transformers {found or 'not at all'}, upstream pins {self.pinned(checkout)}: "
                f"`make upstream-env` prepares .venv-{self.name.lower()}, or name an interpreter in {self.name}_PYTHON"
            )
        command = [python, str(driver), str(checkout), *arguments, str(out)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        facts: dict[str, Any] = json.loads((out / "facts.json").read_text(encoding="utf-8"))
        return facts


SHOWO2 = Program("SHOWO2", "Show-o2 (its show-o2 folder)", "build_env.sh")
JANUS = Program("JANUS", "Janus", "requirements.txt")
BAGEL = Program("BAGEL", "BAGEL", "requirements.txt")
