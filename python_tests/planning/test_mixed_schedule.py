"""Tests of the step plan's further knobs: routed tokens, residual reuse, adaptive and encoder caches, one branch."""

from hypothesis import given, settings
from hypothesis import strategies as st

from flashu_ext import FlashUConfig
from flashu_ext.planning.schedule import StepPlan


def indices(plan, name):
    return [step.index for step in plan.steps if getattr(step, name)]


# ---- routed tokens


def test_tokens_are_measured_at_intervals_and_never_in_full_steps():
    config = FlashUConfig(token_skip=True, token_skip_ratio=0.5, token_skip_interval=4, full_network_steps=3, steps=14)
    plan = StepPlan.build(config)
    assert indices(plan, "measure_tokens") == [1, 5, 9]
    assert [step.tokens_from for step in plan.steps] == [
        *[(), (1,), (1,), (1,)], *[(), (5,), (5,), (5,)], *[(), (9,), (9,), (), ()],
    ]  # fmt: skip
    assert plan.counts() == {"measure": 3, "pruned": 8, "full": 2}
    assert "skip as of 5" in plan.describe()


def test_a_forecast_takes_two_measurements_where_there_are_two():
    config = FlashUConfig(token_skip=True, token_skip_ratio=0.5, token_skip_interval=3, token_skip_forecast=True)
    plan = StepPlan.build(config, 10)
    assert [plan.at(i).tokens_from for i in (2, 5, 8)] == [(1,), (4, 1), (7, 4)]


def test_unused_measurements_are_not_made():
    config = FlashUConfig(token_skip=True, token_skip_ratio=0.5, token_skip_interval=4, full_network_steps=2, steps=8)
    assert indices(StepPlan.build(config), "measure_tokens") == [1, 5]
    # step 6 is full here, so no step uses a measurement of step 5
    assert indices(StepPlan.build(config.replace(full_network_steps=3)), "measure_tokens") == [1]
    assert not indices(StepPlan.build(config.replace(token_skip_interval=1)), "measure_tokens")


def test_a_ratio_that_rounds_to_no_token_measures_nothing():
    config = FlashUConfig(token_skip=True, token_skip_ratio=0.1)
    assert indices(StepPlan.build(config, 20, num_tokens=10), "measure_tokens")
    assert StepPlan.build(config, 20, num_tokens=9).counts() == {"full": 19}


def test_whole_layers_are_skipped_under_routed_tokens():
    config = FlashUConfig(
        token_skip=True, token_skip_ratio=0.5, token_skip_interval=3, layer_skip_ratio=0.2, layer_skip_interval=4
    )
    plan = StepPlan.build(config, 9)
    assert [(s.measure, s.measure_tokens, s.skip_from, s.tokens_from) for s in plan.steps[:5]] == [
        (True, True, None, ()),
        (False, False, 1, (1,)),
        (False, False, 1, (1,)),
        (False, True, None, ()),
        (True, False, None, ()),
    ]


def test_a_cached_measuring_step_runs_for_its_measurement_alone():
    config = FlashUConfig(token_skip=True, token_skip_ratio=0.5, token_skip_interval=5, head_cache_interval=4)
    plan = StepPlan.build(config, 13)
    assert (plan.at(6).kind, plan.at(8).tokens_from) == ("measure only", (6,))
    assert (plan.at(11).kind, plan.at(12).tokens_from) == ("measure only", (11,))
    assert plan.at(7).kind == "head cached" and plan.at(7).tokens_from == ()


# ---- the head


def test_residual_reuse_needs_the_backbone_and_what_it_depends_on():
    plain = FlashUConfig.paper()
    plan = StepPlan.build(plain.replace(head_residual_reuse=True))
    assert (plan.backbone_evaluations, plan.head_evaluations, plan.dead_evaluations) == (34, 18, 0)
    assert plan.counts() == {"measure": 1, "pruned": 7, "head residual": 14, "measure only": 2, "full": 10}
    assert plan.at(21).kind == "measure only", "its choice is used by the next step"
    assert all(step.residual != step.head for step in plan.steps)
    assert "reuse residual 5" in plan.describe()


def test_adaptive_steps_are_open_outside_full_and_measuring_ones():
    config = FlashUConfig(
        adaptive_cache=True,
        adaptive_cache_budget=0.1,
        layer_skip_ratio=0.2,
        layer_skip_interval=5,
        full_network_steps=3,
    )
    plan = StepPlan.build(config, 13)
    assert indices(plan, "adaptive") == [2, 3, 4, 5, 7, 8, 9, 10]
    assert indices(plan, "keep_head") == [1, 2, 3, 4, 6, 7, 8, 9]
    assert plan.head_evaluations == plan.backbone_evaluations == 12 and plan.dead_evaluations == 0
    assert "8 of these may be cached" in plan.describe()
    cached = plan.at(4).cached(1, residual=False)
    assert (cached.kind, cached.head_from, cached.skip_from, cached.encode) == ("head cached", 1, None, False)
    assert plan.at(4).cached(1, residual=True).kind == "head residual"


# ---- the encoder


def test_the_encoder_runs_at_intervals_of_evaluations_that_run_the_backbone():
    config = FlashUConfig(encoder_cache=True, encoder_cache_interval=3, full_network_steps=3, steps=12)
    assert indices(StepPlan.build(config), "encode") == [1, 4, 7, 10, 11]
    cached = StepPlan.build(config.replace(head_cache_interval=4, encoder_cache_interval=2))
    assert indices(cached, "backbone") == [1, 2, 3, 4, 8, 10, 11]
    assert indices(cached, "encode") == [1, 3, 8, 10, 11] and cached.encoder_evaluations == 5
    assert "5 run the encoder" in cached.describe()
    # steps without the backbone do not count: step 8 is the second one since step 4
    assert indices(StepPlan.build(config.replace(head_cache_interval=4)), "encode") == [1, 4, 10, 11]


