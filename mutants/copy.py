"""A copy of the sources in a separate folder, where faults are planted. Its builds are reused by the next run."""

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
NATIVE = ("csrc/", "cpp_tests/", "CMakeLists.txt")  # sources of the C++ build
LIBRARIES = ("libflashu_torch.so", "lib/libflashu.so")  # in the package
LIMIT_S = 600  # longer runs count as hanging


class NotRun(Exception):
    """Tests could not be run: the message says why."""


@dataclass(frozen=True)
class Attempt:
    """One run of tests. noticed: they failed. how: the instruction set, sanitizer or runner."""

    noticed: bool
    how: str


class Copy:
    """A copy of the work tree in `folder`/source; builds are in other folders of `folder`."""

    def __init__(self, folder: Path, root: Path = ROOT):
        self.folder, self.root, self.source = folder, root, folder / "source"
        self._native = False  # whether the planted fault needs a C++ build

    def refresh(self) -> None:
        """Updates the copy. Equal files are not touched; changed files get the current time, not the original's, so that
        the build sees them as newer than a fault planted before."""
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
        """Replaces the text of one file while the context lasts."""
        path = self.source / file
        original = path.read_text()
        path.write_text(text)
        self._native = file.startswith(NATIVE)
        try:
            yield
        finally:
            path.write_text(original)
            self._native = False

    def gtest(
        self, program: str, tests: str, sanitizer: str, environment: dict[str, str], cuda: bool = False
    ) -> Attempt:
        """Runs the tests of a GoogleTest program, a path in the build of cpp_tests, that match a filter. cuda: the program
        needs nvcc."""
        name = "cuda" if cuda else sanitizer or "plain"
        options = [f"-DFLASHU_SANITIZE={sanitizer}", f"-DFLASHU_CUDA={'ON' if cuda else 'OFF'}"]
        program_path = self._build(name, options, [Path(program).name]) / "cpp_tests" / program
        command = [str(program_path), f"--gtest_filter={tests}", "--gtest_fail_fast", "--gtest_brief=1"]
        sanitizers = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
        code = self._run(command, {**sanitizers, **environment})
        how = environment.get("FLASHU_ISA") or environment.get("FLASHU_PTX_WHEN") or sanitizer or "plain"
        return Attempt(code != 0, how)

    def pytest(self, arguments: Sequence[str]) -> Attempt:
        """Runs pytest in the copy."""
        self._provide_libraries()
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "--tb=no", "--hypothesis-seed=0"]
        # Without bytecode files: they would hide a fault of equal length written in the same second.
        code = self._run([*command, *arguments], {"PYTHONPATH": str(self.source), "PYTHONDONTWRITEBYTECODE": "1"})
        if code in (2, 3, 4, 5):
            raise NotRun(f"pytest {' '.join(arguments)} ran no tests (exit code {code})")
        return Attempt(code != 0, "pytest")

    def _provide_libraries(self) -> None:
        """Copies the compiled libraries to the Python files: the checkout's, or for a fault in the C++ sources those
        built from the copy."""
        if self._native:
            torch = importlib.util.find_spec("torch")
            assert torch is not None and torch.submodule_search_locations is not None
            options = ["-DFLASHU_CUDA=OFF", "-DFLASHU_TORCH=ON", "-DBUILD_SHARED_LIBS=ON"]
            options.append(f"-DTORCH_DIR={torch.submodule_search_locations[0]}")
            folder = self._build("torch", options, ["flashu_torch"])
            built = {name: folder / Path(name).name for name in LIBRARIES}
        else:
            all_of_them = {name: self.root / "flashu_ext" / name for name in LIBRARIES}
            built = {name: library for name, library in all_of_them.items() if library.is_file()}
        for name, library in built.items():
            target = self.source / "flashu_ext" / name
            target.parent.mkdir(exist_ok=True)
            target.unlink(missing_ok=True)  # a new file: a process may have the old one mapped
            shutil.copyfile(library, target)

    def _build(self, name: str, options: list[str], targets: list[str]) -> Path:
        """Configures the build folder `name` once, then builds the targets."""
        binary = self.folder / name.replace(",", "-")
        if not (binary / "build.ninja").is_file():
            configure = ["cmake", "-G", "Ninja", "-S", str(self.source), "-B", str(binary)]
            configure += ["-DFLASHU_TESTS=ON", "-DFLASHU_WERROR=ON", *options]
            if ccache := shutil.which("ccache"):
                configure += [f"-DCMAKE_{language}_COMPILER_LAUNCHER={ccache}" for language in ("CXX", "CUDA")]
            subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        done = subprocess.run(["cmake", "--build", str(binary), "--target", *targets], capture_output=True, text=True)
        if done.returncode != 0:
            raise NotRun(f"does not compile:\n{done.stdout[-2000:]}")
        return binary

    def _run(self, command: list[str], environment: dict[str, str]) -> int:
        """Runs a command in the copy; returns its exit code, 124 if it hangs."""
        try:
            variables = {**os.environ, **environment}
            done = subprocess.run(command, cwd=self.source, env=variables, capture_output=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return 124
        return done.returncode
