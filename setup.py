"""Builds the native part of flashu_ext with CMake: the library of torch ops, and the C and C++ library with its headers.

Environment: FLASHU_CUDA=0|1|auto, FLASHU_CUDA_ARCHS, FLASHU_BUILD_DIR (kept between builds), FLASHU_TESTS=1 (builds
the C++ tests too), FLASHU_WERROR=1, FLASHU_MANYLINUX=1 (the libraries load on systems of manylinux_2_28; needs a static
libstdc++), MAX_JOBS, TORCH_DIR (directory of the torch package; its headers are used, and those of any torch from 2.11 on
give the same library). torch is located, never imported, and nothing is downloaded.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, build_meta, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Peak memory of a compile job; more jobs than fit into memory would swap.
GIB_PER_JOB = 1.5


def torch_dir() -> Path | None:
    """The torch of this Python, also of the environment around pip's isolated build, which hides it from imports."""
    if "TORCH_DIR" in os.environ:
        return Path(os.environ["TORCH_DIR"])
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    for site in (sysconfig.get_path("platlib"), sysconfig.get_path("purelib")):
        if Path(site, "torch", "include").is_dir():
            return Path(site, "torch")
    return None


def tool(name: str) -> str:
    """The program beside this Python, or the first on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        sys.exit(f"flashu_ext: {name} is needed to build: {sys.executable} -m pip install {name}")
    return found


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


def on_off(variable: str) -> str:
    return "ON" if os.environ.get(variable) == "1" else "OFF"


class CMakeBuild(build_ext):
    """One CMake build; the library of torch ops is then copied to the place that setuptools expects, and the C and C++
    library is installed beside it, in include/ and lib/."""

    def run(self) -> None:
        cmake, ninja, torch = tool("cmake"), tool("ninja"), torch_dir()
        if torch is None:
            sys.exit(
                "flashu_ext: torch is needed to build and was not found in this Python.\n"
                f"  {sys.executable} -m pip install 'torch>=2.11'"
            )
        build = Path(os.environ.get("FLASHU_BUILD_DIR", ROOT / "build" / sys.implementation.cache_tag))
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *(cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", str(ROOT), "-B", str(build)),
            *("-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_INSTALL_LIBDIR=lib", "-DBUILD_SHARED_LIBS=ON"),
            *("-DFLASHU_TORCH=ON", f"-DTORCH_DIR={torch}", f"-DFLASHU_CUDA={cuda_switch()}"),
            *(f"-D{name}={on_off(name)}" for name in ("FLASHU_TESTS", "FLASHU_WERROR", "FLASHU_MANYLINUX")),
        ]
        if "FLASHU_CUDA_ARCHS" in os.environ:
            configure.append(f"-DFLASHU_CUDA_ARCHS={os.environ['FLASHU_CUDA_ARCHS']}")
        if ccache := shutil.which("ccache"):
            configure.append(f"-DCMAKE_CXX_COMPILER_LAUNCHER={ccache}")
        subprocess.check_call(configure)
        subprocess.check_call([cmake, "--build", str(build), "--parallel", str(jobs())])
        (extension,) = self.extensions
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        if self.inplace:
            library = ROOT / self.get_ext_filename(extension.name)
        package = library.parent
        for folder in ("include", "lib"):
            shutil.rmtree(package / folder, ignore_errors=True)
        subprocess.check_call([cmake, "--install", str(build), "--prefix", str(package)], stdout=subprocess.DEVNULL)
        # Replaced, not overwritten: a running process may have the old file mapped.
        temporary = library.with_suffix(".tmp")
        shutil.copy2(build / library.name, temporary)
        temporary.replace(library)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))  # no Python tag: it uses no CPython symbol


class Wheel(bdist_wheel):
    """One wheel for every Python: nothing in it is tied to one."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def description() -> str:
    """README.md for an index page, which has no other file: without pictures and links to files."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


# This file is also the build backend of pyproject.toml: setuptools', which asks for torch where none is found.
def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *([] if torch_dir() else ["torch>=2.11"])]


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *([] if torch_dir() else ["torch>=2.11"])]


build_sdist = build_meta.build_sdist
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable

if __name__ == "__main__":
    setup(
        long_description=description(),
        long_description_content_type="text/markdown",
        ext_modules=[Extension("flashu_ext.libflashu_torch", [])],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    )
