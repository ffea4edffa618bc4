"""The command line: help with examples, exit codes, the plan table, and a build without kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from flashu_ext.cli import cli
from flashu_ext.config import FlashUConfig


def run(*arguments: str):
    return CliRunner().invoke(cli, list(arguments))


def own_commands(group: click.Group, path: tuple[str, ...] = ()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from own_commands(command, (*path, name))
        elif command.add_help_option:  # the others hand their arguments on
            yield (*path, name)


@pytest.mark.parametrize("path", list(own_commands(cli)), ids=" ".join)
def test_help_has_an_example(path: tuple[str, ...]) -> None:
    result = run(*path, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.output
    assert "flashu-ext " + " ".join(path) in result.output


def test_commands() -> None:
    assert set(cli.commands) == {"demo", "generate", "answer", "plan", "bench", "info"}
    assert set(cli.commands["bench"].commands) == {"ffn", "e2e"}


def test_version() -> None:
    import flashu_ext

    result = run("--version")
    assert result.exit_code == 0
    assert flashu_ext.__version__ in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("plan", "--preset", "nonsense"),
        ("plan", "--steps", "1"),
        ("generate",),
        ("generate", "a circle", "--steps", "many"),
        ("generate", "a circle", "-o", "/no/such/folder/out.png"),
        ("answer", "/no/such/image.png", "what colour is it?"),
        ("bench", "e2e", "--repeats", "0"),
        ("bench", "e2e", "--upstream", "/no/such/folder"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output


def test_failure_is_1_and_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"ffn_prune_ratio": NaN}')
    result = run("plan", "--config", str(path))
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "NaN" in result.output
    assert result.output.count("\n") == 1


def test_traceback_is_there_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[]")
    result = run("--traceback", "plan", "--config", str(path))
    assert isinstance(result.exception, ValueError)


def test_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("flashu_ext.showo2.pipeline")
    result = run("generate", "a red circle", "--model", str(tmp_path / "absent"), "-o", str(tmp_path / "out.png"))
    assert result.exit_code == 1
    assert result.output.count("\n") == 1 and "absent" in result.output
    assert not (tmp_path / "out.png").exists()


def test_plan_of_paper_names_the_totals() -> None:
    result = run("plan", "--preset", "paper", "--steps", "35")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].split() == ["step", "kind", "FFN", "layers", "head", "guidance"]
    assert lines[-1].startswith("35 grid points = 34 evaluations: 19 run the backbone, 18 the head, 15 were dead")
    assert len(lines) == 34 + 3


def test_plan_as_json_agrees_with_the_table() -> None:
    record = json.loads(run("plan", "--steps", "35", "--json").output)
    assert (record["evaluations"], record["backbone"], record["head"], record["dead"]) == (34, 19, 18, 15)
    assert [step["index"] for step in record["steps"]] == list(range(1, 35))
    assert sum(record["kinds"].values()) == 34
    assert record["steps"][0]["guidance"] == 3.75 and record["steps"][-1]["guidance"] == 5.0


def test_plan_of_exact_runs_everything() -> None:
    record = json.loads(run("plan", "--preset", "exact", "--steps", "10", "--json").output)
    assert record["backbone"] == record["head"] == 9 and record["dead"] == 0


def test_plan_from_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(FlashUConfig(head_cache_interval=3, steps=12).to_json())
    record = json.loads(run("plan", "--config", str(path), "--json").output)
    assert record["grid_points"] == 12 and record["head"] < record["evaluations"]


def test_layers_that_round_down_to_none_are_known() -> None:
    record = json.loads(run("plan", "--layers", "4", "--json").output)
    assert "measure" not in record["kinds"]


LIGHT = """
import sys
import flashu_ext.cli
heavy = {"torch", "transformers", "numpy", "matplotlib", "jinja2", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_the_command_line_is_light() -> None:
    subprocess.run([sys.executable, "-c", LIGHT], check=True, timeout=60)


WITHOUT_EXTENSION = """
import importlib.abc, pathlib, sys
import flashu_ext._native as native
native.LIBRARY = pathlib.Path("/nonexistent/libflashu_torch.so")
from flashu_ext.cli import main
main(["info"])
"""


def test_info_works_without_the_extension() -> None:
    pytest.importorskip("flashu_ext.info")
    result = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "torch" in result.stdout


def test_plan_shows_the_columns_of_knobs_that_are_on(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = FlashUConfig(
        steps=8, token_skip=True, token_skip_ratio=0.5, encoder_cache=True, adaptive_cache=True, skip_unit_guidance=True
    )
    path.write_text(config.to_json())
    lines = run("plan", "--config", str(path), "--guidance", "1").output.splitlines()
    assert lines[0].split() == "step kind encoder FFN layers tokens head branches guidance".split()
    assert lines[3].split()[-2:] == ["one", "1"] and "run the encoder; 5 of these may be cached" in lines[-1]
    record = json.loads(run("plan", "--config", str(path), "--json").output)
    assert record["adaptive"] == 5 and record["encoder"] == 4 and record["steps"][1]["tokens_from"] == [1]
