"""The README's tables come from the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from flashu_ext.bench import ffn
from flashu_ext.bench.readme import PAGES, RESULTS, filled
from flashu_ext.bench.readme import main as readme_command


def section(name: str) -> str:
    return f"before\n<!-- results: {name} -->\nold\n<!-- end -->\nafter"


def test_a_measured_result_becomes_a_table(tmp_path: Path):
    report = ffn.run(ffn.Settings(shape="bench", rows=(1,), seconds=0.0))
    (tmp_path / "ffn_small.json").write_text(report.to_json())
    text = filled(section("ffn_small"), tmp_path)
    assert text.startswith("before\n") and text.endswith("\nafter") and "old" not in text
    assert "| tokens | torch dense |" in text and report.machine in text and "fp32" in text
    assert filled(text, tmp_path) == text


@pytest.mark.parametrize(("name", "said"), [("ffn_other", "is missing"), ("speed", "expected one of")])
def test_sections_without_a_result_are_refused(tmp_path: Path, name: str, said: str):
    with pytest.raises(ValueError, match=said):
        filled(section(name), tmp_path)


@pytest.mark.parametrize("source", PAGES, ids=lambda page: page.name)
def test_check_finds_a_number_typed_by_hand(source: Path, tmp_path: Path):
    text = source.read_text()
    page = tmp_path / source.name
    page.write_text(text)
    assert "<!-- results:" in text
    assert CliRunner().invoke(readme_command, ["--check", "--page", str(page)]).exit_code == 0
    page.write_text(text.replace("<!-- end -->", "typed\n<!-- end -->", 1))
    assert CliRunner().invoke(readme_command, ["--check", "--page", str(page)]).exit_code == 1
    assert CliRunner().invoke(readme_command, ["--page", str(page)]).exit_code == 0
    assert page.read_text() == text


def test_every_result_records_its_command():
    files = list(RESULTS.glob("*.json"))
    assert files
    for file in files:
        record = json.loads(file.read_text())
        assert record["command"] and record["machine"], file
