"""The embedded models with their tokenizer and codec around them: Show-o2's is `fx.showo2.Pipeline.from_pretrained("nano")`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.bagel.pipeline import Pipeline as BagelPipeline
from ..models.bagel.prompts import SequenceLayout
from ..models.janusflow.pipeline import Pipeline as JanusFlowPipeline
from ..models.showo2.pipeline import Pipeline
from . import codec
from .bagel import SHIFT as BAGEL_SHIFT
from .janusflow import chat_layout
from .model import load_model, load_plan
from .showo2 import SHIFT
from .subject import FAMILIES, Subject, subject
from .tokenizer import layout
from .world import SIZE

__all__ = ["embedded_in", "load_family", "load_pipeline"]


class _GridCodec:
    """The codec with latents where they lie in the image, [B, 16, 12, 12]."""

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return codec.grid(codec.encode(images))

    def decode(self, latents: Tensor) -> Tensor:
        return codec.decode(codec.ungrid(latents))


def load_pipeline(dtype: torch.dtype | None, device: torch.device | str) -> Pipeline:
    """Show-o2's. dtype: of the model's weights; None: fp32."""
    pipe: Pipeline = load_family("showo2", dtype, device)
    return pipe


def load_family(family: str, dtype: torch.dtype | None, device: torch.device | str) -> Any:
    """The embedded pipeline of 'showo2', 'janusflow' or 'bagel'. dtype: of the model's weights; None: fp32."""
    own = subject(family)
    model = load_model(own.folder).to(device, dtype)
    more = {
        "name": "nano",
        "presets": own.preset_config,
        "own_plan": lambda config: load_plan(model, own.folder, config),
    }
    return _BUILD[family](model, own, more)


def embedded_in(directory: Path, dtype: torch.dtype | None, device: torch.device | str) -> Any:
    """The pipeline of the embedded model whose folder this is; None for another folder."""
    for family in FAMILIES:
        if directory.samefile(subject(family).folder):
            return load_family(family, dtype, device)
    return None


def _showo2(model: Any, own: Subject, more: dict[str, Any]) -> Pipeline:
    return Pipeline(model, layout(), codec, SIZE, own.guidance, SHIFT, **more)


def _janusflow(model: Any, own: Subject, more: dict[str, Any]) -> JanusFlowPipeline:
    sizes: dict[str, Any] = {"guidance_scale": own.guidance, "latent_pixels": SIZE // (2 * codec.GRID)}
    return JanusFlowPipeline(model, chat_layout(), _GridCodec(), **sizes, **more)


def _bagel(model: Any, own: Subject, more: dict[str, Any]) -> BagelPipeline:
    words = layout()
    texts = SequenceLayout(words.encode, words.decode, words.bos, words.eos, words.boi, words.eoi)
    sides: dict[str, Any] = {"vae_sides": (SIZE, SIZE), "vit_sides": (SIZE, SIZE), "timestep_shift": BAGEL_SHIFT}
    return BagelPipeline(model, texts, _GridCodec(), **sides, **more)


_BUILD: dict[str, Callable[[Any, Subject, dict[str, Any]], Any]] = {
    "showo2": _showo2,
    "janusflow": _janusflow,
    "bagel": _bagel,
}
