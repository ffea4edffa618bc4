"""Tests of the step plan: the reference's rules, and that only dead work is removed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashu_ext import FlashUConfig
from flashu_ext.planning.schedule import StepPlan


def test_default_settings_run_19_backbones_and_18_heads_of_34():
    plan = StepPlan.build(FlashUConfig.paper())
    assert (len(plan), plan.backbone_evaluations, plan.head_evaluations, plan.dead_evaluations) == (34, 19, 18, 15)
    dead = [step.index for step in plan.steps if step.dead]
    assert dead == [6, 7, 8, 9, 12, 13, 14, 16, 17, 18, 19, 21, 22, 23, 24]
    assert plan.at(11).kind == "measure only"
    assert plan.at(15).skip_from == 11


def test_exact_runs_everything_fully():
    plan = StepPlan.build(FlashUConfig.exact(), 50)
    assert plan.counts() == {"full": 49}
    assert plan.at(60).kind == "full"


def test_a_skip_ratio_that_rounds_to_no_layer_measures_nothing():
    config = FlashUConfig(layer_skip_ratio=0.2, layer_skip_interval=5, steps=20)
    assert any(step.measure for step in StepPlan.build(config, num_layers=5).steps)
    assert not any(step.measure for step in StepPlan.build(config, num_layers=4).steps)


def test_the_table_names_every_step_and_the_totals():
    text = StepPlan.build(FlashUConfig.paper()).describe()
    assert len(text.splitlines()) == 2 + 34 + 1
    assert "19 run the backbone, 18 the head, 15 were dead" in text


@pytest.mark.parametrize("steps", [1, 0, -3, 2.0, True])
def test_grid_points_are_checked(steps):
    with pytest.raises(ValueError, match=r"steps: expected an integer in .2, 10000."):
        StepPlan.build(FlashUConfig.exact(), steps)


configs = st.builds(
    lambda tau, t_ls, t_cache, steps: FlashUConfig(
        ffn_prune_ratio=0.2,
        full_network_steps=tau,
        layer_skip_ratio=0.25,
        layer_skip_interval=t_ls,
        head_cache_interval=t_cache,
        steps=steps,
    ),
    st.integers(0, 12),
    st.integers(0, 7),
    st.integers(0, 7),
    st.integers(2, 40),
)


@settings(max_examples=300, deadline=None)
@given(configs)
def test_what_reaches_the_latents_equals_the_reference_simulation(config):
    """Replays the reference's state machine symbolically: a step's velocity is the origin of its head state."""

    def reference(live=None):
        cache, choice, out = None, None, []
        for step in range(1, config.steps):
            full = config.full_network_steps > 0 and step > config.steps - config.full_network_steps
            if full:
                cache = None
            measure = config.layer_skip_interval > 0 and not full and (step - 1) % config.layer_skip_interval == 0
            skip = None if full or measure else choice
            interval = config.head_cache_interval
            use = interval > 0 and not full and step % interval != 0 and cache is not None
            # A dead evaluation computes garbage, which must not reach any output.
            backbone = (step, full, skip) if live is None or live(step).backbone else "garbage"
            if use:
                state = cache
            else:
                state = backbone if live is None or live(step).head else "garbage"
                if interval > 0 and step % interval == 0:
                    cache = state
            if measure:
                choice = backbone if live is None or live(step).measure else "garbage"
            out.append(state)
        return out

    plan = StepPlan.build(config)
    assert reference(plan.at) == reference()
    # Each remaining evaluation is needed: garbage in any one of them reaches the output.
    for step in plan.steps:
        if not step.backbone:
            continue

        def without(index, step=step):
            found = plan.at(index)
            return (
                type(found)(index, found.pruned, False, False, None, False, None, False, True)
                if index == step.index
                else found
            )

        assert reference(without) != reference()
