"""Room: ops. Every kernel of the library as a typed function; `reference` has the same functions in plain torch.

Each function carries `is_supported(device, dtype, shape=None)`. Importing this module loads the compiled library and
raises ImportError, with every cause, where it cannot be loaded.
"""

from ._ops.ffn import gathered_down, gathered_ffn, gathered_swiglu, neuron_norms_
from ._ops.norm import add_rms_norm_, rms_norm, rotary_cache_, span_gate_add_, span_modulate
from ._ops.routing import (
    cosine_importance,
    gather_rows,
    scatter_add_rows_,
    scatter_rows_,
    select_threshold,
    select_topk,
    value_norms,
)
from ._ops.step import feature_delta, guided_euler_step_, taylor_predict, taylor_update_

__all__ = [
    "add_rms_norm_",
    "cosine_importance",
    "feature_delta",
    "gather_rows",
    "gathered_down",
    "gathered_ffn",
    "gathered_swiglu",
    "guided_euler_step_",
    "neuron_norms_",
    "rms_norm",
    "rotary_cache_",
    "scatter_add_rows_",
    "scatter_rows_",
    "select_threshold",
    "select_topk",
    "span_gate_add_",
    "span_modulate",
    "taylor_predict",
    "taylor_update_",
    "value_norms",
]
