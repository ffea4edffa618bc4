"""BAGEL: the model with upstream's parameter names, its sampler and pipeline. Names are loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import loaded_from

if TYPE_CHECKING:
    from ..sampling import TaylorSeer as TaylorSeer
    from .calibration import GenerationSample as GenerationSample
    from .calibration import UnderstandingSample as UnderstandingSample
    from .config import BagelConfig as BagelConfig
    from .images import encoded as encoded
    from .images import vae_image as vae_image
    from .images import vit_image as vit_image
    from .model import Bagel as Bagel
    from .model import Image as Image
    from .model import Text as Text
    from .model import TokenIds as TokenIds
    from .pipeline import Pipeline as Pipeline
    from .sampling import Guidance as Guidance
    from .sampling import sample as sample
    from .understanding import answer_tokens as answer_tokens
    from .understanding import answer_tokens_batch as answer_tokens_batch

_HOMES = {
    "GenerationSample": "calibration",
    "UnderstandingSample": "calibration",
    "BagelConfig": "config",
    "Bagel": "model",
    "Guidance": "sampling",
    "Image": "model",
    "Pipeline": "pipeline",
    "TaylorSeer": "sampling",
    "Text": "model",
    "TokenIds": "model",
    "answer_tokens": "understanding",
    "answer_tokens_batch": "understanding",
    "encoded": "images",
    "sample": "sampling",
    "vae_image": "images",
    "vit_image": "images",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = loaded_from(__name__, _HOMES)
