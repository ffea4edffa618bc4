"""`python -m flashu_ext.bench profile`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from flashu_ext.bench.profile import main, run


@pytest.mark.parametrize(
    ("task", "preset"), [("generation", "exact"), ("generation", "paper"), ("understanding", "exact")]
)
def test_shares_are_of_all_time(task: str, preset: str) -> None:
    report = run(task, "tiny", preset, size=4)
    assert sum(row.share for row in report.rows) == pytest.approx(1)
    ours = sum(row.share for row in report.rows if row.operator.startswith("flashu::"))
    assert report.ours == pytest.approx(ours) and 0 < ours < 1
    assert any(row.operator == "flashu::gathered_ffn" and row.calls for row in report.rows)


def test_too_small_a_share_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    arguments = ["--model", "tiny", "--size", "3", "--json", str(file)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert json.loads(file.read_text())["size"] == 3
    failed = CliRunner().invoke(main, [*arguments, "--at-least", "1"])
    assert failed.exit_code == 1 and "expected at least 100 %" in failed.output
