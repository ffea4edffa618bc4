"""A copy of the sources in a folder of its own, where faults are planted. What is built there serves the next run too."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ("csrc/", "cpp_tests/", "CMakeLists.txt")  # what the C++ build is made of
LIMIT_S = 600  # a run that takes longer hangs


class NotRun(Exception):
    """Tests could not be run: the message says why."""


@dataclass(frozen=True)
class Attempt:
    """One run of some tests: whether they noticed a fault, and under which conditions they ran."""

    noticed: bool
    how: str


class Copy:
    """The files of the repository as they are in the work tree, in `folder`/source; builds are beside it."""

    def __init__(self, folder: Path, root: Path = ROOT):
        self.folder, self.root, self.source = folder, root, folder / "source"
        self._native = False  # whether a fault is planted that only compiling brings to life

    def refresh(self) -> None:
        """Brings the files up to date. What is the same is not touched, and what changes is new to the build by its time,
        which a time that came along would not be after a run that planted something later."""
        command = ["git", "-C", str(self.root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
        wanted = {self.source / name: self.root / name for name in names if name and (self.root / name).is_file()}
        for path in [path for path in self.source.rglob("*") if path.is_file() and path not in wanted]:
            path.unlink()
        for path, original in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_bytes() != original.read_bytes():
                shutil.copyfile(original, path)

    @contextlib.contextmanager
    def changed(self, file: str, text: str) -> Iterator[None]:
        """The copy with another text in one file, for as long as the context lasts."""
        path = self.source / file
        original = path.read_text()
        path.write_text(text)
        self._native = file.startswith(NATIVE)
        try:
            yield
        finally:
            path.write_text(original)
            self._native = False

    def gtest(self, target: str, tests: str, sanitizer: str, environment: dict[str, str]) -> Attempt:
        """Runs a GoogleTest program by a filter."""
        program = self._build(sanitizer or "plain", [f"-DFLASHU_SANITIZE={sanitizer}"], [target]) / "cpp_tests" / target
        command = [str(program), f"--gtest_filter={tests}", "--gtest_fail_fast", "--gtest_brief=1"]
        sanitizers = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
        code = self._run(command, {**sanitizers, **environment})
        return Attempt(code != 0, environment.get("FLASHU_ISA") or sanitizer or "plain")

    def pytest(self, arguments: Sequence[str]) -> Attempt:
        """Runs pytest in the copy."""
        self._provide_libraries()
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "--tb=no", "--hypothesis-seed=0"]
        # Without bytecode: a fault of equal length, written in the same second, would not be seen beside it.
        code = self._run([*command, *arguments], {"PYTHONPATH": str(self.source), "PYTHONDONTWRITEBYTECODE": "1"})
        if code in (2, 3, 4, 5):
            raise NotRun(f"pytest {' '.join(arguments)} ran no tests (exit code {code})")
        return Attempt(code != 0, "pytest")

    def _provide_libraries(self) -> None:
        """Puts the compiled libraries beside the Python files: the checkout's own, or where a fault is in the C++ sources
        those that are built from them."""
        if self._native:
            pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
            torch = importlib.util.find_spec("torch")
            assert torch is not None and torch.submodule_search_locations is not None
            options = ["-DFLASHU_TORCH=ON", "-DFLASHU_PYTHON=ON", f"-DTORCH_DIR={torch.submodule_search_locations[0]}"]
            options += [f"-Dpybind11_DIR={pybind11}", f"-DPython_EXECUTABLE={sys.executable}"]
            built = list(self._build("torch", options, ["flashu_torch", "_core"]).glob("*.so"))
        else:
            built = list((self.root / "flashu_ext").glob("*.so"))
        for library in built:
            target = self.source / "flashu_ext" / library.name
            target.unlink(missing_ok=True)  # another file, so that a process which has the old one mapped keeps it
            shutil.copyfile(library, target)

    def _build(self, name: str, options: list[str], targets: list[str]) -> Path:
        """Configures the folder `name` once, then builds the targets."""
        binary = self.folder / name.replace(",", "-")
        if not (binary / "build.ninja").is_file():
            configure = ["cmake", "-G", "Ninja", "-S", str(self.source), "-B", str(binary)]
            configure += ["-DFLASHU_TESTS=ON", "-DFLASHU_CUDA=OFF", *options]
            if ccache := shutil.which("ccache"):
                configure.append(f"-DCMAKE_CXX_COMPILER_LAUNCHER={ccache}")
            subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        done = subprocess.run(["cmake", "--build", str(binary), "--target", *targets], capture_output=True, text=True)
        if done.returncode != 0:
            raise NotRun(f"does not compile:\n{done.stdout[-2000:]}")
        return binary

    def _run(self, command: list[str], environment: dict[str, str]) -> int:
        """The exit code of a command in the copy; 124 for one that hangs."""
        try:
            variables = {**os.environ, **environment}
            done = subprocess.run(command, cwd=self.source, env=variables, capture_output=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return 124
        return done.returncode
