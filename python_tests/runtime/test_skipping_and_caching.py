"""Routed tokens, residual reuse, the adaptive and the encoder cache, and one branch at unit guidance."""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.conformance import public, relative
from support.generation import CASES, ENOUGH, LAYERS_TOO, TOKENS, sample, sample_as_upstream
from support.oracle import Oracle, recorded_tokens

import flashu_ext as fx
from flashu_ext import FlashUConfig
from flashu_ext.ops.kernel_sets import resolve
from flashu_ext.planning.schedule import StepPlan
from flashu_ext.runtime.head_cache import AdaptiveGate, HeadCache
from flashu_ext.runtime.history import HeadHistory, TokenHistory
from flashu_ext.runtime.token_router import TokenRouter
from flashu_ext.runtime.work import WatchWork

pytestmark = pytest.mark.usefixtures("shared_state")

LIMIT = 1e-4
LAYERS, SPAN, ROWS = 8, 37, 4  # of the fixture's model and inputs, both branches counted

KERNELS = resolve(FlashUConfig.exact(), torch.device("cpu"), torch.float32).of("generation", "backbone")


def run(config, **changes):
    """(latents, summary, the image's record) of an image generated through `sample`."""
    fixture, model = public(), public().model()
    with fx.accelerate(model, config) as handle:
        return sample(model, fixture, **changes), handle.summary(), handle.runner.last_image


# ---- settings without effect

IDLE = {
    "no token is skipped": {"token_skip": True, "token_skip_ratio": 0.0},
    "a ratio below one token": {"token_skip": True, "token_skip_ratio": 0.02},
    "tokens measured in every step": {"token_skip": True, "token_skip_ratio": 0.5, "token_skip_interval": 1},
    "nothing to add a residual to": {"head_residual_reuse": True, "head_cache_interval": 1},
    "no budget": {"adaptive_cache": True, "adaptive_cache_budget": 0.0},
    "too old at once": {"adaptive_cache": True, "adaptive_cache_budget": ENOUGH, "head_cache_interval": 1},
    "encoder in every step": {"encoder_cache": True, "encoder_cache_interval": 1},
    "encoder in full steps": {"encoder_cache": True, "encoder_cache_interval": 5, "full_network_steps": 7},
    "no unit guidance": {"skip_unit_guidance": True},
}


@pytest.mark.parametrize("name", IDLE)
def test_an_idle_knob_changes_no_bit(name):
    exact, _, _ = run(FlashUConfig.exact(steps=7))
    latents, summary, _ = run(FlashUConfig(steps=7, **IDLE[name]))
    assert torch.equal(latents, exact)
    assert summary.backbone_evaluations == summary.head_evaluations == summary.encoder_evaluations == 6


# ---- every setting compared with plain torch


@pytest.fixture
def chosen():
    """step -> the tokens that the run under test computes in it."""
    record = {}
    with recorded_tokens(record):
        yield record


def equals_oracle(config, chosen, way="sample", prepare=lambda model: model):
    """Generate, compare with the oracle, and return the summary. `prepare` changes a fresh model."""
    fixture = public()
    model = prepare(fixture.model())
    chosen.clear()
    with fx.accelerate(model, config) as handle:
        latents = sample(model, fixture) if way == "sample" else sample_as_upstream(model, fixture, config.steps)
        summary, image = handle.summary(), handle.runner.last_image
    oracle = Oracle(prepare(fixture.model()), fixture.sample_inputs, config, chosen)
    assert relative(latents, oracle.generate()) < LIMIT
    assert oracle.kinds == image.kinds
    assert not {reason for reason in summary.fallbacks if "routing_kernels" not in reason}
    return summary


@pytest.mark.parametrize("way", ["sample", "t2i_generate"])
@pytest.mark.parametrize("name", CASES)
def test_a_knob_equals_plain_torch(name, way, chosen):
    config = FlashUConfig(steps=12, full_network_steps=2, **CASES[name])
    summary = equals_oracle(config, chosen, way)
    assert bool(chosen) == config.token_skip
    if config.adaptive_cache:
        assert summary.decided["cached"] > 0, "the case must cache at least one step"