# ---- guidance


def test_one_branch_where_the_scale_is_one():
    config = FlashUConfig(skip_unit_guidance=True, guidance=[(3, 1.0), (3, 2.0)], steps=9)
    plan = StepPlan.build(config)
    assert [step.guided for step in plan.steps] == [False] * 3 + [True] * 5
    assert [step.guided for step in StepPlan.build(config, guidance_scale=1.0).steps][6:] == [False] * 2
    assert all(step.guided for step in StepPlan.build(config.replace(skip_unit_guidance=False)).steps)
    relative = config.replace(guidance_relative=True)
    assert all(step.guided for step in StepPlan.build(relative).steps), "the caller's scale is not known"
    assert not StepPlan.build(relative, guidance_scale=0.5).at(4).guided
    assert plan.describe().splitlines()[2].split()[-2:] == ["one", "1"]


def test_a_state_used_by_a_guided_step_is_computed_for_both_branches():
    config = FlashUConfig(
        skip_unit_guidance=True, guidance=[(6, 1.0), (8, 2.0)], head_cache_interval=2, head_forecast_order=0
    )
    one = {order: [s.index for s in StepPlan.build(config.replace(head_forecast_order=order), 11).steps if not s.guided]
           for order in (0, 1, 2)}  # fmt: skip
    # step 7 extrapolates step 6's state; the first difference needs step 4's too, the second difference step 2's
    assert one == {0: [1, 2, 3, 4, 5], 1: [1, 2, 3, 5], 2: [1, 3, 5]}


def test_layers_are_always_chosen_over_both_branches_and_tokens_where_a_guided_step_needs_it():
    config = FlashUConfig(skip_unit_guidance=True, guidance=[(5, 1.0)], layer_skip_ratio=0.2, layer_skip_interval=2)
    assert [s.index for s in StepPlan.build(config, 8).steps if s.guided] == [1, 3, 5, 6, 7]
    routed = FlashUConfig(
        skip_unit_guidance=True, guidance=[(5, 1.0)], token_skip=True, token_skip_ratio=0.5, token_skip_interval=4
    )
    assert [s.index for s in StepPlan.build(routed, 8).steps if s.guided] == [5, 6, 7]


def test_an_adaptive_step_is_computed_where_the_second_branch_comes_back():
    config = FlashUConfig(
        skip_unit_guidance=True, guidance=[(4, 1.0), (2, 3.0), (2, 1.0), (9, 3.0)], adaptive_cache=True,
        adaptive_cache_budget=1.0,
    )  # fmt: skip
    plan = StepPlan.build(config, 12)
    assert indices(plan, "adaptive") == [2, 3, 4, 6, 7, 8, 10, 11]
    assert not plan.at(4).keep_head and not plan.at(8).keep_head


knobs = st.fixed_dictionaries(
    {
        "full_network_steps": st.integers(0, 6),
        "layer_skip_ratio": st.sampled_from([0.0, 0.25]),
        "layer_skip_interval": st.integers(0, 6),
        "head_cache_interval": st.integers(0, 6),
        "head_forecast_order": st.integers(0, 2),
        "steps": st.integers(2, 24),
        "guidance": st.none()
        | st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1.0, 3.0])), min_size=1, max_size=4),
        "token_skip": st.booleans(),
        "token_skip_ratio": st.just(0.5),
        "token_skip_interval": st.integers(1, 6),
        "token_skip_forecast": st.booleans(),
        "head_residual_reuse": st.booleans(),
        "adaptive_cache": st.booleans(),
        "adaptive_cache_budget": st.just(0.1),
        "encoder_cache": st.booleans(),
        "encoder_cache_interval": st.integers(1, 4),
        "skip_unit_guidance": st.booleans(),
    }
)


@settings(max_examples=400, deadline=None)
@given(knobs, st.sampled_from([1.0, 5.0]), st.randoms(use_true_random=False))
def test_every_state_that_a_step_uses_covers_all_its_rows(values, scale, rng):
    """Replays a plan and tracks the rows of every cached state; adaptive steps are cached at random."""
    config = FlashUConfig(**values)
    plan = StepPlan.build(config, guidance_scale=scale)
    plan.describe()
    layers, tokens, features, kept, due = {}, {}, False, [], False
    used = set()
    for planned in plan.steps:
        step = planned
        if step.adaptive and rng.random() < 0.6:
            assert kept, "a cached state exists"
            step = step.cached(kept[-1][0], config.head_residual_reuse)
            due |= planned.encode
        rows = 2 if step.guided else 1
        if config.guidance_at(step.index, scale) != 1.0 or not config.skip_unit_guidance:
            assert step.guided
        if step.backbone:
            assert step.encode or due or features
            features, due = True, False
            if step.skip_from is not None:
                assert layers[step.skip_from] == 2
                used.add(("layers", step.skip_from))
            for source in step.tokens_from:
                assert tokens[source] >= rows
                used.add(("tokens", source))
            assert not (step.measure or step.measure_tokens) or (step.skip_from is None and not step.tokens_from)
            if step.measure:
                layers[step.index] = rows
            if step.measure_tokens:
                tokens[step.index] = rows
        if step.head:
            assert step.backbone
            if step.keep_head:
                if config.adaptive_cache and kept and kept[-1][1] < rows:
                    kept.clear()  # differences start again
                kept.append((step.index, rows))
        else:
            assert step.head_from == kept[-1][0]
            assert all(has >= rows for _, has in kept[-1 - config.head_forecast_order :])
    if not config.adaptive_cache:
        made = {("layers", i) for i in layers} | {("tokens", i) for i in tokens}
        assert made == used, "every measurement is used"
