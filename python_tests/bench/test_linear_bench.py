"""`bench linear` at its smallest: every row is measured, and the figures are written."""

import json
from pathlib import Path

from click.testing import CliRunner

from flashu_ext.bench import linear
from flashu_ext.cli.main import cli


def test_every_shape_and_number_of_rows_is_measured(tmp_path: Path):
    file = tmp_path / "linear.json"
    command = ["bench", "linear", "--shape", "kv", "--rows", "1", "--rows", "3", "--seconds", "0"]
    result = CliRunner().invoke(cli, [*command, "--epilogue", "gelu", "--dtype", "bf16", "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert [(row["shape"], row["rows"]) for row in rows] == [("kv", 1), ("kv", 3)]
    assert all(row["torch_us"] > 0 and row["linear_us"] > 0 for row in rows)
    assert "bf16, epilogue gelu" in result.output and "256 x 1536" in result.output


def test_the_command_offers_every_shape():
    from flashu_ext.cli.bench import bench

    shapes = next(option for option in bench.commands["linear"].params if option.name == "shapes")
    assert tuple(shapes.type.choices) == tuple(linear.SHAPES)
