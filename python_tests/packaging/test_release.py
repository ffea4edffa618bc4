"""What a release refuses, and that each check of a wheel finds a planted fault."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from flashu_ext.ops import native

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "release").is_dir():
    pytest.skip("these tests need the source folder", allow_module_level=True)
sys.path.insert(0, str(ROOT))
from release import __main__ as making  # noqa: E402
from release import changelog, environments, site, symbols, wheel  # noqa: E402

Files = dict[str, bytes]
INFO = "flashu_ext-0.1.0.dist-info"
METADATA = b"""Metadata-Version: 2.4
Name: flashu_ext
Version: 0.1.0
Summary: s
License-Expression: Apache-2.0
License-File: LICENSE
Requires-Python: >=3.11
Requires-Dist: torch>=2.11
Description-Content-Type: text/markdown

# flashu_ext
"""


def library(folder: Path, code: str, *flags: str) -> bytes:
    """A shared library of C code."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("cc is not installed")
    (folder / "planted.c").write_text(code)
    subprocess.run(
        [compiler, "-shared", "-fPIC", folder / "planted.c", "-o", folder / "planted.so", *flags], check=True
    )
    return (folder / "planted.so").read_bytes()


OPS, KERNELS = wheel.LIBRARIES
HOME = "-Wl,-rpath,$ORIGIN/lib"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("libraries")
    ops = library(folder, "void planted(void) {}", HOME)
    return {OPS: ops, KERNELS: library(folder, "void planted(void) {}") + wheel.CUDA_CODE}


@pytest.fixture
def files(libraries: Files) -> Files:
    """Of a wheel as it should be, with small files."""
    small = dict.fromkeys(wheel.WANTED["flashu_ext"], b"x")
    return small | libraries | {
        f"{INFO}/METADATA": METADATA,
        f"{INFO}/WHEEL": f"Wheel-Version: 1.0\nTag: {wheel.TAG}\n".encode(),
        f"{INFO}/licenses/LICENSE": b"Apache License",
    }  # fmt: skip


def recorded(files: Files) -> Files:
    """With a RECORD of them, as builds write it."""

    def row(name: str, data: bytes) -> str:
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        return f"{name},sha256={digest},{len(data)}\n"

    rows = "".join(row(name, data) for name, data in files.items())
    return {**files, f"{INFO}/RECORD": f"{rows}{INFO}/RECORD,,\n".encode()}


def zipped(files: Files, folder: Path, name: str = f"flashu_ext-0.1.0-{wheel.TAG}.whl") -> Path:
    path = folder / name
    if f"{INFO}/RECORD" not in files:
        files = recorded(files)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for each, data in files.items():
            archive.writestr(each, data)
    return path


def test_a_wheel_as_it_should_be(files: Files, tmp_path: Path):
    assert wheel.check(zipped(files, tmp_path)) == []


@pytest.fixture(scope="module")
def built() -> Path:
    """The package's folder, of a build as a release links it (make build)."""
    cache = ROOT / "build" / sys.implementation.cache_tag / "CMakeCache.txt"
    if not cache.is_file() or "FLASHU_MANYLINUX:BOOL=ON" not in cache.read_text():
        pytest.skip("flashu_ext was not built here with FLASHU_MANYLINUX=1")
    return native.PACKAGE


def test_the_libraries_of_this_build(files: Files, tmp_path: Path, built: Path):
    files |= {name: (built.parent / name).read_bytes() for name in wheel.LIBRARIES}
    assert list(wheel.abi(wheel.Wheel(zipped(files, tmp_path)))) == []


CALLS = "void {0}(void); void planted(void) {{ {0}(); }}"
Change = Callable[[Files], object]


def put(name: str, data: bytes) -> Change:
    return lambda files: files.update({name: data})


def gone(name: str) -> Change:
    return lambda files: files.pop(name)


def in_metadata(old: bytes, new: bytes) -> Change:
    return put(f"{INFO}/METADATA", METADATA.replace(old, new))


