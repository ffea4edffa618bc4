"""The analysis: its statistics against simulation, and a small run on the embedded model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from flashu_ext.nano.calibrate import samples
from flashu_ext.nano.evaluate import Proportion
from flashu_ext.nano.model import load_model
from flashu_ext.planning.plan import TaskPlan
from flashu_ext.report.render import render_analysis
from flashu_ext.studies import analysis


@pytest.mark.parametrize(("total", "size"), [(12, 3), (40, 20), (9, 9), (5, 1)])
def test_expected_jaccard_is_that_of_random_sets(total: int, size: int):
    rng = random.Random(0)
    overlaps = []
    for _ in range(4000):
        a, b = (torch.tensor(rng.sample(range(total), size)) for _ in range(2))
        overlaps.append(analysis.jaccard(a, b))
    assert analysis.expected_jaccard(total, size) == pytest.approx(sum(overlaps) / len(overlaps), abs=0.015)
    with pytest.raises(ValueError, match="size: expected 1 to"):
        analysis.expected_jaccard(total, total + 1)


def test_overlap_knows_equal_and_disjoint_sets():
    up, down = torch.arange(20.0).repeat(2, 1), torch.arange(20.0).flip(0).repeat(2, 1)
    same, different = (
        TaskPlan({"generation": up, "understanding": up}, 0.2, 1),
        TaskPlan({"generation": up, "understanding": down}, 0.2, 1),
    )
    assert analysis.overlaps(same, [same, same], [0.2])[0].tasks == (1.0, 1.0)
    found = analysis.overlaps(different, [different, different], [0.2])[0]
    assert found.tasks == (0.0, 0.0) and found.mean_half("generation") == 1.0 and 0 < found.expected < 0.2


def test_removing_a_set_takes_its_neurons_from_both_tasks():
    generator = torch.Generator().manual_seed(0)
    plan = TaskPlan({task: torch.rand(2, 40, generator=generator) for task in ("generation", "understanding")}, 0.2, 1)
    without = analysis._without(plan, "generation:most", 0.25, 0)
    critical = set(torch.topk(plan.scores["generation"][1], 10).indices.tolist())
    for task in without.tasks:
        assert set(range(40)) - set(without.kept(task, 1).tolist()) == critical
    least = analysis._without(plan, "understanding:least", 0.25, 0)
    lowest = set(torch.topk(-plan.scores["understanding"][0], 10).indices.tolist())
    assert set(range(40)) - set(least.kept("generation", 0).tolist()) == lowest


def test_a_small_run_becomes_a_page(tmp_path: Path):
    result = analysis.run(load_model(), samples, count=4, drawings=2, questions=3, removed=(0.2,), progress=False)
    assert [r.of for r in result.removals] == list(analysis.REMOVED_SETS)
    assert isinstance(result.intact.adherence, Proportion) and result.intact.accuracy.n == 3
    assert len(result.importance["generation"][0]) == result.layers == 6
    assert all(0 <= c for c in result.drift.relative_l2) and len(result.drift.cosine) == analysis.STEPS - 2
    assert json.loads(result.to_json())["verdicts"] == result.verdicts
    page = render_analysis(result)
    assert page.count("<img") >= 4 and result.verdicts[0].split(";")[0][:20] in page
    assert "http" not in page.replace("http://www.w3.org", "")
