"""LoRA layers of peft: told by their class, read as a base with low-rank updates beside it. peft is not imported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
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
    "choosing",
    "is_lora",
    "lora_state",
    "remakes_weights",
    "updates_of",
]

LORA: Mapping[str, tuple[str, ...]] = {"Linear": ("peft.tuners.lora.layer",)}
"""Class name -> modules that define it."""

BASE = "__base__"
"""peft's name of none of the adapters."""

_chosen: ContextVar[str | None] = ContextVar("chosen", default=None)


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


def adapters_of(module: Any) -> list[str]:
    """The adapters that a LoRA layer adds now, in its order: the active ones, or the one of `choosing`, unless it is disabled or
    they are merged."""
    if module.disable_adapters or module.merged_adapters:
        return []
    chosen = _chosen.get()
    return [name for name in (module.active_adapters if chosen is None else [chosen]) if name in module.lora_A]


@contextlib.contextmanager
def choosing(adapter: str) -> Iterator[None]:
    """Inside, LoRA layers are read as if this adapter were the active one; the model stays as it is. Of what is read it must be
    sure that none of it calls such a layer, which would compute the active ones."""
    token = _chosen.set(adapter)
    try:
        yield
    finally:
        _chosen.reset(token)


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


def updates_of(module: Any) -> tuple[Update, ...]:
    """What a linear layer's adapters (`adapters_of`) add; nothing for a module without adapters."""
    names = adapters_of(module) if is_lora(module) else ()
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
