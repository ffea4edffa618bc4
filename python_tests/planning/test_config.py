"""Tests of FlashUConfig: presets, groups and flat keywords, validation, JSON."""

import copy
import dataclasses
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import small_model

from flashu_ext import (
    Answers,
    EncoderSharing,
    Execution,
    FfnPruning,
    FlashUConfig,
    Guidance,
    HeadCaching,
    LayerSkip,
    TokenSkip,
    accelerate,
)
from flashu_ext.planning.config import FLAT_KEYWORDS
from flashu_ext.planning.groups import TOKEN_SCORES
from flashu_ext.planning.schedule import StepPlan

GROUPS = {
    "ffn": FfnPruning,
    "layers": LayerSkip,
    "tokens": TokenSkip,
    "head": HeadCaching,
    "encoder": EncoderSharing,
    "guidance": Guidance,
    "answers": Answers,
    "execution": Execution,
}

NAMES = {"FlashUConfig": FlashUConfig} | {kind.__name__: kind for kind in GROUPS.values()}

# Every flat keyword, its default, and other valid values.
ratios = st.sampled_from([0.0, 0.02, 0.2, 0.25, 0.5])
kernel_choices = st.sampled_from([True, False, "flashu"])
FLAT = {
    "ffn_prune_ratio": (0.0, ratios),
    "full_network_steps": (0, st.integers(0, 9) | st.sampled_from([0.15, 0.3])),
    "layer_skip_ratio": (0.0, ratios),
    "layer_skip_interval": (0, st.integers(0, 5)),
    "head_cache_interval": (0, st.integers(0, 5)),
    "head_forecast_order": (0, st.integers(0, 2)),
    "steps": (None, st.none() | st.integers(2, 20)),
    "guidance": (
        None,
        st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.5, 1.0, 3.0])), min_size=1, max_size=3),
    ),
    "guidance_relative": (False, st.booleans()),
    "token_prune_ratio": (0.0, ratios),
    "token_prune_layer": (2, st.integers(0, 4)),
    "token_prune_score": ("value_norm", st.sampled_from(TOKEN_SCORES)),
    "answer_layer_skip_ratio": (0.0, ratios),
    "prune_multiple": (64, st.sampled_from([1, 16, 64])),
    "token_skip": (False, st.booleans()),
    "token_skip_ratio": (0.0, ratios),
    "token_skip_interval": (5, st.integers(1, 6)),
    "token_skip_forecast": (False, st.booleans()),
    "head_residual_reuse": (False, st.booleans()),
    "adaptive_cache": (False, st.booleans()),
    "adaptive_cache_budget": (0.0, st.sampled_from([0.0, 0.1])),
    "encoder_cache": (False, st.booleans()),
    "encoder_cache_interval": (2, st.integers(1, 4)),
    "skip_unit_guidance": (False, st.booleans()),
    "ffn_kernels": (True, kernel_choices),
    "linear_kernels": (True, kernel_choices),
    "attention_kernels": (True, kernel_choices),
    "routing_kernels": (True, kernel_choices),
    "norm_kernels": (True, kernel_choices),
    "step_kernels": (True, kernel_choices),
    "step_graphs": (True, st.booleans()),
    "batch_invariant": (None, st.sampled_from([None, True, False])),
}
DEFAULTS = {name: default for name, (default, _) in FLAT.items()}


def accepted(flat):
    """Only one combination of flat keywords is refused: relative guidance without phases."""
    return flat.get("guidance") is not None or not flat.get("guidance_relative")


flats = st.fixed_dictionaries({}, optional={name: values for name, (_, values) in FLAT.items()}).filter(accepted)


def test_presets_validate_and_survive_json():
    for config in (
        FlashUConfig.exact(),
        FlashUConfig.paper(),
        FlashUConfig.paper(steps=50, head_cache_interval=4),
        FlashUConfig(token_prune_ratio=0.5, token_prune_score="attention", answer_layer_skip_ratio=0.25),
    ):
        assert FlashUConfig.from_json(config.to_json()) == config


def test_exact_refuses_to_approximate():
    assert FlashUConfig.exact().approximates == ()
    for name in ("token_prune_ratio", "answer_layer_skip_ratio"):
        assert FlashUConfig(**{name: 0.5}).approximates == (name,)
    # Layer and score define how tokens are pruned; the ratio defines whether.
    assert FlashUConfig.exact(token_prune_layer=0, token_prune_score="random").approximates == ()
    with pytest.raises(ValueError, match="ffn_prune_ratio"):
        FlashUConfig.exact(ffn_prune_ratio=0.2)