def test_the_last_layers_tokens_are_judged_before_the_final_norm(chosen):
    @torch.no_grad()
    def prepare(model):
        # the fixture's norm has weights of one, which do not change a vector's direction
        weight = model.showo.model.norm.weight
        weight.copy_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) * 4)
        return model

    equals_oracle(FlashUConfig(steps=7, **TOKENS, **LAYERS_TOO), chosen, prepare=prepare)


ANY_KNOBS = {
    "full_network_steps": st.integers(0, 3),
    "layer_skip_ratio": st.sampled_from([0.0, 0.25]),
    "layer_skip_interval": st.integers(0, 4),
    "head_cache_interval": st.integers(0, 4),
    "head_forecast_order": st.integers(0, 2),
    "steps": st.integers(2, 9),
    "guidance": st.none() | st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1.0, 3.0])), min_size=1, max_size=3),
    "token_skip": st.booleans(),
    "token_skip_ratio": st.sampled_from([0.2, 0.7]),
    "token_skip_interval": st.integers(1, 4),
    "token_skip_forecast": st.booleans(),
    "head_residual_reuse": st.booleans(),
    "adaptive_cache": st.booleans(),
    "adaptive_cache_budget": st.sampled_from([0.0, 0.1, ENOUGH]),
    "encoder_cache": st.booleans(),
    "encoder_cache_interval": st.integers(1, 3),
    "skip_unit_guidance": st.booleans(),
}


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries(ANY_KNOBS))
def test_any_combination_equals_plain_torch_and_its_plan(chosen, values):
    config = FlashUConfig(**values)
    summary = equals_oracle(config, chosen)
    plan = StepPlan.build(config, None, LAYERS, public().sample_inputs["guidance_scale"], SPAN - 1)
    cached = summary.decided.get("cached", 0)
    assert sum(summary.steps.values()) == len(plan)
    assert summary.head_evaluations == plan.head_evaluations - cached
    assert summary.backbone_evaluations == plan.backbone_evaluations - (0 if config.head_residual_reuse else cached)
    assert summary.encoder_evaluations <= summary.backbone_evaluations
    if not config.adaptive_cache:
        assert summary.steps == plan.counts() and summary.encoder_evaluations == plan.encoder_evaluations


def test_neuron_pruning_goes_with_every_other_knob():
    fixture, model = public(), public().model()
    knobs = {**CASES["all of it"], "guidance": [(3, 1.0), (4, 5.0)], "guidance_relative": False}
    config = fixture.flashu_config(steps=12, **knobs)
    with fx.accelerate(model, config, fixture.flashu_plan()) as handle:
        latents, summary = sample(model, fixture), handle.summary()
    assert latents.isfinite().all() and not summary.fallbacks
    kinds = StepPlan.build(config, None, LAYERS, fixture.sample_inputs["guidance_scale"], SPAN - 1).counts()
    assert summary.steps == kinds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_repeated_bit_by_bit(dtype):
    fixture = public()
    model = fixture.model().to(dtype)
    for name in ("all of it", "all of it, adaptive"):
        with fx.accelerate(model, FlashUConfig(steps=12, full_network_steps=2, **CASES[name])) as handle:
            first, again = sample(model, fixture), sample(model, fixture)
            assert first.isfinite().all() and torch.equal(first, again) and not handle.summary().fallbacks


# ---- counts


def test_skipped_tokens_are_counted_and_not_computed():
    config = FlashUConfig(steps=8, full_network_steps=2, **TOKENS)
    widths = Counter()
    fixture, model = public(), public().model()
    with fx.accelerate(model, config) as handle:
        model.showo.model.layers[2].self_attn.o_proj.register_forward_pre_hook(
            lambda module, inputs: widths.update([inputs[0].shape[1]])
        )
        sample(model, fixture)
        summary = handle.summary()
    # steps 1 and 4 measure, 7 is full; the prompt is computed once
    assert widths[SPAN] == 3 and widths[SPAN - 18] == 4 and widths.total() == 8
    assert summary.routed == {
        "computed": LAYERS * ROWS * (3 * SPAN + 4 * (SPAN - 18)),
        "skipped": LAYERS * ROWS * 4 * 18,
    }
    assert f"skipped {LAYERS * ROWS * 4 * 18}" in str(summary) and run(FlashUConfig(steps=3))[1].routed == {}


