"""Operation counts by hand, and a cost model on a simulated clock."""

from __future__ import annotations

import dataclasses

import pytest

from flashu_ext import Execution, FfnPruning, HeadCaching, LayerSkip, TokenSkip
from flashu_ext.models.adapter import adapter_of
from flashu_ext.nano.model import load_model
from flashu_ext.planning import cost
from flashu_ext.planning.config import FlashUConfig
from flashu_ext.planning.cost import CostModel, Geometry, ModelShape, dense_flops, image_flops, llm_layer_flops
from flashu_ext.planning.schedule import StepPlan

GEOMETRY = Geometry(prefix=10, span=37, length=64)


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return adapter_of(load_model()).shape()


def test_dense_operations_of_the_language_model(shape: ModelShape):
    """The FFN and lm_head are linear in tokens, so two lengths give counts that can be checked by hand."""
    one = dense_flops(shape, GEOMETRY, 1, guided=False)
    assert dense_flops(shape, GEOMETRY, 3, guided=True) == pytest.approx(6 * one)
    ffn = 6 * (2 * 3 * 128 * 384) * 64
    lm_head = shape.lm_head * 64
    assert one > ffn + lm_head
    assert shape.lm_head == 2 * 128 * load_model().showo.lm_head.out_features


def test_a_layer_by_hand(shape: ModelShape):
    """Nano: width 128, 4 heads and 2 key and value heads of 32, FFN of 384."""
    key_value, rest, ffn = 2 * 128 * 64 * 2, 2 * 128 * 128 * 2, 2 * 3 * 128 * 384
    assert llm_layer_flops(shape.layers[0], 7, 11) == 7 * (key_value + rest + ffn) + 4 * 128 * 7 * 11
    assert llm_layer_flops(shape.layers[0], 7, 11, kept=0.5, active=3) == (
        7 * key_value + 3 * (rest + ffn / 2) + 4 * 128 * 3 * 11
    )


def test_plans_order_as_their_work(shape: ModelShape):
    def flops(**fields: object) -> float:
        return image_flops(shape, StepPlan.build(FlashUConfig(**fields), 20, len(shape.layers)), GEOMETRY)  # type: ignore[arg-type]

    exact = flops()
    assert exact < dense_flops(shape, GEOMETRY, 19)
    assert flops(head_cache_interval=5) < exact
    assert flops(ffn_prune_ratio=0.5) < flops(ffn_prune_ratio=0.2) < exact
    assert exact - flops(ffn_prune_ratio=0.5) == pytest.approx(
        # half the FFN neurons: in the span of every evaluation and once in the prompt, in both branches
        2 * 6 * (2 * 3 * 128 * 384) * 0.5 * (19 * 37 + 10)
    )