def test_paper_follows_the_steps_it_is_given():
    assert FlashUConfig.paper().full_steps(35) == 11
    assert FlashUConfig.paper().guidance == ((24, 0.75), (11, 1.0))
    assert FlashUConfig.paper(steps=50).guidance == ((35, 0.75), (15, 1.0))
    assert FlashUConfig.paper().guidance_at(24, 10.0) == 7.5
    assert FlashUConfig.paper().guidance_at(25, 10.0) == 10.0
    assert FlashUConfig.paper(guidance=[(6, 3.75), (4, 5.0)]).guidance_at(1, 10.0) == 3.75
    assert FlashUConfig.paper(guidance=[(6, 3.75), (4, 5.0)]).guidance_at(11, 10.0) == 10.0


BAD = [
    ("ffn_prune_ratio", 1.0),
    ("ffn_prune_ratio", -0.1),
    ("ffn_prune_ratio", float("nan")),
    ("ffn_prune_ratio", "0.2"),
    ("layer_skip_ratio", True),
    ("full_network_steps", -1),
    ("full_network_steps", 1.5),
    ("layer_skip_interval", 2.5),
    ("head_cache_interval", -1),
    ("head_forecast_order", 9),
    ("steps", 1),
    ("steps", 35.0),
    ("guidance", []),
    ("guidance", "high"),
    ("guidance", [(0, 5.0)]),
    ("guidance", [(3, float("inf"))]),
    ("guidance", [(3,)]),
    ("guidance_relative", True),
    ("token_prune_ratio", 1.0),
    ("token_prune_ratio", float("nan")),
    ("token_prune_layer", -1),
    ("token_prune_score", "largest"),
    ("token_prune_score", ["value_norm"]),
    ("answer_layer_skip_ratio", 1),
    ("prune_multiple", 0),
    ("norm_kernels", 1),
    ("linear_kernels", "cublas"),
    ("batch_invariant", 1),
    ("token_skip", 1),
    ("token_skip_ratio", 1.0),
    ("token_skip_interval", 0),
    ("token_skip_forecast", None),
    ("head_residual_reuse", "yes"),
    ("adaptive_cache", 0),
    ("adaptive_cache_budget", -0.1),
    ("adaptive_cache_budget", float("inf")),
    ("encoder_cache", 2),
    ("encoder_cache_interval", 0),
    ("skip_unit_guidance", 1),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_named(name, value):
    with pytest.raises(ValueError, match=rf"FlashUConfig\.{name}: expected .*, got"):
        FlashUConfig(**{name: value})
    if name in FLAT_KEYWORDS and name not in ("guidance", "guidance_relative"):
        with pytest.raises(ValueError, match=rf"FlashUConfig\.{name}: expected .*, got"):
            FlashUConfig().replace(**{name: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a JSON object"),
        ("{", "not valid JSON"),
        ('{"steps": 3, "steps": 4}', "appears twice"),
        ('{"ffn_prune_ratio": NaN}', "NaN is not allowed"),
        ('{"speed": 3}', "unknown field 'speed'"),
        ('{"ffn": {"ratio": 0.2, "ratio": 0.3}}', "appears twice"),
        ('{"ffn": {"ratio": NaN}}', "NaN is not allowed"),
        ('{"ffn": {"ratio": 0.2, "speed": 3}}', "FfnPruning: unknown field 'speed'; known fields: multiple, ratio"),
        ('{"ffn": {"multiple": 16}}', "FfnPruning: expected a field 'ratio', got none"),
        ('{"ffn": {"ratio": 2}}', r"FfnPruning\.ratio: expected a number in \[0, 1\), got 2"),
        ('{"ffn": 0.2}', r"FlashUConfig\.ffn: expected None or FfnPruning, got 0\.2"),
        ('{"ffn": {"ratio": 0.2}, "prune_multiple": 16}', "expected either 'ffn' or 'prune_multiple'"),
        ('{"ffn": null, "prune_multiple": 16}', "expected either 'ffn' or 'prune_multiple'"),
        ('{"guidance": {"phases": [[3, 1]]}, "guidance_relative": true}', "expected either 'guidance' or"),
        (
            '{"guidance": {"phases": []}}',
            r"Guidance\.phases: expected a list of \(evaluations >= 1, scale > 0\), got \[\]",
        ),
    ],
)
def test_bad_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        FlashUConfig.from_json(text)


def test_json_holds_every_field():
    assert set(json.loads(FlashUConfig.paper().to_json())) == set(FlashUConfig.__dataclass_fields__)


def test_a_knob_that_does_nothing_approximates_nothing():
    idle = FlashUConfig.exact(
        token_skip=True, token_skip_ratio=0.5, token_skip_interval=1, head_residual_reuse=True,
        adaptive_cache=True, adaptive_cache_budget=0.0, head_cache_interval=5,
        encoder_cache=True, encoder_cache_interval=1, skip_unit_guidance=True,
    )  # fmt: skip
    assert idle.approximates == ()
    busy = idle.replace(token_skip_interval=2, adaptive_cache_budget=0.1, encoder_cache_interval=2)
    assert busy.approximates == ("token_skip", "adaptive_cache", "head_residual_reuse", "encoder_cache")
    assert busy.replace(adaptive_cache=False).approximates == (
        "token_skip", "head_cache_interval", "head_residual_reuse", "encoder_cache",
    )  # fmt: skip


# ---- groups and flat keywords


def test_the_table_of_flat_keywords_names_every_field_of_every_group_once():
    fields = [(group, field.name) for group, kind in GROUPS.items() for field in dataclasses.fields(kind)]
    assert sorted(FLAT_KEYWORDS.values()) == sorted(fields)
    assert set(FLAT_KEYWORDS) | {"steps", "full_network_steps"} == set(FLAT)
    top = {field.name for field in dataclasses.fields(FlashUConfig)}
    assert top == {"steps", "full_network_steps", *GROUPS}


def test_defaults_set_nothing():
    config = FlashUConfig()
    assert config.flat() == DEFAULTS and {name: getattr(config, name) for name in FLAT} == DEFAULTS
    assert FlashUConfig(**DEFAULTS) == config
    for name in GROUPS:
        assert getattr(config, name) == (Execution() if name == "execution" else None)


@pytest.mark.parametrize("name", sorted(FLAT))
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_flat_keyword_sets_its_field_and_no_other(name, data):
    value = data.draw(FLAT[name][1])
    flat = {"guidance": [(3, 0.5)], name: value} if name == "guidance_relative" else {name: value}
    config = FlashUConfig(**flat)
    got = {key: getattr(config, key) for key in FLAT}
    assert got["guidance"] is None or isinstance(got["guidance"].phases, tuple)
    flat = {key: tuple(value) if isinstance(value, list) else value for key, value in flat.items()}
    assert got == DEFAULTS | flat and config.flat() == got
    assert FlashUConfig().replace(**flat) == config == FlashUConfig.from_json(json.dumps(flat))


@settings(max_examples=200, deadline=None)
@given(flats, flats)
def test_flat_and_grouped_say_the_same(flat, more):
    config = FlashUConfig(**flat)
    groups = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    flat_again, grouped = FlashUConfig(**config.flat()), FlashUConfig(**groups)
    for same in (
        flat_again,
        grouped,
        FlashUConfig.from_json(config.to_json()),
        eval(repr(config), NAMES),
    ):
        assert same == config and hash(same) == hash(config) and same.flat() == config.flat()
    assert FlashUConfig.from_json(json.dumps(config.flat())) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == dataclasses.replace(config) == config
    if accepted(config.flat() | more):
        assert config.replace(**more) == FlashUConfig(**(config.flat() | more))


@settings(max_examples=200, deadline=None)
@given(flats)
def test_knobs_that_approximate_nothing_leave_the_plan_whole(flat):
    config = FlashUConfig(**flat)
    no_plan = {"guidance", "encoder_cache", "token_prune_ratio", "answer_layer_skip_ratio"}
    if set(config.approximates) <= no_plan:
        assert StepPlan.build(config, 12).counts() == {"full": 11}


GROUPED = [
    ({"ffn_prune_ratio": 0.2, "prune_multiple": 16}, {"ffn": FfnPruning(0.2, 16)}),
    ({"layer_skip_ratio": 0.2, "layer_skip_interval": 10}, {"layers": LayerSkip(0.2, 10)}),
    (
        {"token_skip": True, "token_skip_ratio": 0.5, "token_skip_forecast": True},
        {"tokens": TokenSkip(0.5, forecast=True)},
    ),
    ({"token_skip_ratio": 0.5}, {"tokens": TokenSkip(0.5, on=False)}),
    ({"head_cache_interval": 5, "head_forecast_order": 1}, {"head": HeadCaching(5, order=1)}),
    (
        {"adaptive_cache": True, "adaptive_cache_budget": 0.1, "head_residual_reuse": True},
        {"head": HeadCaching(adaptive=True, budget=0.1, residual=True)},
    ),
    ({"encoder_cache": True, "encoder_cache_interval": 4}, {"encoder": EncoderSharing(4)}),
    ({"guidance": [(3, 2)], "guidance_relative": True}, {"guidance": Guidance(((3, 2.0),), relative=True)}),
    ({"guidance": [(3, 2)]}, {"guidance": Guidance([[3, 2]])}),
    (
        {"token_prune_ratio": 0.5, "token_prune_score": "random", "answer_layer_skip_ratio": 0.25},
        {"answers": Answers(0.5, token_prune_score="random", layer_skip_ratio=0.25)},
    ),
    (
        {"norm_kernels": False, "step_graphs": False, "skip_unit_guidance": True},
        {"execution": Execution(norm_kernels=False, step_graphs=False, skip_unit_guidance=True)},
    ),
]


@pytest.mark.parametrize(("flat", "grouped"), GROUPED)
def test_a_group_by_both_names(flat, grouped):
    config = FlashUConfig(**flat)
    assert config == FlashUConfig(**grouped)
    name, group = next(iter(grouped.items()))
    assert getattr(config, name) == group and f"{name}={group!r}" in repr(config)
    if name != "execution":
        assert FlashUConfig.paper(**grouped).replace(**{name: None}) == FlashUConfig.paper(**{name: None})


def test_a_record_of_defaults_is_none():
    assert (
        FlashUConfig(ffn=FfnPruning(0.0), layers=LayerSkip(0.0, 0), head=HeadCaching(), answers=Answers())
        == FlashUConfig()
    )
    assert FlashUConfig(tokens=TokenSkip(0.0, on=False), encoder=EncoderSharing(on=False)).tokens is None
    assert FlashUConfig(encoder=EncoderSharing()).encoder_cache


def test_a_disabled_group_keeps_its_values():
    config = FlashUConfig(tokens=TokenSkip(0.5, interval=3), encoder=EncoderSharing(4)).replace(
        token_skip=False, encoder_cache=False
    )
    assert config.approximates == () and config.token_skip_ratio == 0.5
    assert StepPlan.build(config, 12).counts() == {"full": 11} and StepPlan.build(config, 12).encoder_evaluations == 11
    assert config.replace(token_skip=True).tokens == TokenSkip(0.5, interval=3)
    assert config.replace(encoder_cache=True).encoder == EncoderSharing(4)


def test_flat_keywords_beside_a_group_set_one_field_of_it():
    assert FlashUConfig(ffn=FfnPruning(0.2, 16), ffn_prune_ratio=0.4).ffn == FfnPruning(0.4, 16)
    assert dataclasses.replace(FlashUConfig.paper(), prune_multiple=16).ffn == FfnPruning(0.2, 16)
    assert FlashUConfig.paper(ffn=FfnPruning(0.4)).ffn == FfnPruning(0.4)
    assert FlashUConfig.paper(ffn=None).approximates == ("layer_skip_ratio", "head_cache_interval", "guidance")


def test_other_phases_of_relative_guidance_stay_relative():
    """The flat keyword `guidance` takes the phases; a record, or None, replaces the whole group."""
    paper = FlashUConfig.paper()
    assert paper.replace(guidance=[(5, 0.5)]).guidance_at(1, 10.0) == 5.0
    assert paper.replace(guidance=Guidance([(5, 0.5)])).guidance_at(1, 10.0) == 0.5
    assert paper.replace(guidance=None).guidance_at(1, 10.0) == 10.0
    assert not FlashUConfig.paper(guidance=[(5, 0.5)]).guidance_relative
    assert FlashUConfig.paper(guidance_relative=False) == paper
    assert paper.guidance != Guidance(paper.guidance.phases) and list(paper.guidance) == [(24, 0.75), (11, 1.0)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FfnPruning(1.0), r"FfnPruning\.ratio: expected a number in \[0, 1\), got 1\.0"),
        (lambda: LayerSkip(0.2, -1), r"LayerSkip\.interval: expected an integer >= 0, got -1"),
        (lambda: TokenSkip(0.2, 0), r"TokenSkip\.interval: expected an integer >= 1, got 0"),
        (lambda: HeadCaching(order=9), r"HeadCaching\.order: expected an integer from 0 to 8, got 9"),
        (lambda: HeadCaching(budget=-1), r"HeadCaching\.budget: expected a finite number >= 0, got -1"),
        (lambda: EncoderSharing(on=1), r"EncoderSharing\.on: expected True or False, got 1"),
        (lambda: Guidance([(3, 0)]), r"Guidance\.phases: expected a list of .*, got \(3, 0\)"),
        (
            lambda: Answers(token_prune_score="x"),
            r"Answers\.token_prune_score: expected one of value_norm, .*, got 'x'",
        ),
        (lambda: Execution(step_graphs=None), r"Execution\.step_graphs: expected True or False, got None"),
        (lambda: FlashUConfig(head=5), r"FlashUConfig\.head: expected None or HeadCaching, got 5"),
    ],
)
def test_a_bad_value_of_a_group_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_keywords_are_type_errors():
    for make in (FlashUConfig, FlashUConfig.paper, FlashUConfig.fast, FlashUConfig.exact, FlashUConfig().replace):
        with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
            make(speed=3)
    with pytest.raises(AttributeError):
        FlashUConfig().speed  # noqa: B018
    with pytest.raises(dataclasses.FrozenInstanceError):
        FlashUConfig().ffn_prune_ratio = 0.2