PLANTED: dict[str, tuple[Change, str]] = {
    "too large": (put("flashu_ext/x.bin", os.urandom(wheel.LARGEST)), r"size: expected at most 8,000,000 bytes, .*/x.bin"),
    "a file is missing": (gone("flashu_ext/nano/data/model.safetensors"), r"contents: .*model.safetensors is missing"),
    "tests": (put("flashu_ext/tests/test_x.py", b""), "flashu_ext/tests/test_x.py is none of"),
    "a build folder": (put("flashu_ext/build/x.txt", b""), "flashu_ext/build/x.txt is none of"),
    "bytecode": (put("flashu_ext/__pycache__/x.pyc", b""), "x.pyc is none of"),
    "another package": (put("python_tests/x.py", b""), "files of flashu_ext only, got python_tests/x.py"),
    "another library": (put("flashu_ext/libgomp.so.1", b""), "no other library, got flashu_ext/libgomp.so.1"),
    "a path in a text": (put("flashu_ext/lib/pkgconfig/flashu.pc", b"prefix=/root/w"), "flashu.pc has a path .*: /root/w"),
    "a path in a library": (
        lambda files: files.update({OPS: files[OPS] + b"/tmp/b/ffn.cpp"}), "_torch.so has a path .*: /tmp/b/ffn.cpp",
    ),
    "no licence": (gone(f"{INFO}/licenses/LICENSE"), "licence: .*LICENSE is missing"),
    "another tag": (put(f"{INFO}/WHEEL", b"Tag: cp311-cp311-linux_x86_64\n"), "WHEEL: .* py3-none-manylinux.*, got cp311"),
    "no CUDA kernels": (
        lambda files: files.update({KERNELS: files[KERNELS].replace(wheel.CUDA_CODE, b"")}), "CUDA kernels: expected some",
    ),
    "no valid metadata": (in_metadata(b">=3.11", b"> > 3"), "metadata: .*3"),
    "another licence": (in_metadata(b"Apache-2.0", b"MIT"), "License-Expression: expected Apache-2.0, got MIT"),
    "another Python": (in_metadata(b">=3.11", b">=3.12"), "Requires-Python: expected >=3.11, got >=3.12"),
    "a file outside": (put("flashu_ext/../x.py", b""), r"files of flashu_ext only, got flashu_ext/\.\./x.py"),
    "no library": (put(OPS, b"text"), "_torch.so: expected a shared library"),
    "links to files": (in_metadata(b"# flashu_ext", b"[page](docs/limits.md)"), "links to files"),
}  # fmt: skip


