"""The image folder: other weights or another plan are refused; the order of deletion; the files after an interruption.
leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import small_model

from flashu_ext import FlashUConfig, TaskPlan, accelerate
from flashu_ext.batch.folder import MANIFEST, generate, missing, open_folder, settings_record
from flashu_ext.batch.prompts import make_jobs
from flashu_ext.models.folders import load_pipeline
from flashu_ext.nano.model import load_plan
from flashu_ext.planning.fingerprint import weights_digest


@pytest.mark.parametrize("tied", [False, True])
def test_halving_any_tensor_is_noticed(tied: bool) -> None:
    model = small_model(tied=tied)
    digest = weights_digest(model)
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(0.5)
            assert torch.equal(parameter, before) or weights_digest(model) != digest, name
            parameter.copy_(before)
    assert weights_digest(model) == digest


@pytest.mark.parametrize("matrix", ["gate_proj", "up_proj", "down_proj"])
def test_another_order_of_neurons_is_noticed_where_it_is_another_ffn(matrix: str) -> None:
    """The order of neurons is free, but must be the same in all three matrices of a layer."""
    model = small_model()
    digest = weights_digest(model)
    first, second = (getattr(model.showo.model.layers[layer].mlp, matrix).weight for layer in (0, 1))
    order = torch.arange(64).flip(0)
    with torch.no_grad():
        before = first.clone()
        first.copy_(before[:, order] if matrix == "down_proj" else before[order])
        assert weights_digest(model) != digest
        first.copy_(second)
        second.copy_(before)
        assert weights_digest(model) != digest


def test_an_accelerated_model_has_the_digest_of_the_dense_one() -> None:
    model, generator = small_model(), torch.Generator().manual_seed(0)
    scores = {task: [torch.rand(64, generator=generator) for _ in range(8)] for task in ("generation", "understanding")}
    plan = TaskPlan.from_scores(**scores, ratio=0.25, multiple=16)
    digest, dense = weights_digest(model), model.showo.model.layers[0].mlp.up_proj.weight.clone()
    with accelerate(model, FlashUConfig(ffn_prune_ratio=0.25, prune_multiple=16), plan):
        assert not torch.equal(model.showo.model.layers[0].mlp.up_proj.weight, dense), "the plan is active"
        assert weights_digest(model) == digest


@pytest.mark.parametrize("name", ["showo.model.layers.1.mlp.up_proj.weight", "diffusion_head_a.0.mlp.up_proj.weight"])
def test_other_weights_are_refused(name: str, tmp_path: Path) -> None:
    pipe, jobs = load_pipeline("nano"), make_jobs(["a"])
    open_folder(tmp_path, settings_record(pipe, None), jobs)
    with torch.no_grad():
        pipe.model.get_parameter(name).add_(0.1)
    with pytest.raises(ValueError, match="weights: was"):
        open_folder(tmp_path, settings_record(pipe, None), jobs)


def test_a_manifest_of_the_earlier_version_is_refused_and_can_be_overwritten(tmp_path: Path) -> None:
    """Its hash left most tensors out, so equal weights cannot be recognised."""
    jobs = make_jobs(["a"])
    record = {"version": 1, "settings": {"batch": 1}, "images": [vars(jobs[0]) | {"name": "old.png"}]}
    (tmp_path / MANIFEST).write_text(json.dumps(record))
    (tmp_path / "old.png").write_bytes(b"old")
    with pytest.raises(ValueError, match=f"{MANIFEST}: written by an earlier version of this program, which did not"):
        open_folder(tmp_path, {"batch": 1}, jobs)
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "old.png"]
    assert open_folder(tmp_path, {"batch": 1}, jobs, overwrite=True) == [0]
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_another_plan_is_refused(tmp_path: Path) -> None:
    pipe, jobs = load_pipeline("nano"), make_jobs(["a"])
    plan = load_plan(pipe.model)
    config = FlashUConfig(ffn_prune_ratio=0.25, prune_multiple=plan.multiple)
    open_folder(tmp_path, settings_record(pipe, config, plan.with_ratio(0.25, plan.multiple)), jobs)
    with pytest.raises(ValueError, match="plan: was"):
        open_folder(tmp_path, settings_record(pipe, config, plan.with_ratio(0.5, plan.multiple)), jobs)


def test_what_the_caller_asks_is_recorded() -> None:
    """Before what the config says, and before the pipeline's own; a guidance of 0 is none."""
    pipe = load_pipeline("nano")
    record = settings_record(pipe, FlashUConfig(steps=9), steps=4, guidance_scale=0.0)
    assert (record["steps"], record["guidance"]) == (4, 0.0)
    own = settings_record(pipe, FlashUConfig(steps=9))
    assert (own["steps"], own["guidance"]) == (9, pipe.guidance_scale) and pipe.guidance_scale > 0
    assert settings_record(pipe, None)["steps"] == 50


def test_images_are_deleted_before_their_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = make_jobs(["a", "b"])
    open_folder(tmp_path, {"batch": 1}, jobs)
    for job in jobs:
        (tmp_path / job.name).write_bytes(b"old")
    gone, unlink = [], Path.unlink

    def record(self: Path, missing_ok: bool = False) -> None:
        if self.exists():
            gone.append(self.name)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", record)
    open_folder(tmp_path, {"batch": 2}, jobs, overwrite=True)
    assert gone[-1] == MANIFEST and {job.name for job in jobs} < set(gone)


class _Interrupted:
    """A PIL image whose file is half written when Ctrl-C arrives."""

    def save(self, path: Path, format: str) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt


def test_ctrl_c_while_an_image_is_written_leaves_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, jobs = load_pipeline("nano"), make_jobs(["a red circle", "a blue square"])
    whole = pipe.generate_batch

    def generate_batch(prompts: list[str], *rest: Any, **options: Any) -> list[Any]:
        return [*whole(prompts[:1], [0], 2), _Interrupted()]

    open_folder(tmp_path, {}, jobs)
    monkeypatch.setattr(pipe, "generate_batch", generate_batch)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, jobs, [0], tmp_path, batch=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [jobs[0].name, MANIFEST]
    assert missing(tmp_path, jobs) == [1]
