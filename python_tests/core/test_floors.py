"""The floors: an import may only point down, and no two folders import each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import flashu_ext

PACKAGE = Path(flashu_ext.__file__).parent

FLOORS = (
    ("planning",),
    ("ops",),
    ("models",),
    ("runtime",),
    ("upstream",),
    ("calibration", "batch"),
    ("nano",),
    ("studies", "bench", "hosts"),
    ("report",),
    ("cli",),
)
"""From the ground up."""
LEVEL = {folder: level for level, folders in enumerate(FLOORS) for folder in folders}


def modules() -> Iterator[Path]:
    """Every module except the programs (`__main__`), which may import anything."""
    return (path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__main__.py")


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """The package's modules that a file imports, nested and type-only imports included: dotted name -> line."""
    package = ["flashu_ext", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *(node.module.split(".") if node.module else [])]
            if base[:1] == ["flashu_ext"]:
                for name in node.names:
                    yield ".".join([*base, name.name]), node.lineno
        elif isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names if name.name.startswith("flashu_ext"))


def test_every_folder_has_a_floor() -> None:
    folders = {path.relative_to(PACKAGE).parts[0] for path in modules() if path.parent != PACKAGE}
    assert folders == set(LEVEL), "a new folder needs an entry in FLOORS"


def test_imports_point_down() -> None:
    wrong = []
    for path in modules():
        here = path.relative_to(PACKAGE).parts[0]
        for name, line in imported(path):
            there = name.split(".")[1]
            if here in LEVEL and there in LEVEL and there != here and LEVEL[there] >= LEVEL[here]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_modules_of_a_folder_have_no_import_cycle() -> None:
    """Imports inside functions count too: they only hide a cycle."""
    names = {
        ".".join(["flashu_ext", *p.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): p
        for p in modules()
    }
    graph = {
        name: {target for full, _ in imported(path) if (target := _module(full, names)) not in (None, name)}
        for name, path in names.items()
        if path.name != "__init__.py"  # a package's own names are loaded on first use
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def _dotted(path: Path) -> str:
    return ".".join(["flashu_ext", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def _module(name: str, names: dict[str, Path]) -> str | None:
    """The module that an imported name denotes or is defined in."""
    return name if name in names else name.rpartition(".")[0] if name.rpartition(".")[0] in names else None


def test_the_page_names_every_floor() -> None:
    page = PACKAGE.parent / "docs" / "architecture.md"
    named = re.findall(r"^  (\w+)\[\"\1: ", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert named == [folder for folders in FLOORS for folder in folders]