@pytest.mark.parametrize("plant, message", PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_named(files: Files, tmp_path: Path, plant: Change, message: str):
    plant(files)
    (problem,) = wheel.check(zipped(files, tmp_path))
    assert re.search(message, problem), problem


ABI = {
    "C++ of torch": (
        CALLS.format("_ZN3c105ErrorC1ENSt7__cxx1112basic_stringIcEE"),
        [],
        "stable ABI only, needs _ZN3c105Error",
    ),
    "at::": (CALLS.format("_ZN2at6detail10empty_cpuEv"), [], "stable ABI only, needs _ZN2at6detail"),
    "Python": (CALLS.format("PyLong_FromLong"), [], "no symbol of CPython, needs PyLong_FromLong"),
    "a newer glibc": (
        "extern char __libc_single_threaded; char planted(void) { return __libc_single_threaded; }",
        [],
        r"at most GLIBC 2\.28.* needs GLIBC_2\.32 for __libc_single_threaded",
    ),
    "another library": (
        "void planted(void) {}",
        [HOME, "-Wl,--no-as-needed", "-lgomp"],
        "only, needs libgomp.so.1",
    ),
    "a search path": (
        "void planted(void) {}",
        ["-Wl,-rpath,/usr/local/lib"],
        "to look for libraries in .*/usr/local/lib",
    ),
}


@pytest.mark.parametrize("code, flags, message", ABI.values(), ids=ABI)
def test_a_library_that_needs_too_much(files: Files, tmp_path: Path, code: str, flags: list[str], message: str):
    files[OPS] = library(tmp_path, code, *(flags or [HOME]))
    problems = list(wheel.abi(wheel.Wheel(zipped(files, tmp_path))))
    assert len(problems) == 1 and re.search(message, problems[0]) and problems[0].startswith(OPS), problems


def test_the_kernels_need_no_torch(files: Files, tmp_path: Path, built: Path):
    """libflashu.so is for C and C++ programs; the library of ops is not."""
    files[KERNELS] = (built.parent / OPS).read_bytes()
    problems = list(wheel.abi(wheel.Wheel(zipped(files, tmp_path))))
    assert any("needs libflashu.so, libtorch.so, libtorch_cpu.so" in problem for problem in problems), problems


def test_newer_symbols_are_named():
    table = """
0000000000000000      DF *UND*  0000000000000000 (GLIBC_2.34) dlopen
0000000000000000      DF *UND*  0000000000000000 (GLIBC_2.28) fcntl64
0000000000000000  w   DO *UND*  0000000000000000  GLIBC_2.32  __libc_single_threaded
0000000000000000      DF *UND*  0000000000000000 (GLIBCXX_3.4.26) _ZNSt1
0000000000000000      DF *UND*  0000000000000000 (CXXABI_1.3.11) _ZNSt2
0000000000000000      DF *UND*  0000000000000000 (GCC_7.0.0) __x
0000000000000000  w   D  *UND*  0000000000000000  Base        __gmon_start__
0000000000000000      D  *UND*  0000000000000000              aoti_torch_get_dim
0000000000000000      D  *UND*  0000000000000000              _ZN2at5emptyEv
0000000000001000 g    DF .text  0000000000000010 (GLIBC_2.40) defined_here
"""
    assert symbols.too_new(table) == [
        "GLIBCXX_3.4.26 for _ZNSt1", "GLIBC_2.32 for __libc_single_threaded", "GLIBC_2.34 for dlopen",
    ]  # fmt: skip
    assert symbols.not_stable(table) == ["_ZN2at5emptyEv"]


TAMPERED: dict[str, tuple[Change, str]] = {
    "a changed file": (put("flashu_ext/planning/tuned.json", b"y"), "RECORD: flashu_ext/planning/tuned.json is another file"),
    "a new file": (put("flashu_ext/x.py", b""), "RECORD: flashu_ext/x.py is not in it"),
    "a file less": (gone("flashu_ext/py.typed"), "RECORD: flashu_ext/py.typed is in it and not in the wheel"),
    "no record": (put(f"{INFO}/RECORD", b""), "RECORD: flashu_ext/py.typed is not in it"),
    "CUDA code": (
        lambda files: files.update({KERNELS: files[KERNELS] + b"\x01"}), "RECORD: flashu_ext/lib/libflashu.so is another file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, message", TAMPERED.values(), ids=TAMPERED)
def test_what_was_changed_after_the_build_is_named(files: Files, tmp_path: Path, change: Change, message: str):
    files = recorded(files)
    change(files)
    assert any(re.search(message, problem) for problem in wheel.record(wheel.Wheel(zipped(files, tmp_path))))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_that_is_there_twice_is_named(files: Files, tmp_path: Path):
    path = zipped(files, tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("flashu_ext/py.typed", b"x")
    assert "RECORD: expected one file of a name, got several flashu_ext/py.typed" in wheel.check(path)


@pytest.mark.parametrize("kind", ["text", "cut off", "a flipped byte", "nothing", "another project"])
def test_what_cannot_be_read_is_named(files: Files, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    path = zipped(files, tmp_path)
    data = bytearray(path.read_bytes())
    if kind == "a flipped byte":
        data[data.index(b"flashu_ext/libflashu_torch.so") + 400] ^= 1
    path.write_bytes({"text": b"text", "cut off": data[: len(data) // 2]}.get(kind, bytes(data)))
    if kind == "nothing":
        path.unlink()
    if kind == "another project":
        path = path.rename(tmp_path / f"other-0.1.0-{wheel.TAG}.whl")
    assert wheel.main([path]) == 1 and str(path) in capsys.readouterr().out


def test_a_name_that_is_no_wheel(tmp_path: Path):
    with pytest.raises(ValueError, match=r"expected NAME-VERSION-PYTHON-ABI-PLATFORM[.]whl"):
        wheel.check(zipped({}, tmp_path, "flashu_ext.whl"))


def test_the_wheel_without_cuda_has_a_version_of_its_own(files: Files, tmp_path: Path):
    files = {name.replace("0.1.0", "0.1.0+cpu"): data for name, data in files.items()}
    path = zipped(files, tmp_path, f"flashu_ext-0.1.0+cpu-{wheel.TAG}.whl")
    assert list(wheel.cuda(wheel.Wheel(path))) == ["CUDA kernels: expected none in a wheel of version 0.1.0+cpu"]


def test_one_count_of_exceptions(built: Path):
    """The libraries have a C++ runtime of their own, and throw by the process's."""
    for name in wheel.LIBRARIES:
        table = symbols.symbols(built.parent / name)
        thrown = {found for _, _, found in symbols.undefined(table) if found.startswith("__cxa")}
        assert thrown >= {"__cxa_throw", "__cxa_begin_catch", "__cxa_end_catch"}, name


# ---- what is refused


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A committed source folder of version 0.2.0."""
    root = tmp_path / "tree"
    texts = {
        "docs/changelog.md": "## [Unreleased]\n\n## [0.2.0] - 2026-01-02\n\n- New.\n\n## [0.1.0] - 2026-01-01\n\n- Old.\n",
        "flashu_ext/__init__.py": '__version__ = "0.2.0"\n',
        "nano_weights/pyproject.toml": '[project]\nversion = "0.2.0"\n',
        "csrc/include/flashu/flashu.h": "".join(f"#define FLASHU_VERSION_{n}\n" for n in ("MAJOR 0", "MINOR 2", "PATCH 0")),
    }  # fmt: skip
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "-q")
    commit(root)
    return root


def git(root: Path, *arguments: str) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@t")
    subprocess.run(["git", "-C", str(root), *who, *arguments], check=True, capture_output=True)


def commit(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "x")


def test_a_version_with_a_section_is_released(tree: Path):
    assert changelog.refusals(tree) == []
    assert changelog.section((tree / "docs/changelog.md").read_text(), "0.2.0") == "- New."


def edited(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))
        commit(root)

    return edit


LOG, WEIGHTS, HEADER = "docs/changelog.md", "nano_weights/pyproject.toml", "csrc/include/flashu/flashu.h"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no section": (edited(LOG, "## [0.2.0] - 2026-01-02\n", ""), r"a section '## \[0.2.0\] - YYYY-MM-DD'"),
    "an empty section": (edited(LOG, "- New.\n", ""), "a section .* got none"),
    "a section without a date": (edited(LOG, "[0.2.0] - 2026-01-02", "[0.2.0]"), "a section .* got none"),
    "another version in C": (edited(HEADER, "MINOR 2", "MINOR 1"), "expected version 0.2.0, got 0.1.0"),
    "other weights": (edited(WEIGHTS, "0.2.0", "0.1.0"), "nano_weights.*expected version 0.2.0, got 0.1.0"),
    "a changed file": (lambda root: (root / LOG).open("a").write("x"), r"1 changed or new files \(docs/changelog.md\)"),
    "a new file": (lambda root: (root / "new.txt").write_text("x"), r"\(new.txt\)"),
    "a tag": (lambda root: git(root, "tag", "v0.2.0"), "which is tagged v0.2.0"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_refused(tree: Path, change: Callable[[Path], object], message: str):
    change(tree)
    (reason,) = changelog.refusals(tree)
    assert re.search(message, reason), reason


def test_this_version_has_a_section():
    text = (ROOT / changelog.CHANGELOG).read_text(encoding="utf-8")
    assert changelog.section(text, changelog.version()) and "## [Unreleased]" in text


@pytest.mark.parametrize("text", ["python3.12", "python3.12=", "python3.12=numpy"])
def test_an_environment_names_a_python_and_a_torch(text: str):
    with pytest.raises(ValueError, match=r"expected PYTHON=torch or PYTHON=torch==VERSION, got"):
        environments.Environment.parse(text)
    known = environments.Environment.parse("python3.12=torch==2.11.0")
    assert (known.python, known.torch, known.name) == ("python3.12", "torch==2.11.0", "python3.12-torch-2.11.0")


def test_a_file_that_the_archive_has_not(tmp_path: Path):
    (tmp_path / "a.py").write_text("")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.py", "flashu_ext-0.1.0/folder/a.py")
    assert making.left_out(tmp_path / "x.tar.gz", ["folder/a.py"]) == []
    assert making.left_out(tmp_path / "x.tar.gz", ["folder/a.py", "folder/b.py"]) == ["folder/b.py"]


# ---- pages


def dead_links(folder: Path) -> str:
    done = subprocess.run([sys.executable, ROOT / ".ci/dead-links", folder], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout


def test_pages_of_this_version(tmp_path: Path):
    for version in ("0.1.0", "0.10.0", "0.9.0"):
        folder = site.build(tmp_path, version, None)
    assert dead_links(tmp_path) == ""
    listed = re.findall(r'href="([^"/]+)/index.html"', (tmp_path / "index.html").read_text())
    assert listed == ["0.10.0", "0.9.0", "0.1.0"]
    pages = {page.stem for page in (folder / "docs").glob("*.html")}
    assert pages >= {page.stem for page in (ROOT / "docs").glob("*.md")}
    text = (folder / "index.html").read_text()
    assert "docs/settings.html#checkpoints" in text and "<table>" in text and "```" not in text
    assert "gathered_ffn" in (folder / "flashu_ext/ops/ffn.py.html").read_text()  # a page names it


def test_a_dead_link_is_found(tmp_path: Path):
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text("# A title\n\n[page](docs/page.md#here)\n")
    (root / "docs/page.md").write_text("# There\n")
    site.build(tmp_path / "out", "1.0", None, root)
    assert "docs/page.html#here" in dead_links(tmp_path / "out")
    (root / "docs/page.md").write_text("# Here\n\n[gone](gone.py)\n")
    with pytest.raises(FileNotFoundError, match=r"docs/gone.py: a page names it"):
        site.build(tmp_path / "out", "1.0", None, root)
