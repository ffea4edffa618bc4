"""LoRA layers of peft: told by their class, read as a base with low-rank updates beside it. peft is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = [
    "BASE",
    "LORA",
    "Update",
    "adapter_layers",
    "adapter_names",
    "adapters_of",
    "base_of",
    "is_lora",
    "lora_state",
    "names_of",
    "remakes_weights",
    "updates_of",
]

LORA: Mapping[str, tuple[str, ...]] = {"Linear": ("peft.tuners.lora.layer",)}
"""Class name -> modules that define it."""

BASE = "__base__"
"""peft's name of none of the adapters."""


@dataclass(frozen=True)
class Update:
    """What one adapter adds to a linear layer: scaling B A x.

    Attributes:
        name: the adapter's.
        down: A, [r, in].
        up: B, [out, r].
        scaling: a number.
    """

    name: str
    down: nn.Linear
    up: nn.Linear
    scaling: float


def is_lora(module: Any) -> bool:
    """Whether a module is peft's linear layer with LoRA adapters, of whatever kind."""
    kind = type(module)
    return kind.__module__ in LORA.get(kind.__name__, ())


def remakes_weights(module: Any) -> bool:
    """Whether a module is peft's wrapper of `target_parameters` with an adapter that each call adds to the weight itself."""
    kind = type(module)
    return kind.__name__ == "ParamWrapper" and kind.__module__ in LORA["Linear"] and bool(adapters_of(module))


def base_of(module: Any) -> Any:
    """The linear layer that adapters are beside; any other module itself."""
    return module.base_layer if is_lora(module) else module


def adapters_of(module: Any, adapter: str | None = None) -> list[str]:
    """The adapters that a LoRA layer adds, in its order: the one of this name, where it has it, whatever is active, disabled or
    merged; None: the active ones, unless it is disabled or they are merged."""
    if adapter is not None:
        return [adapter] if adapter in module.lora_A else []
    if module.disable_adapters or module.merged_adapters:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Path -> module, of everything in which peft keeps adapters, of whatever kind."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__module__.startswith("peft.") and hasattr(module, "active_adapters")
    }


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's LoRA adapters, in their order."""
    layers = adapter_layers(model).values()
    return list(dict.fromkeys(name for each in layers for name in getattr(each, "lora_A", ())))


def names_of(module: Any) -> list[str]:
    """The adapters that a linear layer has, active or not."""
    return list(module.lora_A) if is_lora(module) else []


def updates_of(module: Any, adapter: str | None = None) -> tuple[Update, ...]:
    """What a linear layer's adapters (`adapters_of`) add; nothing for a module without adapters."""
    names = adapters_of(module, adapter) if is_lora(module) else ()
    return tuple(Update(name, module.lora_A[name], module.lora_B[name], module.scaling[name]) for name in names)


def lora_state(module: Any) -> tuple[Any, ...]:
    """What a LoRA layer's result depends on besides its modules, weights and mode."""
    return (
        list(module.active_adapters),
        module.disable_adapters,
        list(module.merged_adapters),
        dict(module.scaling),
        {name: type(variant) for name, variant in getattr(module, "lora_variant", {}).items()},
        {
            name: dict(flags)
            for name in ("use_dora", "lora_bias")
            if isinstance(flags := getattr(module, name, None), dict)
        },
        getattr(module, "cast_input_dtype_enabled", True),
    )