def test_the_cost_model_adds_up_measured_kinds(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(cost, "_now", lambda: clock[0])
    generated: list[FlashUConfig] = []

    def generate(config: FlashUConfig, callback: object) -> None:
        generated.append(config)
        for step in StepPlan.build(config, None, 6).steps:
            clock[0] += 3.0 if step.backbone else 0.5
            callback(step.index, None)  # type: ignore[operator]

    model = CostModel(generate, layers=6, guidance_scale=2.5, image_tokens=36, rounds=2)
    cached = FlashUConfig(head_cache_interval=4, steps=20)
    steps = StepPlan.build(cached, None, 6).steps
    assert model.seconds(cached) == pytest.approx(sum(3.0 if s.backbone else 0.5 for s in steps))
    runs = len(generated)
    # Other counts of the same kinds of work need no further run.
    assert model.seconds(cached.replace(steps=31)) > model.seconds(cached) and len(generated) == runs


def test_one_branch_is_priced_as_one(shape: ModelShape):
    """Steps at unit guidance run only the conditional branch: half of everything but the shared encoder."""
    unit = FlashUConfig(steps=20, guidance=[(19, 1.0)], execution=Execution(skip_unit_guidance=True))
    both = unit.replace(skip_unit_guidance=False)
    encoder = shape.encoder
    encoded = 19 * (encoder.linear * 36 + encoder.layers * 4 * encoder.width * 36 * 36)

    def price(config: FlashUConfig, guided: bool = True) -> float:
        return image_flops(shape, StepPlan.build(config, None, 6, 2.5), GEOMETRY, guided)

    assert price(unit) - encoded == pytest.approx((price(both) - encoded) / 2)
    assert price(unit) == price(both, guided=False)
    # When the second branch returns, the prompt is computed for both.
    late = unit.replace(guidance=[(9, 1.0)])
    halved = 9 / 19 * (price(both) - price(unit))
    one_prompt = 6 * llm_layer_flops(shape.layers[0], 10, 10) + sum(
        (b.key_value + b.attention + b.ffn) * 10 + b.modulation + b.products(10, 10) for b in shape.blocks
    )
    one_prompt += shape.head_input * 10
    assert price(late) == pytest.approx(price(both) - halved + one_prompt * (1 + 9 / 19))


def test_a_relative_scale_of_one_is_found_by_the_callers_scale():
    """The cost model uses the plan that generation follows, so both kinds of step are measured separately."""
    config = FlashUConfig(steps=8, guidance=[(4, 0.4)], guidance_relative=True, skip_unit_guidance=True)
    plan = StepPlan.build(config, None, 6, 2.5, 36)
    assert [step.guided for step in plan.steps] == [False] * 4 + [True] * 3
    assert CostModel(lambda *_: None, 6, guidance_scale=2.5, image_tokens=36).plan(config) == plan


def test_a_step_of_one_branch_has_a_time_of_its_own(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(cost, "_now", lambda: clock[0])
    config = FlashUConfig(steps=8, guidance=[(4, 1.0)], skip_unit_guidance=True)

    def generate(config: FlashUConfig, callback: object) -> None:
        for step in StepPlan.build(config, None, 6, 2.5).steps:
            clock[0] += 2.0 if step.guided else 1.0
            callback(step.index, None)  # type: ignore[operator]

    model = CostModel(generate, layers=6, guidance_scale=2.5, image_tokens=36)
    assert model.seconds(config) == pytest.approx(4 * 1.0 + 3 * 2.0)
    assert model.seconds(config.replace(guidance=[(6, 1.0)])) == pytest.approx(6 * 1.0 + 1 * 2.0)


@pytest.mark.parametrize("time_token", [True, False])
def test_skipped_tokens_are_counted_without_the_time_token(shape: ModelShape, time_token: bool):
    """0.245 of 36 image tokens is 8, of 37 it would be 9: the time token is never among them."""
    shape = dataclasses.replace(shape, time_token=time_token)
    geometry = Geometry(prefix=10, span=36 + time_token, length=64)
    config = FlashUConfig(steps=6, tokens=TokenSkip(0.245, interval=5))
    plan = StepPlan.build(config, None, 6, None, 36)
    dense = StepPlan.build(config.replace(tokens=None), None, 6)
    routed = sum(bool(step.tokens_from) for step in plan.steps)
    layer, keys = shape.layers[0], 10 + geometry.span
    saved = 8 * (layer.attention + layer.ffn) + layer.products(8, keys)
    assert routed == 4
    assert image_flops(shape, dense, geometry) - image_flops(shape, plan, geometry) == pytest.approx(
        2 * 6 * routed * saved
    )


def test_kinds_differ_by_what_is_left_out():
    """The same step with another pruned proportion is another kind of work, measured separately."""
    generated: list[FlashUConfig] = []

    def generate(config: FlashUConfig, callback: object) -> None:
        generated.append(config)
        for step in StepPlan.build(config, None, 6, 2.5, 36).steps:
            callback(step.index, None)  # type: ignore[operator]

    model = CostModel(generate, layers=6, guidance_scale=2.5, image_tokens=36, rounds=1)
    configs = [
        FlashUConfig(steps=8, **fields)
        for share in (0.2, 0.4)
        for fields in (
            {"ffn": FfnPruning(share)},
            {"tokens": TokenSkip(share)},
            {"layers": LayerSkip(share, 5)},
            {"head": HeadCaching(3, order=round(5 * share))},
        )
    ]
    for config in (*configs, *configs):
        model.seconds(config)
    assert list(dict.fromkeys(generated)) == configs and len(generated) == 2 * len(configs)


def test_the_first_image_of_a_measurement_warms_up(monkeypatch: pytest.MonkeyPatch):
    clock, images = [0.0], [0]
    monkeypatch.setattr(cost, "_now", lambda: clock[0])

    def generate(config: FlashUConfig, callback: object) -> None:
        images[0] += 1
        for step in StepPlan.build(config, None, 6).steps:
            clock[0] += 100.0 if images[0] == 1 else 1.0
            callback(step.index, None)  # type: ignore[operator]

    model = CostModel(generate, layers=6, guidance_scale=2.5, image_tokens=36, rounds=1)
    assert model.seconds(FlashUConfig(steps=8)) == pytest.approx(7.0) and images[0] == 2


def test_steps_that_wait_for_the_adaptive_caches_flag_have_a_time_of_their_own(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(cost, "_now", lambda: clock[0])

    def generate(config: FlashUConfig, callback: object) -> None:
        for step in StepPlan.build(config, None, 6).steps:
            clock[0] += (3.0 - config.adaptive_cache_budget if step.adaptive else 2.0) if step.backbone else 0.5
            callback(step.index, None)  # type: ignore[operator]

    model = CostModel(generate, layers=6, guidance_scale=2.5, image_tokens=36)
    adaptive = FlashUConfig(steps=8, full_network_steps=2, head=HeadCaching(adaptive=True, budget=0.25))
    assert model.seconds(adaptive.replace(head=None)) == pytest.approx(7 * 2.0)
    flags = StepPlan.build(adaptive, None, 6).adaptive_evaluations
    assert flags == 5 and model.seconds(adaptive) == pytest.approx(2 * 2.0 + 5 * 2.75)
    assert model.seconds(adaptive.replace(adaptive_cache_budget=1.5)) == pytest.approx(2 * 2.0 + 5 * 1.5)
