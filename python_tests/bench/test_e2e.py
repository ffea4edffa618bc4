"""The end-to-end benchmark: random models of fixed shapes, its rows, and the comparison with upstream."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("transformers")

from flashu_ext.bench import e2e
from flashu_ext.bench.shapes import SHAPES, fill, inputs, weight_plan
from flashu_ext.bench.upstream import Checkout
from flashu_ext.cli.main import cli
from flashu_ext.models.showo2 import Showo2

SETTINGS = e2e.Settings(model="tiny", steps=12, paper_steps=9, repeats=1, tokens=(5,))


def test_bench_shape_is_the_published_one() -> None:
    shape = SHAPES["bench"]
    with torch.device("meta"):
        model = Showo2(shape.config)
    first, head = model.showo.model.layers[0], model.diffusion_head_a
    assert len(model.showo.model.layers) == 14 and len(model.und_trans.layers) == 11 and len(head) == 5
    assert tuple(first.mlp.gate_proj.weight.shape) == (2816, 512)
    assert tuple(first.self_attn.k_proj.weight.shape) == (128, 512)
    assert tuple(head[0].mlp.gate_proj.weight.shape) == (2560, 640)
    assert tuple(head[0].self_attn.k_proj.weight.shape) == (320, 640)
    data = inputs(shape, 0)
    assert data.text_tokens.shape == data.text_tokens_null.shape == (1, 256)
    assert data.positions.tolist() == [[[22, 197]]]
    assert data.noise.shape == (1, 16, 28, 28)


def test_weights_and_inputs_follow_from_the_seed() -> None:
    models = [Showo2(SHAPES["tiny"].config) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        fill(model, seed)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["showo.model.norm.weight"], states[2]["showo.model.norm.weight"])
    first, again, other = (inputs(SHAPES["tiny"], seed) for seed in (0, 0, 1))
    assert torch.equal(first.noise, again.noise) and not torch.equal(first.noise, other.noise)


def test_weight_plan_keeps_both_tasks() -> None:
    model = Showo2(SHAPES["tiny"].config)
    fill(model, 0)
    plan = weight_plan(model, 16)
    assert plan.kept_neurons == 128
    assert not torch.equal(plan.kept("generation", 0), plan.kept("understanding", 0))


def test_rows() -> None:
    report = e2e.run(SETTINGS)
    assert [(row.task, row.preset, row.size) for row in report.rows] == [
        ("generation", "dense", 12),
        ("generation", "exact", 12),
        ("generation", "paper", 12),
        ("generation", "paper", 9),
        ("understanding", "dense", 5),
        ("understanding", "exact", 5),
        ("understanding", "paper", 5),
        ("understanding", "paper, half the image", 5),
    ]
    dense, exact, paper, fewer = report.rows[:4]
    assert report.agrees
    assert exact.difference is not None and exact.difference <= e2e.LATENT_TOLERANCE
    assert (exact.backbone, exact.head) == (11, 11)
    assert paper.head is not None and paper.head < 11
    assert fewer.difference is None and report.baseline_of(fewer) is dense
    assert report.rows[5].equal_tokens == 5
    assert all(len(row.seconds) == 1 and row.median > 0 for row in report.rows)


def test_exact_that_is_not_exact_is_reported() -> None:
    row = e2e.Row("generation", "flashu_ext", "exact", 12, seconds=[1.0], difference=2e-4)
    report = e2e.Report(SETTINGS, [row], {}, "")
    assert not report.agrees and "2.00e-04" in report.disagreement()
    row.difference = float("nan")
    assert not report.agrees
    answer = e2e.Row("understanding", "flashu_ext", "exact", 5, seconds=[1.0], equal_tokens=4)
    assert not e2e.Report(SETTINGS, [answer], {}, "").agrees


def test_command_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "e2e.json"
    arguments = ["bench", "e2e", "--model", "tiny", "--repeats", "1", "--steps", "6", "--paper-steps", "5"]
    result = CliRunner().invoke(cli, [*arguments, "--tokens", "3", "--json", str(path)])
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    assert {row["preset"] for row in record["rows"]} == {"dense", "exact", "paper", "paper, half the image"}
    fewer = [row for row in record["rows"] if not row["equal_steps"]]
    assert [row["size"] for row in fewer] == [5]
    assert record["machine"]["torch"] == torch.__version__


def test_folder_that_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--upstream: expected a Show-o2 checkout with models/"):
        Checkout.load(tmp_path)


@pytest.mark.parametrize("family", ["janusflow", "bagel"])
def test_other_families(family: str) -> None:
    settings = e2e.Settings(model="tiny", family=family, steps=6, paper_steps=4, tokens=(3,), repeats=1)
    report = e2e.run(settings, say=lambda _: None)
    presets = [(row.task, row.preset) for row in report.rows]
    assert ("generation", "exact") in presets and ("understanding", "paper, half the image") in presets
    assert report.agrees and all(len(row.seconds) == 1 for row in report.rows)
    pruned = [row for row in report.rows if row.task == "generation" and row.preset == "paper"]
    assert all(row.difference is None or row.difference > 1e-4 for row in pruned)


def test_only_show_o2_runs_on_a_gpu(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["bench", "e2e", "--family", "bagel", "--gpu"])
    assert done.exit_code == 2 and "--family: expected showo2" in done.output


@pytest.mark.parametrize("drawing", ["text", "plain", "taylorseer"])
def test_bagel_draws_otherwise(drawing: str) -> None:
    settings = e2e.Settings(model="tiny", family="bagel", drawing=drawing, steps=12, paper_steps=8, repeats=1)
    report = e2e.run(dataclasses.replace(settings, tasks=("generation",)), say=lambda text: None)
    presets = ["dense", "exact"] if drawing == "taylorseer" else ["dense", "exact", "paper", "paper"]
    assert [row.preset for row in report.rows] == presets and report.agrees
    exact = report.rows[1]
    assert (exact.backbone == 11) == (drawing != "taylorseer") and exact.difference < 1e-4


def test_a_drawing_is_bagels() -> None:
    done = CliRunner().invoke(cli, ["bench", "e2e", "--drawing", "text", "--model", "tiny"])
    assert done.exit_code == 2 and "--drawing: expected with --family bagel only" in done.output


@pytest.mark.parametrize(
    ("family", "file"), [("bagel", "inferencer.py"), ("janusflow", "janus/janusflow/models/modeling_vlm.py")]
)
def test_a_folder_that_is_no_checkout(family: str, file: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["bench", "e2e", "--family", family, "--model", "tiny", "--upstream", str(tmp_path)])
    assert done.exit_code != 0 and file in done.output
