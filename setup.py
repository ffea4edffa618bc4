"""Builds the native part of flashu_ext with CMake: the library of torch ops and the module `_core`.

Environment: FLASHU_CUDA=0|1|auto, FLASHU_CUDA_ARCHS, FLASHU_BUILD_DIR (kept between builds), FLASHU_TESTS=1 (builds
the C++ tests too), MAX_JOBS. torch is located, never imported, and nothing is downloaded.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Peak memory of a compile job; more jobs than fit into memory would swap.
GIB_PER_JOB = 1.5


def torch_dir() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            "flashu_ext: torch is needed to build and was not found in this Python.\n"
            f"  {sys.executable} -m pip install 'torch>=2.11'\n"
            f"  {sys.executable} -m pip install --no-build-isolation ."
        )
    return Path(spec.submodule_search_locations[0])


def pybind11_dir() -> str:
    try:
        import pybind11
    except ModuleNotFoundError:
        sys.exit(f"flashu_ext: pybind11 is needed to build: {sys.executable} -m pip install pybind11")
    return pybind11.get_cmake_dir()


def jobs() -> int:
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory_gib / GIB_PER_JOB)))


def cuda_switch() -> str:
    value = os.environ.get("FLASHU_CUDA", "auto").lower()
    known = {"0": "OFF", "off": "OFF", "no": "OFF", "1": "ON", "on": "ON", "yes": "ON", "auto": "auto"}
    if value not in known:
        sys.exit(f"flashu_ext: FLASHU_CUDA: expected 0, 1 or auto, got {value!r}")
    return known[value]


class CMakeBuild(build_ext):
    """One CMake build makes all extensions; each is then copied to the place that setuptools expects."""

    def run(self) -> None:
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                sys.exit(f"flashu_ext: {tool} is needed to build: {sys.executable} -m pip install {tool}")
        build = Path(os.environ.get("FLASHU_BUILD_DIR", ROOT / "build" / sys.implementation.cache_tag))
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
            *("-DFLASHU_TORCH=ON", "-DFLASHU_PYTHON=ON", f"-DTORCH_DIR={torch_dir()}"),
            f"-DFLASHU_CUDA={cuda_switch()}",
            f"-DFLASHU_TESTS={'ON' if os.environ.get('FLASHU_TESTS') == '1' else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_dir()}",
        ]
        if "FLASHU_CUDA_ARCHS" in os.environ:
            configure.append(f"-DFLASHU_CUDA_ARCHS={os.environ['FLASHU_CUDA_ARCHS']}")
        if ccache := shutil.which("ccache"):
            configure.append(f"-DCMAKE_CXX_COMPILER_LAUNCHER={ccache}")
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", str(build), "--parallel", str(jobs())])
        built = {"libflashu_torch": build / "libflashu_torch.so", "_core": next(build.glob("_core.*.so"))}
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            if self.inplace:
                target = ROOT / self.get_ext_filename(extension.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            # Replaced, not overwritten: a running process may have the old file mapped.
            temporary = target.with_suffix(".tmp")
            shutil.copy2(built[extension.name.split(".")[-1]], temporary)
            temporary.replace(target)

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("libflashu_torch"):  # it uses no CPython symbol, so it needs no Python tag
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)


setup(
    ext_modules=[Extension("flashu_ext.libflashu_torch", []), Extension("flashu_ext._core", [])],
    cmdclass={"build_ext": CMakeBuild},
)
