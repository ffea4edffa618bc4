"""Whether a version may be released: its section in docs/changelog.md, a clean tree, and no tag of its name."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

__all__ = ["refusals", "section", "version"]

ROOT = Path(__file__).resolve().parents[1]
CHANGELOG = Path("docs/changelog.md")


def version(root: Path = ROOT) -> str:
    """The package's, that pyproject.toml takes from flashu_ext/__init__.py.

    Raises:
        ValueError: it is not there.
    """
    text = (root / "flashu_ext" / "__init__.py").read_text(encoding="utf-8")
    if (found := re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)) is None:
        raise ValueError('flashu_ext/__init__.py: expected a line __version__ = "..."')
    return found[1]


def section(text: str, version: str) -> str:
    """The changelog's section of a version, without its heading; "" if there is none or nothing in it."""
    found = re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return found[1].strip() if found else ""


def refusals(root: Path = ROOT) -> list[str]:
    """Why the version cannot be released from this source folder; empty if it can."""
    own, reasons = version(root), []
    if not section((root / CHANGELOG).read_text(encoding="utf-8"), own):
        reasons.append(f"{CHANGELOG}: expected a section '## [{own}] - YYYY-MM-DD' with what is new, got none")
    header = (root / "csrc/include/flashu/flashu.h").read_text(encoding="utf-8")
    in_c = ".".join(re.findall(r"#define FLASHU_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header))
    if in_c != own:
        reasons.append(f"csrc/include/flashu/flashu.h: expected version {own}, got {in_c}")
    weights = tomllib.loads((root / "nano_weights/pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if weights != own:
        reasons.append(f"nano_weights/pyproject.toml: expected version {own}, got {weights}")
    if changed := _git(root, "status", "--porcelain").splitlines():
        names = ", ".join(line.split(maxsplit=1)[1] for line in changed[:5])
        reasons.append(f"expected a tree without changes, got {len(changed)} changed or new files ({names})")
    if _git(root, "tag", "--list", f"v{own}"):
        reasons.append(f"expected a version without a tag, got {own}, which is tagged v{own}")
    return reasons


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()