def test_a_large_budget_computes_once_outside_the_full_steps():
    _, summary, image = run(
        FlashUConfig(steps=10, full_network_steps=3, adaptive_cache=True, adaptive_cache_budget=ENOUGH)
    )
    assert image.kinds == ["full"] + ["head cached"] * 6 + ["full"] * 2
    assert summary.decided == {"computed": 0, "cached": 6}
    assert summary.backbone_evaluations == summary.head_evaluations == summary.encoder_evaluations == 3
    assert "cached 6" in str(summary)


@pytest.mark.parametrize("interval", [0, 3])
def test_every_wait_for_the_adaptive_caches_flag_is_counted(interval):
    """One per decision, none if the state is too old anyway, and one per choice of layers."""
    knobs = {"adaptive_cache": True, "adaptive_cache_budget": ENOUGH, "head_cache_interval": interval, **LAYERS_TOO}
    _, summary, image = run(FlashUConfig(steps=12, full_network_steps=2, **knobs))
    open_ones = [step for step in image.ran if image.plan.at(step.index).adaptive]
    waited = [step for step in open_ones if not step.head]
    assert (len(waited) < len(open_ones)) == bool(summary.layers_skipped) == (interval > 0)
    assert summary.host_waits == len(waited) + len(summary.layers_skipped)
    by_step = [work.waits for work in image.counts]
    assert sum(by_step) == summary.host_waits and all(by_step[step.index - 1] >= 1 for step in waited)


def test_a_larger_budget_computes_less():
    cached = [run(FlashUConfig(steps=12, adaptive_cache=True, adaptive_cache_budget=b))[1].decided["cached"]
              for b in (0.0, 0.1, 0.3, ENOUGH)]  # fmt: skip
    assert cached == sorted(cached) and cached[0] == 0 and 0 < cached[1] < cached[2] < cached[3] == 10


def test_the_encoder_runs_at_its_interval():
    calls = []
    fixture, model = public(), public().model()
    config = FlashUConfig(steps=12, full_network_steps=3, encoder_cache=True, encoder_cache_interval=3)
    with fx.accelerate(model, config) as handle:
        model.und_trans.register_forward_pre_hook(lambda *a: calls.append(1))
        sample(model, fixture)
        assert len(calls) == handle.summary().encoder_evaluations == 5


def test_a_cached_step_defers_its_encoding_to_the_next():
    config = FlashUConfig(
        steps=9, adaptive_cache=True, adaptive_cache_budget=ENOUGH, head_cache_interval=3, encoder_cache=True,
        encoder_cache_interval=2,
    )  # fmt: skip
    _, _, image = run(config)
    assert [step.index for step in image.ran if step.head] == [1, 4, 7]
    assert [step.index for step in image.ran if step.encode] == [1, 4, 7], "steps 3, 5 and 7 were due to encode"


def test_one_branch_is_half_the_rows_and_the_same_image():
    rows = []
    fixture, model = public(), public().model()
    config = FlashUConfig(steps=9, guidance=[(3, 1.0), (2, 5.0), (3, 1.0)])
    both = {}
    for skip in (False, True):
        rows.clear()
        with fx.accelerate(model, config.replace(skip_unit_guidance=skip)):
            hook = model.diffusion_head_b.linear.register_forward_pre_hook(lambda m, i: rows.append(i[0].shape[0]))
            both[skip] = sample(model, fixture, return_velocity=True)
            hook.remove()
        assert rows == ([2, 2, 2, 4, 4, 2, 2, 2] if skip else [4] * 8)
    assert relative(both[True][0], both[False][0]) < 1e-5
    assert relative(both[True][1], both[False][1]) < 1e-5


