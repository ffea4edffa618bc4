"""The embedded model with its tokenizer and codec around it: `Pipeline.from_pretrained("nano")`."""

from __future__ import annotations

import torch

from ..models.showo2.pipeline import Pipeline
from . import codec
from .model import load_model, load_plan
from .showo2 import SHIFT, SUBJECT
from .tokenizer import layout
from .world import SIZE

__all__ = ["load_pipeline"]


def load_pipeline(dtype: torch.dtype | None, device: torch.device | str) -> Pipeline:
    """dtype: of the model's weights; None: fp32."""
    model = load_model().to(device, dtype)
    return Pipeline(
        model,
        layout(),
        codec,
        SIZE,
        SUBJECT.guidance,
        SHIFT,
        "nano",
        presets=SUBJECT.preset_config,
        own_plan=lambda config: load_plan(model, config=config),
    )
