"""The search: its settings meet the fidelity on its split, it reports on another split, and other commands accept its files."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashu_ext.models.accelerated import handle_of
from flashu_ext.nano.evaluate import Proportion
from flashu_ext.nano.model import load_model, load_plan
from flashu_ext.nano.probe import Probe
from flashu_ext.nano.showo2 import SUBJECT
from flashu_ext.nano.world import scenes
from flashu_ext.planning.config import FlashUConfig
from flashu_ext.planning.plan import TaskPlan
from flashu_ext.studies import tuning
from flashu_ext.studies.tuning import KNOBS, Tuned, tune

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
    result = tune(model, plan, 0.99, base=base, paper=SUBJECT.preset_config("paper"), knobs=knobs, **SIZES)
    steps = [trial for trial in result.trials if trial.knob == "steps"]
    assert steps and all(trial.seconds < trial.before for trial in steps)
    dense_drawn, dense_answered = result.dense
    for trial in result.trials:
        held = trial.adherence.value >= 0.99 * dense_drawn.value and trial.accuracy.value >= 0.99 * dense_answered.value
        assert trial.accepted == held
    # Two grid points are one evaluation, which gives no image.
    assert result.config.steps in (10, 7) and [p.name for p in result.points] == ["dense", "exact", "paper", "tuned"]
    result.save(tmp_path, plan)
    config = FlashUConfig.from_json((tmp_path / "config.json").read_text())
    assert config == result.config
    written = TaskPlan.load(tmp_path / "plan.safetensors", model=model)
    assert written.ratio == config.ffn_prune_ratio or config.ffn_prune_ratio == 0
    record = json.loads((tmp_path / "tuning.json").read_text())
    assert len(record["trials"]) == len(result.trials) and "on the other split" in result.table()


class Machine:
    """Simulates the embedded model and a clock: a handle's n-th answer takes 100 / n seconds, with fewer visual tokens half
    of that; images are their noise, and a step takes a second.

    Attributes:
        asked: the questions asked of each handle, in the order of the handles. drawn: the probe of every call of `draw`.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self.now = 0.0
        self.asked: dict[Any, list[int]] = {}
        self.probes: list[Probe] = []
        self.drawn: list[Probe] = []
        self.compared: list[Probe] = []
        patch.setattr(tuning, "time", SimpleNamespace(perf_counter=lambda: self.now))
        patch.setattr("flashu_ext.planning.cost._now", lambda: self.now)
        patch.setattr(Probe, "ask", self._ask())
        patch.setattr(Probe, "generate", self._draw())
        patch.setattr(tuning, "compare", self._compare)

    def _ask(self) -> Callable[..., Any]:
        def ask(probe: Probe, model: Any, number: int) -> tuple[str, list[int]]:
            numbers = self.asked.setdefault(handle := handle_of(model), [])
            numbers.append(number)
            fewer = handle is not None and handle.config.token_prune_ratio > 0
            self.now += (50 if fewer else 100) / len(numbers)
            return "", []

        return ask

    def _draw(self) -> Callable[..., Any]:
        def draw(probe: Probe, model: Any, chosen: Any, steps: Any = None, callback: Any = None) -> Any:
            self.drawn.append(probe)
            handle = handle_of(model)
            for step in range(1, handle.config.steps or 50) if callback is not None else ():
                self.now += 1.0
                callback(step, None)
            return probe.noise[list(chosen)]

        return draw

    def _compare(self, model: Any, settings: Any, probe: Probe, *rest: Any, **options: Any) -> list[Any]:
        self.compared.append(probe)
        return []


ANSWERING = {"visual tokens": KNOBS["visual tokens"][:2]}


def test_the_first_two_answers_are_not_timed(monkeypatch: pytest.MonkeyPatch):
    machine, model = Machine(monkeypatch), load_model()
    result = tune(model, load_plan(model), knobs=ANSWERING, **{**SIZES, "questions": 40})
    (trial,) = result.trials
    priced = [numbers for handle, numbers in machine.asked.items() if handle is not None][:2]
    assert len(priced[0]) == len(priced[1]) > 4 and len(priced[0]) % 2
    expected = statistics.median(100 / n for n in range(3, len(priced[0]) + 1))
    assert trial.before == pytest.approx(expected) and trial.seconds == pytest.approx(expected / 2)


def test_an_answer_is_timed_on_a_picture_not_seen_before(monkeypatch: pytest.MonkeyPatch):
    machine, model = Machine(monkeypatch), load_model()
    probe = Probe.build(SIZES["drawings"], 40, 0, "training")
    tune(model, load_plan(model), knobs=ANSWERING, **{**SIZES, "questions": 40})
    priced = next(numbers for handle, numbers in machine.asked.items() if handle is not None)
    pictures = [probe.asked[number][0] for number in priced]
    assert sorted(pictures) == list(range(len(probe.pictures)))


def test_the_walk_sees_training_scenes_and_the_report_others(monkeypatch: pytest.MonkeyPatch):
    machine, model = Machine(monkeypatch), load_model()
    knobs = {"steps": [{"steps": 10}, {"steps": 7}], **ANSWERING}
    base = FlashUConfig.exact(steps=10)
    tune(model, load_plan(model), base=base, knobs=knobs, **{**SIZES, "drawings": 30, "report_drawings": 30})
    held_out = [*scenes(True, 1), *scenes(True, 2)]
    (report,) = machine.compared
    assert report.scenes and all(scene in held_out for scene in report.scenes)
    assert machine.drawn and not any(scene in held_out for probe in machine.drawn for scene in probe.scenes)


def test_files_are_saved_whole_and_the_plan_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """If the disk fills up at the second file, the plan is new and the other files are unchanged."""
    model = load_model()
    plan, result = load_plan(model), Tuned(0.9, FlashUConfig.exact(), "", {}, [], (Proportion(1, 1), Proportion(1, 1)))
    names = ["config.json", "plan.safetensors", "tuning.json"]
    for name in names:
        (tmp_path / name).write_text("old")
    written, real = [], os.fsync

    def fsync(file: int) -> None:
        written.append(file)
        if len(written) == 2:
            raise OSError("no space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="no space left"):
        result.save(tmp_path, plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [(tmp_path / name).read_bytes() == b"old" for name in names] == [True, False, True]
    assert TaskPlan.load(tmp_path / "plan.safetensors", model=model).ratio == 0
    result.save(tmp_path, plan)
    assert len(written) == 5 and json.loads((tmp_path / "tuning.json").read_text())["fidelity"] == 0.9


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
