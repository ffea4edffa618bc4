"""The pages of one version as a folder of HTML: README.md, docs/*.md, the API references, and the files that pages name.

    python -m release.site OUT [--api build/api]

writes OUT/VERSION, laid out as the source folder is, and OUT/index.html, which lists the versions that are in OUT. Links need
no network and lead somewhere (`.ci/dead-links OUT`).
"""

from __future__ import annotations

import argparse
import html
import os
import re
import shutil
from pathlib import Path

import markdown2
from packaging.version import InvalidVersion, Version
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

__all__ = ["anchor", "build"]

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ["fenced-code-blocks", "tables", "code-friendly", "cuddled-lists"]
IMAGES = (".png", ".svg", ".jpg")
LINK = re.compile(r'(?P<before>(?:href|src)=")(?!https?:|#)(?P<path>[^"#]+)(?P<place>#[^"]*)?(?=")')
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ max-width: 60rem; margin: 0 auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }}
nav {{ font-size: 0.9rem; border-bottom: 1px solid #ccc; padding-bottom: 0.5rem; }}
pre, code {{ font: 0.9em ui-monospace, monospace; background: #f6f6f6; }}
pre {{ overflow-x: auto; padding: 0.5rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ border: 1px solid #ccc; padding: 0.2rem 0.5rem; text-align: left; }}
img {{ max-width: 100%; }}
{style}</style></head><body>
<nav>{nav}</nav>
{body}
</body></html>
"""


def anchor(heading: str) -> str:
    """The name of a heading's place, as GitHub makes it of the Markdown."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def build(out: Path, version: str, api: Path | None, root: Path = ROOT) -> Path:
    """Writes the pages of a version, in place of older ones of the same version, and the list of versions.

    Args:
        api: the folder of the API references (`make api`), if they are to be there.
        root: the source folder.

    Returns:
        The version's folder.

    Raises:
        FileNotFoundError: a page names a file that is not there; or there is no `api` folder.
    """
    folder = out / version
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if api is not None:
        shutil.copytree(api, folder / "api")
    _Version(root, folder, version, has_api=api is not None).write()
    _write_list(out)
    return folder


class _Version:
    """The pages of one version; files that pages name are written as they are met."""

    def __init__(self, root: Path, folder: Path, version: str, has_api: bool):
        self.root, self.folder, self.version, self.has_api = root, folder, version, has_api
        self.pages = [Path("README.md"), *sorted(page.relative_to(root) for page in (root / "docs").glob("*.md"))]
        self.written: set[Path] = set()

    def write(self) -> None:
        for page in self.pages:
            text = (self.root / page).read_text(encoding="utf-8")
            self._put(self._target(page), text.partition("\n")[0].lstrip("# "), self._rendered(page, text))

    def _target(self, path: Path) -> Path:
        """Where a file of the source folder is in the version's."""
        if path == Path("README.md"):
            return Path("index.html")
        if (self.root / path).is_dir():
            return path / "index.html"
        if path.suffix in IMAGES:
            return path
        return path.with_suffix(".html") if path.suffix == ".md" else path.with_name(path.name + ".html")

    def _rendered(self, page: Path, text: str) -> str:
        headings = re.findall(r"^(#+) (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.MULTILINE)
        body = str(markdown2.markdown(text, extras=EXTRAS))
        places = iter(anchor(heading) for _, heading in headings)
        body = re.sub(r"<h([1-6])>", lambda found: f'<h{found[1]} id="{next(places)}">', body)
        return LINK.sub(lambda link: self._followed(page, link), body)

    def _followed(self, page: Path, link: re.Match[str]) -> str:
        """A link of a page, with its target written."""
        path = Path(os.path.normpath(page.parent / html.unescape(link["path"])))
        target = self._target(path)
        if path not in self.pages and path not in self.written:
            self.written.add(path)
            self._write_file(path, target)
        return link["before"] + os.path.relpath(target, self._target(page).parent) + (link["place"] or "")

    def _write_file(self, path: Path, target: Path) -> None:
        source = self.root / path
        if not source.exists():
            raise FileNotFoundError(f"{path}: a page names it, and it is not in {self.root}")
        if source.is_dir():
            names = sorted(each.relative_to(self.root) for each in source.iterdir() if each.is_file())
            for name in names:
                self._followed(path / "x", re.match(LINK, f'href="{name.name}"'))  # type: ignore[arg-type]
            rows = "".join(f'<li><a href="{self._target(name).name}">{name.name}</a></li>' for name in names)
            self._put(target, str(path), f"<h1>{path}</h1><ul>{rows}</ul>")
        elif path.suffix in IMAGES:
            (self.folder / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, self.folder / target)
        else:
            code = source.read_text(encoding="utf-8")
            try:
                lexer = get_lexer_for_filename(path.name)
            except ClassNotFound:
                lexer = TextLexer()
            self._put(target, str(path), f"<h1>{path}</h1>" + highlight(code, lexer, HtmlFormatter()))

    def _put(self, target: Path, title: str, body: str) -> None:
        up = os.path.relpath(".", target.parent)
        links = [
            f'<a href="{up}/../index.html">versions</a>',
            f'<a href="{up}/index.html">flashu_ext {self.version}</a>',
        ]
        if self.has_api:
            links += [f'<a href="{up}/api/index.html">Python API</a>', f'<a href="{up}/api/c/index.html">C API</a>']
        (self.folder / target).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / target).write_text(_page(title, " · ".join(links), body), encoding="utf-8")


def _page(title: str, nav: str, body: str) -> str:
    style = HtmlFormatter().get_style_defs([".highlight", ".codehilite"])
    return PAGE.format(title=html.escape(title), nav=nav, body=body, style=style)


def _write_list(out: Path) -> None:
    """index.html of all versions, the newest first."""
    found = []
    for folder in out.iterdir():
        try:
            found.append((Version(folder.name), folder.name))
        except InvalidVersion:
            continue
    rows = "".join(f'<li><a href="{name}/index.html">{name}</a></li>' for _, name in sorted(found, reverse=True))
    (out / "index.html").write_text(_page("flashu_ext", "flashu_ext", f"<h1>Versions</h1><ul>{rows}</ul>"), "utf-8")


if __name__ == "__main__":
    from .changelog import version

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder with a folder for each version")
    parser.add_argument("--api", type=Path, help="the API references, that `make api` writes")
    arguments = parser.parse_args()
    print(build(arguments.out, version(), arguments.api))
