"""LoRA adapters of peft on the small models, with weights that change the outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FFN = ["gate_proj", "up_proj", "down_proj"]


@torch.no_grad()
def fill(model: Any, adapter: str = "default", seed: int = 3, std: float = 0.05) -> None:
    """Random weights for an adapter's B, which begins as zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if f"lora_B.{adapter}" in name:
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def adapted(model: Any, targets: list[str] | str = [*ATTENTION, *FFN], seed: int = 3, **config: Any) -> Any:  # noqa: B006
    """The model with an adapter, inside peft's wrapper."""
    import peft

    torch.manual_seed(seed)
    made = {"r": 4, "lora_alpha": 8, "target_modules": targets, **config}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**made)).eval()
    fill(wrapped, seed=seed)
    return wrapped


def second(wrapped: Any, name: str = "other", targets: list[str] | str = [*ATTENTION, *FFN], **config: Any) -> None:  # noqa: B006
    """Another adapter beside the first, not active."""
    import peft

    torch.manual_seed(7)
    wrapped.add_adapter(name, peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": targets, **config}))
    wrapped.eval()
    fill(wrapped, name, seed=7)


def as_peft(module: Any, x: Tensor) -> Tensor:
    """What a LoRA layer says that it computes, written out in x's own dtype."""
    y = module.base_layer(x)
    for name in module.active_adapters:
        if name in module.lora_A:
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            y = y + (x @ a.T @ b.T) * module.scaling[name]
    return y
