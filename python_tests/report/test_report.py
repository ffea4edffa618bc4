"""The demo's page, picture, table and JSON, from invented results."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from flashu_ext.nano.evaluate import Proportion  # noqa: E402
from flashu_ext.report import plots  # noqa: E402
from flashu_ext.report.render import render, write_report  # noqa: E402
from flashu_ext.report.result import Answer, DemoResult, Drawing, PresetResult  # noqa: E402


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, format="PNG")
    return buffer.getvalue()


def preset(name: str, seconds: float, **fields) -> PresetResult:
    values = {
        "grid_points": 5,
        "kinds": ["full", "measure", "pruned", "head cached"],
        "backbone": 3,
        "head": 3,
        "adherence": Proportion(9, 10),
        "accuracy": Proportion(19, 20),
        "equal_answers": Proportion(20, 20),
        "image_seconds": [seconds, 3 * seconds, 2 * seconds],
        "answer_seconds": [seconds / 10] * 3,
    }
    return PresetResult(name=name, **(values | fields))


@pytest.fixture
def result() -> DemoResult:
    names = ("dense", "exact", "paper")
    return DemoResult(
        model="nano <3>",
        command="flashu-ext demo --out 'a & b'",
        machine={"cpu": "some <b>CPU</b>", "torch": "2.13"},
        seconds=12.0,
        presets=[
            preset("dense", 0.4),
            preset("exact", 0.2, max_difference=3e-6, summary="kernels <all>"),
            preset("paper", 0.1, psnr=21.5),
        ],
        drawings=[
            Drawing(
                "a red circle & more",
                {n: png("red") for n in names},
                {n: n != "paper" for n in names},
                {n: "nothing at <left>" if n == "paper" else "" for n in names},
            )
        ],
        answers=[Answer(png("blue"), "what color is it ?", "blue", {"dense": "blue", "exact": "blue", "paper": "red"})],
    )


class Page(HTMLParser):
    """Collects links, and checks that tags close in order."""

    VOID = frozenset(("meta", "img", "br", "link"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_holds_everything(result: DemoResult) -> None:
    html = render(result)
    page = Page()
    page.feed(html)
    assert not page.open
    assert page.addresses and all(address.startswith("data:image/") for address in page.addresses)
    assert not re.search(r"url\(|@import|<script", html)


def test_page_escapes_what_it_is_given(result: DemoResult) -> None:
    html = render(result)
    assert "nano &lt;3&gt;" in html and "<b>CPU</b>" not in html
    assert "kernels &lt;all&gt;" in html and "a red circle &amp; more" in html
    assert html.count("wrong: nothing at &lt;left&gt;") == 1


def test_speedups_are_of_medians(result: DemoResult) -> None:
    dense, exact, paper = result.presets
    assert dense.image_time == pytest.approx(0.8)
    assert result.image_speedup(exact) == pytest.approx(2)
    assert result.answer_speedup(paper) == pytest.approx(4)
    assert "2.0x" in render(result) and "4.0x" in render(result)


def test_table_says_how_far_from_dense(result: DemoResult) -> None:
    lines = result.table().splitlines()
    assert len(lines) == 5
    assert lines[3].startswith("exact") and lines[3].endswith("latents within 3.0e-06")
    assert lines[4].startswith("paper") and lines[4].endswith("PSNR 21.5 dB")


def test_files_are_written(result: DemoResult, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "demo"
    path = write_report(result, folder)
    assert path == folder / "report.html"
    assert {file.name for file in folder.iterdir()} == {"report.html", "gallery.png", "results.json"}
    record = json.loads((folder / "results.json").read_text())
    assert [p["image_speedup"] for p in record["presets"]] == pytest.approx([1, 2, 4])
    with Image.open(folder / "gallery.png") as image:
        assert image.format == "PNG"


def test_equal_results_give_equal_pages(result: DemoResult) -> None:
    assert render(result) == render(result)


def test_one_slow_round_does_not_shrink_the_bars(result: DemoResult, monkeypatch: pytest.MonkeyPatch) -> None:
    axes: list[Any] = []
    monkeypatch.setattr(plots, "svg", lambda drawn: axes.append(drawn.axes[0]) or "")
    plots.times(result, "image_seconds", "images")
    result.presets[1].image_seconds.append(100.0)
    result.presets[1].image_seconds.append(0.2)
    plots.times(result, "image_seconds", "images")
    assert axes[0].get_xlim() == axes[1].get_xlim()
    assert len(axes[1].collections) == len(axes[0].collections) + 1  # the arrow
