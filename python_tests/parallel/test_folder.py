"""The image folder: other weights or another plan are refused, and the order in which it is emptied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashu_ext import FlashUConfig
from flashu_ext.batch.folder import MANIFEST, open_folder, settings_record
from flashu_ext.batch.prompts import make_jobs
from flashu_ext.nano.model import load_plan
from flashu_ext.nano.pipeline import load_pipeline


def test_other_attention_weights_are_refused(tmp_path: Path) -> None:
    pipe, jobs = load_pipeline(None, "cpu"), make_jobs(["a"])
    open_folder(tmp_path, settings_record(pipe, None), jobs)
    with torch.no_grad():
        pipe.model.showo.model.layers[1].self_attn.q_proj.weight.add_(0.1)
    with pytest.raises(ValueError, match="weights: was"):
        open_folder(tmp_path, settings_record(pipe, None), jobs)


def test_another_plan_is_refused(tmp_path: Path) -> None:
    pipe, jobs = load_pipeline(None, "cpu"), make_jobs(["a"])
    plan = load_plan(pipe.model)
    config = FlashUConfig(ffn_prune_ratio=0.25, prune_multiple=plan.multiple)
    open_folder(tmp_path, settings_record(pipe, config, plan.with_ratio(0.25, plan.multiple)), jobs)
    with pytest.raises(ValueError, match="plan: was"):
        open_folder(tmp_path, settings_record(pipe, config, plan.with_ratio(0.5, plan.multiple)), jobs)


def test_images_go_before_their_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
