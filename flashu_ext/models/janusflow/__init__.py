"""JanusFlow: the model with upstream's parameter names, its sampler and pipeline. Names are loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import loaded_from

if TYPE_CHECKING:
    from .calibration import GenerationSample as GenerationSample
    from .calibration import UnderstandingSample as UnderstandingSample
    from .config import JanusFlowConfig as JanusFlowConfig
    from .images import pixel_values as pixel_values
    from .model import JanusFlow as JanusFlow
    from .pipeline import Pipeline as Pipeline
    from .sampling import sample as sample
    from .understanding import answer_tokens as answer_tokens
    from .understanding import answer_tokens_batch as answer_tokens_batch

_HOMES = {
    "GenerationSample": "calibration",
    "UnderstandingSample": "calibration",
    "JanusFlowConfig": "config",
    "JanusFlow": "model",
    "Pipeline": "pipeline",
    "sample": "sampling",
    "answer_tokens": "understanding",
    "answer_tokens_batch": "understanding",
    "pixel_values": "images",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = loaded_from(__name__, _HOMES)
