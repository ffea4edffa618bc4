"""An embedded model with its tokenizer and codec around it: `Pipeline.from_pretrained("nano")` of each family."""

from __future__ import annotations

import torch

from ..models.pipeline import ModelPipeline
from .model import load_model, load_plan
from .subject import subject

__all__ = ["load_pipeline"]


def load_pipeline(family: str, dtype: torch.dtype | None, device: torch.device | str) -> ModelPipeline:
    """family: one of `subject.FAMILIES`. dtype: of the model's weights; None: fp32."""
    own = subject(family)
    model = load_model(own.folder).to(device, dtype)
    pipe = own.pipeline(model)
    pipe.name, pipe.presets = "nano", own.preset_config
    pipe.own_plan = lambda config: load_plan(model, own.folder, config)
    return pipe
