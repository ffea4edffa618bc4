"""The model with upstream's parameter names, its prompts, sampler, checkpoints and image codec.

Names are loaded on first use: the torch-only submodules (validate, sampling) are usable without transformers, which the
runtime relies on when it accelerates an upstream checkout in that checkout's own environment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import loaded_from

if TYPE_CHECKING:
    from ..many import Answers as Answers
    from ..many import Drawings as Drawings
    from ..many import ImageRequest as ImageRequest
    from ..many import ImageResult as ImageResult
    from ..many import QuestionRequest as QuestionRequest
    from ..many import QuestionResult as QuestionResult
    from .calibration import GenerationSample as GenerationSample
    from .calibration import UnderstandingSample as UnderstandingSample
    from .config import Showo2Config as Showo2Config
    from .model import Showo2 as Showo2
    from .pipeline import Pipeline as Pipeline
    from .sampling import sample as sample
    from .understanding import answer_tokens as answer_tokens
    from .understanding import answer_tokens_batch as answer_tokens_batch

_HOMES = {
    "GenerationSample": "calibration",
    "UnderstandingSample": "calibration",
    "Showo2Config": "config",
    "Showo2": "model",
    "Answers": ".many",
    "Drawings": ".many",
    "ImageRequest": ".many",
    "ImageResult": ".many",
    "QuestionRequest": ".many",
    "QuestionResult": ".many",
    "Pipeline": "pipeline",
    "sample": "sampling",
    "answer_tokens": "understanding",
    "answer_tokens_batch": "understanding",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = loaded_from(__name__, _HOMES)