def test_the_callers_own_scale_of_one_runs_one_branch():
    config = FlashUConfig(steps=5, skip_unit_guidance=True)
    expected, _, _ = run(FlashUConfig(steps=5), guidance_scale=1.0)
    latents, _, image = run(config, guidance_scale=1.0)
    assert not any(step.guided for step in image.ran) and relative(latents, expected) < 1e-5
    alone, _, _ = run(FlashUConfig(steps=5), guidance_scale=0.0)
    assert relative(latents, alone) < 1e-5


def test_guided_rows_with_latents_of_their_own_under_one_branch_and_an_encoder_cache():
    fixture, model = public(), public().model()
    i = fixture.sample_inputs
    config = FlashUConfig(
        steps=6, skip_unit_guidance=True, guidance=[(1, 1.0), (2, 3.0), (1, 1.0), (1, 3.0)], encoder_cache=True,
        encoder_cache_interval=2, adaptive_cache=True, adaptive_cache_budget=0.0,
    )  # fmt: skip
    latents = torch.randn(4, 16, 12, 12, generator=torch.Generator().manual_seed(0))
    call = {
        "text_tokens": torch.cat([i["text_tokens"], i["text_tokens_null"]]),
        "modality_positions": torch.cat([i["modality_positions"], i["modality_positions_null"]]),
        "guidance_scale": 3.0,
        "image_latents": latents,
    }
    times = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    with fx.accelerate(model, config) as handle:
        got = [model.t2i_generate(t=t.expand(4), **call) for t in times]
        ran = handle.runner.last_image.ran
    # the second step needs features of rows that the first did not encode
    assert [step.encode for step in ran] == [True, True, True, False, True]
    for step, velocity, t in zip(ran, got, times, strict=True):
        scale = 3.0 if step.guided else 1.0
        expected = model.t2i_generate(t=t.expand(4), **{**call, "guidance_scale": scale})
        assert relative(velocity, expected) < LIMIT


# ---- state


def test_images_in_sequence_and_in_turn():
    fixture, model = public(), public().model()
    config = FlashUConfig(steps=12, full_network_steps=2, **CASES["all of it, adaptive"])
    first = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in fixture.sample_inputs.items()}
    second = {k: v[1:] if isinstance(v, torch.Tensor) else v for k, v in fixture.sample_inputs.items()}
    with fx.accelerate(model, config) as handle:
        alone = [fx.showo2.sample(model, **inputs) for inputs in (first, second)]
        assert torch.equal(fx.showo2.sample(model, **first), alone[0])
        nested = {}

        def other(step, latents):
            if step in (3, 7):
                nested[step] = fx.showo2.sample(model, **second)

        assert torch.equal(fx.showo2.sample(model, **first, callback=other), alone[0])
        assert torch.equal(nested[3], alone[1]) and torch.equal(nested[7], alone[1])
        for _ in range(2):
            upstream = [sample_as_upstream(model, fixture, 12, **inputs) for inputs in (first, second)]
            assert relative(upstream[0], alone[0]) < LIMIT and relative(upstream[1], alone[1]) < LIMIT
        assert handle.summary().cache_bytes == 0, "a finished image holds no state"


def test_another_scale_is_another_image_where_the_plan_depends_on_it():
    fixture, model = public(), public().model()
    i = fixture.sample_inputs
    call = {
        "image_latents": i["noise"].repeat(2, 1, 1, 1),
        "text_tokens": torch.cat([i["text_tokens"], i["text_tokens_null"]]),
        "modality_positions": torch.cat([i["modality_positions"], i["modality_positions_null"]]),
    }
    for skip, steps in ((False, 2), (True, 1)):
        with fx.accelerate(model, FlashUConfig(steps=6, skip_unit_guidance=skip)) as handle:
            model.t2i_generate(t=torch.full((4,), 0.1), guidance_scale=1.0, **call)
            got = model.t2i_generate(t=torch.full((4,), 0.2), guidance_scale=4.0, **call)
            assert sum(handle.summary().steps.values()) == steps
        assert relative(got, model.t2i_generate(t=torch.full((4,), 0.2), guidance_scale=4.0, **call)) < LIMIT


