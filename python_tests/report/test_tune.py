"""The search: what it keeps holds on its split, and what it writes is what other commands take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashu_ext.nano.evaluate import preset_config
from flashu_ext.nano.model import load_model, load_plan
from flashu_ext.planning.config import FlashUConfig
from flashu_ext.planning.plan import TaskPlan
from flashu_ext.studies.tuning import KNOBS, tune

SIZES = {"drawings": 4, "questions": 4, "report_drawings": 2, "report_questions": 2, "repeats": 1, "progress": False}


def test_the_walk_keeps_what_holds(tmp_path: Path):
    model = load_model()
    plan = load_plan(model)
    knobs = {
        "steps": [{"steps": 10}, {"steps": 7}, {"steps": 2}],
        "neurons": KNOBS["neurons"][:2],
        "visual tokens": [{"token_prune_ratio": 0.0}, {"token_prune_ratio": 0.9}],
    }
    base = FlashUConfig.exact(steps=10, prune_multiple=plan.multiple)
    result = tune(model, plan, 0.99, base=base, paper=preset_config("paper"), knobs=knobs, **SIZES)
    steps = [trial for trial in result.trials if trial.knob == "steps"]
    assert steps and all(trial.seconds < trial.before for trial in steps)
    dense_drawn, dense_answered = result.dense
    for trial in result.trials:
        held = trial.adherence.share >= 0.99 * dense_drawn.share and trial.accuracy.share >= 0.99 * dense_answered.share
        assert trial.accepted == held
    # Two grid points are one evaluation, which draws nothing.
    assert result.config.steps in (10, 7) and [p.name for p in result.points] == ["dense", "exact", "paper", "tuned"]
    result.save(tmp_path, plan)
    config = FlashUConfig.from_json((tmp_path / "config.json").read_text())
    assert config == result.config
    written = TaskPlan.load(tmp_path / "plan.safetensors", model=model)
    assert written.ratio == config.ffn_prune_ratio or config.ffn_prune_ratio == 0
    record = json.loads((tmp_path / "tuning.json").read_text())
    assert len(record["trials"]) == len(result.trials) and "on the other split" in result.table()


@pytest.mark.parametrize("fidelity", [0.0, 1.5, float("nan")])
def test_fidelity_is_a_share(fidelity: float):
    with pytest.raises(ValueError, match="fidelity: expected a number in"):
        tune(load_model(), load_plan(load_model()), fidelity)
    with pytest.raises(ValueError, match="fidelity: expected a number in"):
        FlashUConfig.fast(fidelity)


def test_fast_takes_the_least_fidelity_that_is_not_below():
    settings = json.loads((Path(__file__).parents[2] / "flashu_ext" / "planning" / "tuned.json").read_text())[
        "settings"
    ]
    for entry in settings:
        assert FlashUConfig.fast(entry["fidelity"]) == FlashUConfig.from_json(json.dumps(entry["config"]))
    lowest = min(settings, key=lambda entry: entry["fidelity"])
    assert FlashUConfig.fast(0.01) == FlashUConfig.from_json(json.dumps(lowest["config"]))
    assert FlashUConfig.fast(1.0) == FlashUConfig.exact() and FlashUConfig.fast(0.9, steps=7).steps == 7