@pytest.mark.parametrize(
    "name, hint",
    [
        ("step", r"'step'; did you mean steps\?"),
        ("ffn_ratio", r"'ffn_ratio'; did you mean ffn_prune_ratio\?"),
        ("zzz", r"'zzz'; expected one of answers, .*, steps, tokens, or a flat keyword"),
        ("\x1b" * 3000, "expected one of answers, "),
    ],
)
def test_an_unknown_keyword_is_named_with_those_like_it(name, hint):
    for make in (FlashUConfig, FlashUConfig.exact, FlashUConfig.paper, FlashUConfig.fast, FlashUConfig().replace):
        with pytest.raises(TypeError, match=f"unexpected keyword argument .*{hint}") as caught:
            make(**{name: 35})
        assert len(str(caught.value)) <= 500 and str(caught.value).isprintable()


def test_unset_fields_are_not_shown():
    assert repr(FlashUConfig()) == "FlashUConfig()"
    assert (
        repr(FlashUConfig(steps=9, prune_multiple=16))
        == "FlashUConfig(steps=9, ffn=FfnPruning(ratio=0.0, multiple=16))"
    )


def test_a_flat_file_of_an_earlier_version_is_read():
    """`to_json` wrote flat keywords before there were groups; the newest ones may be missing."""
    old = {name: value for name, value in FlashUConfig.fast().flat().items() if name != "step_graphs"}
    assert old["guidance"] is None and old["guidance_relative"] is False
    assert FlashUConfig.from_json(json.dumps(old)) == FlashUConfig.fast()


@pytest.mark.parametrize(
    ("flat", "idle"),
    [
        ({"layer_skip_ratio": 0.2}, "layer_skip_ratio=0.2 has no effect with layer_skip_interval=0"),
        ({"token_skip_ratio": 0.3}, "token_skip_ratio=0.3 has no effect with token_skip=False"),
        (
            {"token_skip_ratio": 0.3, "token_skip": True, "token_skip_interval": 1},
            "token_skip_ratio=0.3 has no effect with token_skip_interval=1",
        ),
    ],
)
def test_a_setting_that_another_keeps_off_is_told(flat, idle):
    config = FlashUConfig(**flat)
    assert config.idle == (idle,) and config.approximates == ()
    with pytest.warns(UserWarning, match=f"^FlashUConfig: {idle}$"), accelerate(small_model(), config):
        pass
    on = config.replace(layer_skip_interval=5, token_skip=True, token_skip_interval=5)
    assert on.idle == () == FlashUConfig.paper().idle and on.approximates