# ---- the parts alone


def test_the_gate_sums_relative_changes_on_the_device():
    gate = AdaptiveGate(0.5, torch.zeros(2, 3, 4), torch.zeros(()))
    seen = [0]

    def watch(signal):
        rows = signal.shape[0]
        gate.watch(WatchWork(rows, min(rows, seen[-1]), adapter=None), signal, KERNELS)
        seen.append(rows)

    x = torch.ones(2, 3, 4)
    watch(x)
    assert not gate.due() and isinstance(gate.due(), torch.Tensor)
    where = gate.signal.data_ptr(), gate.drift.data_ptr()
    watch(x * 1.25)
    assert not gate.due() and float(gate.drift) == pytest.approx(0.25)
    watch(x[:1])  # over the rows of both, -0.25 of 1.25
    assert not gate.due() and float(gate.drift) == pytest.approx(0.45)
    watch(x[:1] * 1.06)
    assert gate.due(), "0.51 in total"
    gate.computed()
    assert not gate.due()
    watch(x * float("nan"))
    assert gate.due(), "NaN must not lead to a cached step"
    seen.append(0)
    watch(x * 3)
    assert not gate.due() and float(gate.drift) == 0, "a new image resets the sum"
    assert where == (gate.signal.data_ptr(), gate.drift.data_ptr())


@pytest.mark.parametrize("restarts", [False, True])
def test_a_head_cache_grows_and_shrinks_with_the_branches(restarts):
    cache = HeadCache(torch.full((2, rows, 3, 2), float("nan")) for rows in (2, 4))

    def update(feature, step):
        cache.update(history.update(step, feature.shape[0]), feature, KERNELS)

    def predict(step, rows):
        return cache.predict(history.predict(step, rows), rows, KERNELS)

    one, two, four = (torch.full((rows, 3, 2), value) for rows, value in ((2, 1.0), (2, 2.0), (4, 4.0)))
    for _ in range(2):  # two images in the same memory
        history = HeadHistory(1, restarts)
        update(one, 1)
        update(two, 2)
        assert torch.equal(predict(3, 2), two + 1)
        update(four, 3)
        assert torch.equal(predict(4, 2), (four if restarts else four + 2)[:2])
        update(four + 1, 4)
        assert torch.equal(predict(6, 4), four + 3), "the difference needs two states of all rows"
        update(two, 5)
        assert history.rows == 2 and torch.equal(predict(6, 2), two - 3)
        with pytest.raises(AssertionError, match="as many rows"):
            predict(6, 4)


def test_the_router_predicts_constant_or_linear_importance():
    router, history = TokenRouter(2, lead=1, measured=torch.zeros(2, 1, 1, 4)), TokenHistory()

    def measure(step, importance):
        router.store(history.measure(step), [torch.tensor([importance])])

    def active(sources, step):
        return router.active(history.routing(sources, step), 1, KERNELS).tolist()

    measure(1, [0.0, 0.4, 0.3, 0.1])
    assert active((1,), 2) == [[[0, 1]]]
    measure(3, [0.0, 0.2, 0.3, 0.3])
    assert active((3,), 4) == [[[0, 2]]], "of equal tokens the first"
    assert active((3, 1), 4) == [[[0, 3]]], "a growing importance ranks higher"
    measure(5, [0.0, 0.9, 0.1, 0.2])
    assert active((5,), 6) == [[[0, 1]]], "the oldest measurement is dropped"
    measure(7, [0.0, 0.8, 0.4, 0.2])
    assert active((7, 5), 8) == [[[0, 1]]], "what grows is not ahead yet"
    assert active((7, 5), 10) == [[[0, 2]]], "three steps on it is"
