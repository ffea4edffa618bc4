"""Tests of FlashUConfig: presets, validation, JSON."""

import json

import pytest

from flashu_ext import FlashUConfig


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
    # Layer and score say how tokens are pruned; the ratio says whether.
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
    ("head_forecast_order", 3),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a JSON object"),
        ("{", "not valid JSON"),
        ('{"steps": 3, "steps": 4}', "appears twice"),
        ('{"ffn_prune_ratio": NaN}', "NaN is not allowed"),
        ('{"speed": 3}', "unknown field 'speed'"),
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
