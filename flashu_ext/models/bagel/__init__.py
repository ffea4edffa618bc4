"""BAGEL: the model with upstream's parameter names, and its sampler. Names are loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import BagelConfig as BagelConfig
    from .images import encoded as encoded
    from .images import vae_image as vae_image
    from .images import vit_image as vit_image
    from .model import Bagel as Bagel
    from .model import Image as Image
    from .model import Text as Text
    from .model import TokenIds as TokenIds
    from .sampling import Guidance as Guidance
    from .sampling import TaylorSeer as TaylorSeer
    from .sampling import sample as sample
    from .understanding import answer_tokens as answer_tokens

_HOMES = {
    "BagelConfig": "config",
    "Bagel": "model",
    "Guidance": "sampling",
    "Image": "model",
    "TaylorSeer": "sampling",
    "Text": "model",
    "TokenIds": "model",
    "answer_tokens": "understanding",
    "encoded": "images",
    "sample": "sampling",
    "vae_image": "images",
    "vit_image": "images",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
