"""Generates the images of the fixture, and lists settings of every knob."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import flashu_ext as fx
from flashu_ext.models.sampling import integrate
from flashu_ext.models.showo2.sampling import DenseStepper, SampleInputs

from .conformance import Fixture

ENOUGH = 1e6
"""A budget that no signal uses up."""

TOKENS = {"token_skip": True, "token_skip_ratio": 0.5, "token_skip_interval": 3}
LAYERS_TOO = {"layer_skip_ratio": 0.3, "layer_skip_interval": 4}
ADAPTIVE = {"adaptive_cache": True, "adaptive_cache_budget": 0.12}
UNIT = {"skip_unit_guidance": True, "guidance": [(3, 1.0), (4, 5.0), (3, 1.0)]}

CASES = {
    "tokens": TOKENS,
    "nearly all tokens": {**TOKENS, "token_skip_ratio": 0.99},
    "tokens forecast": {**TOKENS, "token_skip_forecast": True},
    "tokens in the layers left": {**TOKENS, **LAYERS_TOO},
    "tokens, plain routing": {**TOKENS, "routing_kernels": False},
    "tokens and head cache": {**TOKENS, "head_cache_interval": 3},
    "head residual": {"head_residual_reuse": True, "head_cache_interval": 3},
    "head residual forecast": {"head_residual_reuse": True, "head_cache_interval": 3, "head_forecast_order": 2},
    "head residual, routed and skipped": {
        "head_residual_reuse": True, "head_cache_interval": 3, "head_forecast_order": 1, **TOKENS, **LAYERS_TOO,
    },
    "encoder": {"encoder_cache": True, "encoder_cache_interval": 3},
    "encoder and head cache": {"encoder_cache": True, "encoder_cache_interval": 2, "head_cache_interval": 3},
    "adaptive": ADAPTIVE,
    "adaptive, forecast": {**ADAPTIVE, "head_forecast_order": 1},
    "adaptive, residual": {**ADAPTIVE, "head_residual_reuse": True},
    "adaptive, not too old": {**ADAPTIVE, "adaptive_cache_budget": ENOUGH, "head_cache_interval": 4},
    "adaptive with encoder cache": {**ADAPTIVE, "encoder_cache": True, "encoder_cache_interval": 2},
    "adaptive, routed and skipped": {**ADAPTIVE, **TOKENS, "token_skip_interval": 5, **LAYERS_TOO},
    "unit guidance": UNIT,
    "unit guidance, head cache": {**UNIT, "head_cache_interval": 2},
    "unit guidance, forecast": {**UNIT, "head_cache_interval": 2, "head_forecast_order": 2},
    "unit guidance, layers": {**UNIT, **LAYERS_TOO},
    "unit guidance, tokens": {**UNIT, **TOKENS},
    "unit guidance, adaptive": {**UNIT, **ADAPTIVE, "adaptive_cache_budget": ENOUGH},
    "unit guidance, adaptive forecast": {**UNIT, **ADAPTIVE, "head_forecast_order": 1},
    "all of it": {
        **UNIT, **TOKENS, **LAYERS_TOO, "head_cache_interval": 3, "head_residual_reuse": True, "head_forecast_order": 1,
        "encoder_cache": True, "encoder_cache_interval": 2,
    },
    "all of it, adaptive": {
        **UNIT, **TOKENS, **LAYERS_TOO, **ADAPTIVE, "token_skip_interval": 4, "head_residual_reuse": True,
        "encoder_cache": True, "encoder_cache_interval": 2, "token_skip_forecast": True,
    },
}  # fmt: skip


def sample(model: Any, fixture: Fixture, **changes: Any) -> Tensor:
    return fx.showo2.sample(model, **{**fixture.sample_inputs, **changes})


def sample_as_upstream(model: Any, fixture: Fixture, steps: int, **changes: Any) -> Tensor:
    """Through `t2i_generate`, one call per evaluation, as upstream's sampler does, accelerated or not."""
    inputs = SampleInputs.build(model, **{**fixture.sample_inputs, **changes, "steps": steps})
    return integrate(DenseStepper(model, inputs))
