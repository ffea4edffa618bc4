"""Operators per evaluation, and memory at the published shapes within the stated limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from flashu_ext.bench import steps

GIB = 2**30


@pytest.mark.parametrize(("name", "limit"), [("1.5b", 12), ("7b", 24)])
def test_four_images_fit_with_room_for_intermediates(name: str, limit: int) -> None:
    one, four = steps.memory(name, 1), steps.memory(name, 4)
    assert four["weights"] == one["weights"] > GIB
    assert one["keys and values"] < four["keys and values"]
    assert sum(four.values()) < (limit - 5) * GIB


def test_operators_and_memory_are_a_command(tmp_path: Path) -> None:
    result = CliRunner().invoke(steps.main, ["--json", str(tmp_path / "steps.json")])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "steps.json").read_text())
    assert steps.tables(record) in result.output
    counted = record["launches"]["evaluation"]
    assert counted["paper"]["head cached"] < 10
    assert counted["dense"]["full"] > 2 * counted["exact"]["full"]
    token = record["launches"]["answer token"]
    assert token["dense"] > 3 * token["exact"]
