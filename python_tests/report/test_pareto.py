"""The fidelity report: its front, its gates, and a small run."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashu_ext.nano.model import load_model, load_plan
from flashu_ext.nano.probe import Probe
from flashu_ext.nano.showo2 import SUBJECT
from flashu_ext.planning.config import FlashUConfig
from flashu_ext.report import pareto
from flashu_ext.report.pareto_plots import front
from flashu_ext.report.render import render_fidelity
from flashu_ext.studies.comparison import Setting, compare


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_the_front_holds_the_settings_that_none_dominates(values: list[tuple[int, int]]):
    points = [(float(x), float(y)) for x, y in values]
    chosen = front(points)
    for x, y in points:
        beaten = any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)
        assert beaten or (x, y) in [points[k] for k in chosen]
    costs = [points[i] for i in chosen]
    assert costs == sorted(costs) and all(b[1] > a[1] for a, b in itertools.pairwise(costs))


def test_a_small_report():
    chosen = [
        Setting("dense", "dense, fewer steps", None, 6),
        Setting("exact", "exact", FlashUConfig.exact(steps=6)),
        Setting("cached", "one knob", FlashUConfig(head_cache_interval=3, steps=6)),
    ]
    result = pareto.run(2, 3, 1, chosen=chosen, progress=False)
    dense, exact, cached = result.points
    # Exact differs by rounding, in a few pixels.
    assert dense.psnr == 100 and exact.psnr > 60 and exact.equal_answers.value == 1.0
    assert exact.ssim == pytest.approx(1.0, abs=1e-4)
    assert cached.psnr < exact.psnr and exact.flops < dense.flops and cached.flops < exact.flops
    assert [gate.setting for gate in result.gates] == ["exact", "exact"] and all(gate.passed for gate in result.gates)
    record = json.loads(result.to_json())
    assert record["points"][1]["image_median"] == exact.image_time and "exact" in result.table()
    page = render_fidelity(result)
    assert page.count("<img") == 6 and "cached" in page


def test_a_gate_fails_where_both_intervals_are_apart():
    model = load_model()
    broken = Setting("broken", "fast", FlashUConfig(layer_skip_ratio=0.9, layer_skip_interval=5, steps=12))
    points = compare(model, [Setting("dense", "", None, 12), broken], Probe.build(20, 1), None, repeats=1)
    gates = pareto.gates(points, ["broken"])
    assert not gates[0].passed and gates[0].task == "drawing" and gates[1].task == "answering"


def test_dense_comes_first():
    with pytest.raises(ValueError, match="expected dense first"):
        compare(load_model(), [Setting("exact", "", FlashUConfig.exact())], Probe.build(1, 1), None)
    with pytest.raises(ValueError, match="probe: expected drawings and questions, got 1 and 0"):
        compare(load_model(), [Setting("dense", "", None)], Probe.build(1, 0), None)


def test_presets_keep_the_fidelity_that_was_measured():
    """Measured once on these seeds: paper 24/24 images, 59/60 answers, PSNR 41.6 dB to dense; fast 24/24, 59/60, 36.8 dB."""
    model = load_model()
    probe = Probe.build(24, 60, seed=3)
    settings = [
        Setting("dense", "", None),
        *(Setting(name, name, SUBJECT.preset_config(name)) for name in ("paper", "fast")),
    ]
    dense, paper, fast = compare(model, settings, probe, load_plan(model), repeats=1)
    for point, psnr in ((paper, 39.5), (fast, 34.5)):
        assert point.adherence.right >= 22 and point.accuracy.right >= dense.accuracy.right - 2 and point.psnr > psnr
    assert fast.flops < paper.flops / 1.5 < dense.flops / 3
