"""Fresh environments of several Pythons and torches, in which the wheels are installed and used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Environment", "environments", "run"]

SMOKE = Path(__file__).with_name("smoke.py")
TESTS = ("pytest", "hypothesis", "expecttest")
# Operators and their consumers in C, without what needs a GPU or reads the checkout's sources.
TESTED = (
    *("python_tests/ops", "python_tests/packaging/test_consumers.py", "--ignore", "python_tests/ops/test_gpu.py"),
    *("-k", "not edges_are_those_of_the_sources"),
)
OLDEST, USUAL, NEWEST = "torch==2.11.0", "torch==2.13.0", "torch"


@dataclass(frozen=True)
class Environment:
    """A Python, by its program, and a requirement for torch: "torch==2.11.0"; "torch" is the newest."""

    python: str
    torch: str

    @classmethod
    def parse(cls, text: str) -> Environment:
        """Of PYTHON=TORCH.

        Raises:
            ValueError: it is something else.
        """
        python, separator, torch = text.partition("=")
        if not separator or not torch.startswith("torch"):
            raise ValueError(f"environment: expected PYTHON=torch or PYTHON=torch==VERSION, got {text!r}")
        return cls(python, torch)

    @property
    def name(self) -> str:
        """Of its folder."""
        return re.sub(r"[^\w.]+", "-", f"{self.python}-{self.torch}").strip("-")


def environments() -> list[Environment]:
    """This Python with the usual torch, and the oldest and the newest under other Pythons where there are some."""
    own = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = [name for name in ("python3.13", "python3.12", "python3.11") if name != own and _starts(name)]
    others = [*found, sys.executable, sys.executable]
    return [Environment(sys.executable, USUAL), Environment(others[0], NEWEST), Environment(others[1], OLDEST)]


def _starts(program: str) -> bool:
    path = shutil.which(program)
    return path is not None and subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0


class Venv:
    """The environment's folder, made once: the next run installs other wheels into it."""

    def __init__(self, environment: Environment, folder: Path):
        self.python = folder / environment.name / "bin" / "python"
        self.home = folder / environment.name
        # No folder of this project is on the path.
        self.variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        made = self.home / "made"
        if not made.is_file():
            shutil.rmtree(self.home, ignore_errors=True)
            self.home.parent.mkdir(parents=True, exist_ok=True)
            self._call([environment.python, "-m", "venv", str(self.home)])
            self.pip("install", environment.torch, *TESTS)
            made.touch()
        elif environment.torch == NEWEST:
            self.pip("install", "--upgrade", NEWEST)

    def pip(self, *arguments: str) -> None:
        """Run pip in it."""
        self._call([str(self.python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments])

    def call(self, *arguments: str, cwd: Path) -> str:
        """What its Python prints."""
        return self._call([str(self.python), *arguments], cwd)

    def _call(self, command: list[str], cwd: Path | None = None) -> str:
        done = subprocess.run(command, cwd=cwd, env=self.variables, capture_output=True, text=True, timeout=3600)
        if done.returncode != 0:
            lines = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
            sys.exit(f"release: {' '.join(command)} failed ({done.returncode}):\n{lines}")
        return done.stdout.strip()


def run(
    environment: Environment, wheels: list[Path], weights: Path, version: str, source: Path, folder: Path
) -> list[str]:
    """Use the wheels in an environment, one after the other; the first one with the newest torch passes the operators' tests too.

    Args:
        wheels: of flashu_ext.
        weights: the wheel of flashu_ext_nano.
        source: the source archive, unpacked; its tests run on the installed package.
        folder: the folder of environments.

    Returns:
        What was done, line by line. Ends the program where something fails.
    """
    venv = Venv(environment, folder)
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    shutil.copyfile(SMOKE, work / SMOKE.name)
    for name in ("python_tests", "examples"):
        shutil.copytree(source / name, work / name)
    python = venv.call("--version", cwd=work)
    said = []
    for number, wheel in enumerate(wheels):
        venv.pip("uninstall", "--yes", "flashu_ext", "flashu_ext_nano")
        venv.pip("install", f"{wheel}[showo2]")
        said.append(f"{python}, {wheel.name}, {venv.call(SMOKE.name, version, 'none', cwd=work)}")
        venv.pip("install", "--no-deps", "--no-index", str(weights))
        venv.call(SMOKE.name, version, "weights", cwd=work)
        if number == 0 and environment.torch == NEWEST:
            venv.call("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTED, cwd=work)
            said.append(f"{python}, {environment.torch}: the operators' tests, and programs in C and C++")
        if number == 0 and environment.torch == NEWEST and "+cpu" not in wheel.name:
            said.append(venv.call("-m", "flashu_ext.bench.sass", "--quiet", cwd=work))
    return said
