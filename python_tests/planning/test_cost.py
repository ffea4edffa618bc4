"""Operation counts by hand, and a cost model on a clock that the test turns."""

from __future__ import annotations

import pytest

from flashu_ext.models.parts import Showo2Parts
from flashu_ext.nano.model import load_model
from flashu_ext.planning import cost
from flashu_ext.planning.config import FlashUConfig
from flashu_ext.planning.cost import CostModel, Geometry, dense_flops, image_flops
from flashu_ext.planning.schedule import StepPlan

GEOMETRY = Geometry(prefix=10, span=37, length=64)


@pytest.fixture(scope="module")
def parts() -> Showo2Parts:
    return Showo2Parts.find(load_model())


def test_dense_operations_of_the_language_model(parts: Showo2Parts):
    """Two lengths differ by what is linear and quadratic in tokens, which can be counted by hand for the FFN and lm_head."""
    one = dense_flops(parts, GEOMETRY, 1, guided=False)
    assert dense_flops(parts, GEOMETRY, 3, guided=True) == pytest.approx(6 * one)
    ffn = 6 * (2 * 3 * 128 * 384) * 64
    lm_head = 2 * 128 * parts.lm_head.out_features * 64
    assert one > ffn + lm_head


def test_plans_order_as_their_work(parts: Showo2Parts):
    def flops(**fields: object) -> float:
        return image_flops(parts, StepPlan.build(FlashUConfig(**fields), 20, len(parts.layers)), GEOMETRY)  # type: ignore[arg-type]

    exact = flops()
    assert exact < dense_flops(parts, GEOMETRY, 19)
    assert flops(head_cache_interval=5) < exact
    assert flops(ffn_prune_ratio=0.5) < flops(ffn_prune_ratio=0.2) < exact
    assert exact - flops(ffn_prune_ratio=0.5) == pytest.approx(
        # FFN of the LLM at half the neurons, in every evaluation's span and once in the prompt, in both branches
        2 * 6 * (2 * 3 * 128 * 384) * 0.5 * (19 * 37 + 10)
    )


def test_the_cost_model_adds_up_measured_kinds(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(cost, "_now", lambda: clock[0])
    drawn: list[FlashUConfig] = []

    def draw(config: FlashUConfig, callback: object) -> None:
        drawn.append(config)
        for step in StepPlan.build(config, None, 6).steps:
            clock[0] += 3.0 if step.backbone else 0.5
            callback(step.index, None)  # type: ignore[operator]

    model = CostModel(draw, layers=6, rounds=2)
    cached = FlashUConfig(head_cache_interval=4, steps=20)
    steps = StepPlan.build(cached, None, 6).steps
    assert model.seconds(cached) == pytest.approx(sum(3.0 if s.backbone else 0.5 for s in steps))
    runs = len(drawn)
    # The same kinds of work in other numbers need no further run.
    assert model.seconds(cached.replace(steps=31)) > model.seconds(cached) and len(drawn) == runs
