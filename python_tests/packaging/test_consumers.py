"""Programs in C and C++ that use the library without torch, built as consumers do: find_package, pkg-config, folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flashu_ext as fx
from flashu_ext import reference

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
LIBRARY = fx.include_dir().parent / "lib"


def command(*arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [str(argument) for argument in arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tool(name: str) -> str:
    """The program beside this Python, or on PATH; without it the test is skipped."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def by_cmake(source: Path, build: Path) -> Path:
    cmake = tool("cmake")
    command(cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-S", source.parent, "-B", build,
            f"-Dflashu_DIR={fx.cmake_dir()}")  # fmt: skip
    assert "CMAKE_CXX_COMPILER:" not in (build / "CMakeCache.txt").read_text() or source.suffix == ".cpp"
    command(cmake, "--build", build)
    return build / "engine"


def by_pkg_config(source: Path, build: Path) -> Path:
    flags = command(
        tool("pkg-config"), "--cflags", "--libs", "flashu", PKG_CONFIG_PATH=str(LIBRARY / "pkgconfig")
    ).split()
    return compiled(source, build, *flags)


def by_folders(source: Path, build: Path) -> Path:
    return compiled(source, build, f"-I{fx.include_dir()}", f"-L{LIBRARY}", "-lflashu")


def compiled(source: Path, build: Path, *flags: str) -> Path:
    build.mkdir()
    compiler = (tool("cc"), "-std=c11") if source.suffix == ".c" else (tool("c++"), "-std=c++17", "-pthread")
    warnings = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
    command(*compiler, *warnings, source, "-o", build / "engine", *flags, f"-Wl,-rpath,{LIBRARY}")
    return build / "engine"


WAYS = [by_cmake, by_pkg_config, by_folders]


def fill(shape: tuple[int, ...], scale: float, seed: int) -> torch.Tensor:
    """The examples' numbers, fp64."""
    values = []
    for _ in range(int(np.prod(shape))):
        seed = (seed * 1664525 + 1013904223) % 2**32
        values.append((np.float32(seed >> 8) / np.float32(16777216) - np.float32(0.5)) * np.float32(scale))
    return torch.tensor(np.array(values), dtype=torch.float64).reshape(shape)


def ffn(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, kept: list[int]) -> torch.Tensor:
    h = torch.nn.functional.silu(x @ gate[kept].T) * (x @ up[kept].T)
    return h @ down[:, kept].T


def denoised() -> torch.Tensor:
    """What examples/c/engine.c computes, [images, channels, pixels]."""
    latents = fill((2, 32, 36), 2, 1)
    weight = fill((32,), 2, 2)
    weights = fill((96, 32), 0.5, 3), fill((96, 32), 0.5, 4), fill((32, 96), 0.5, 5)
    kept = [*range(40), *range(64, 88)]
    for s, dt in zip((1.5, 1.5, 3, 3), (0.1, 0.2, 0.3, 0.4), strict=True):
        pixels = latents.transpose(1, 2)
        x = torch.cat([pixels, 0.5 * pixels])
        normed = weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
        conditional, unconditional = (x + ffn(normed, *weights, kept)).chunk(2)
        latents = latents + dt * (unconditional + s * (conditional - unconditional)).transpose(1, 2)
    return latents


@pytest.mark.parametrize("build", WAYS)
def test_c_engine(build, tmp_path: Path):
    output = command(build(EXAMPLES / "c/engine.c", tmp_path / "build"))
    latents = torch.tensor([float(line) for line in output.split()], dtype=torch.float64).reshape(2, 32, 36)
    torch.testing.assert_close(latents, denoised(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", WAYS)
def test_cpp_engine(build, tmp_path: Path):
    program = build(EXAMPLES / "cpp/engine.cpp", tmp_path / "build")
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stderr.rsplit(":", 1)[1]) > 0  # the kernels ran on the engine's threads
    numbers = torch.tensor([float(line) for line in done.stdout.split()], dtype=torch.float64)
    kept, hidden, importance = numbers[:100].long(), numbers[100:-256].reshape(256, 128), numbers[-256:]

    before = fill((256, 128), 2, 1)
    norms = fill((2, 256, 16), 2, 2).square().sum((0, 2)).sqrt()
    assert kept.tolist() == norms.argsort()[:100].sort().values.tolist()
    expected = before.clone()
    weights = fill((384, 128), 0.5, 3), fill((384, 128), 0.5, 4), fill((128, 384), 0.5, 5)
    expected[kept] += ffn(before[kept], *weights, list(range(0, 384, 3)))
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    moved = reference.cosine_importance(before, expected)
    torch.testing.assert_close(importance, moved.double(), rtol=1e-4, atol=1e-6)


def test_versions_agree(tmp_path: Path):
    source = tmp_path / "version.c"
    source.write_text(
        "#include <flashu/flashu.h>\n#include <stdio.h>\nint main(void) {\n"
        '  printf("%s %s %d", FLASHU_VERSION, flashu_version(), FLASHU_VERSION_MAJOR);\n'
        "  return flashu_abi_version() != FLASHU_ABI_VERSION;\n}\n"
    )
    header, library, major = command(by_folders(source, tmp_path / "build")).split()
    assert header == library == fx.__version__ and major == fx.__version__.split(".")[0]
    config = (fx.cmake_dir() / "flashuConfigVersion.cmake").read_text()
    assert f'PACKAGE_VERSION "{fx.__version__}"' in config


def test_no_path_of_this_machine_is_installed():
    texts = [*fx.cmake_dir().glob("*.cmake"), *LIBRARY.glob("pkgconfig/*.pc")]
    assert len(texts) >= 4
    for path in [*texts, *LIBRARY.glob("*.so"), LIBRARY.parent / "libflashu_torch.so"]:
        assert str(ROOT).encode() not in path.read_bytes(), path
