"""The decoder of a model of any kind: a stack of layers with SwiGLU FFNs, alone or inside a unified model of a known family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["FAMILIES", "Decoder", "Family", "check_parts", "decoder_of", "find", "register_family"]


class Family(NamedTuple):
    """How a family's models are told from others."""

    name: str
    mark: str
    """An attribute that only they have."""
    stack: str
    """Path of the language model without its head: `layers` and a final `norm`."""
    module: str
    """Has `adapter(model)`, which raises TypeError where a part is missing; imported on first use."""
    upstream: str | None = None
    """Has `UpstreamMethods(runner, originals)`, with the methods that `Adapter.methods` names, underscores for dots."""


FAMILIES: dict[str, Family] = {
    "showo2": Family(
        "Show-o2", "showo", "showo.model", "flashu_ext.models.showo2.adapter", "flashu_ext.upstream.showo2"
    ),
    "janusflow": Family(
        "JanusFlow",
        "vision_gen_enc_model",
        "language_model.model",
        "flashu_ext.models.janusflow.adapter",
        "flashu_ext.upstream.janusflow",
    ),
    "bagel": Family(
        "BAGEL", "vae2llm", "language_model.model", "flashu_ext.models.bagel.adapter", "flashu_ext.upstream.bagel"
    ),
}
"""By the adapters' `family`."""

_STACKS = ("", "model", "model.language_model", "language_model", "language_model.model", "decoder", "model.decoder")
"""Where transformers' models keep the module with their layers, from the model on."""

_FFN = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Decoder:
    """A model's decoder. Modules are the model's own."""

    model: Any
    stack: Any
    """Computes hidden states from `input_ids` or `inputs_embeds`, with `layers` and a final `norm`."""

    @property
    def layers(self) -> Any:
        return self.stack.layers

    @property
    def norm(self) -> Any:
        return self.stack.norm

    @property
    def ffns(self) -> list[Any]:
        return [layer.mlp for layer in self.layers]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.stack.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.stack.parameters()).device


def decoder_of(model: Any) -> Decoder:
    """The decoder of a unified model, or of a transformers model (Qwen2, Llama, Mistral, ...), found by its structure.

    Raises:
        TypeError: no model, or one without such layers; the message says what is missing.
    """
    if isinstance(model, nn.Module):
        for path in (*(family.stack for family in FAMILIES.values()), *_STACKS):
            stack: Any = find(model, path) if path else model
            if find(stack, "layers.0") is not None and find(stack, "norm") is not None:
                check_parts(stack, "decoder", (f"layers.{i}.{part}" for i in range(len(stack.layers)) for part in _FFN))
                return Decoder(model, stack)
    got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    names = ", ".join(family.name for family in FAMILIES.values())
    raise TypeError(
        f"model: expected a model of a known family ({names}), or one with decoder layers (`layers`, `norm`) as "
        f"transformers' Qwen2 or Llama, got {got}"
    )


def register_family(family: str, description: Family) -> None:
    """Make models of another package known to `flashu_ext.accelerate`; see docs/adding-a-model.md.

    Args:
        family: the adapters' `family`.
        description: how its models are found.

    Raises:
        TypeError: no `Family`. ValueError: the name is another family's, or the mark is.
    """
    if not isinstance(description, Family):
        raise TypeError(f"description: expected a Family, got {type(description).__name__}")
    for name, known in FAMILIES.items():
        if name == family and known != description:
            raise ValueError(f"family: expected a name of its own, got {family!r}")
        if name != family and known.mark == description.mark:
            raise ValueError(
                f"mark: expected an attribute that no other family has, got {description.mark!r} of {name!r}"
            )
    FAMILIES[family] = description


def check_parts(model: Any, name: str, paths: Iterator[str] | Sequence[str]) -> None:
    """Raise TypeError where a model of the family `name` lacks an attribute at one of the dotted paths."""
    missing = [path for path in paths if find(model, path) is None]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise TypeError(
            f"model: expected a {name} model, got {type(model).__name__} without {', '.join(missing[:4])}{more}"
        )


def find(root: Any, path: str) -> Any:
    """The attribute or element at a dotted path, or None."""
    for name in path.split("."):
        if name.isdigit() and hasattr(root, "__len__"):
            root = root[int(name)] if int(name) < len(root) else None
        elif hasattr(root, name):
            root = getattr(root, name)
        else:
            return None
    return root
