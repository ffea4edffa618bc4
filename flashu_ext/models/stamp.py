"""Notices that a model changed: its modules, hooks and weights, in one pass of a fraction of a millisecond.

Values written through `.data`, or through another view of a weight's memory, change no version. A few values of a few weights,
other ones in every call, show such a write where it reached the whole model, as a synchronised or averaged model's does. What
is not noticed: such writes to single weights, and values of inference tensors.
"""

from __future__ import annotations

import inspect
import re
import weakref
from itertools import chain, zip_longest
from operator import attrgetter, itemgetter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["GLOBAL_HOOKS", "Stamp", "called_functions"]

_SCALARS = (
    "scaling",
    "rope_type",
    "attention_dropout",
    "sliding_window",
    "attention_scaling",
    "variance_epsilon",
    "eps",
    "p",
)
"""Plain attributes of modules that their results depend on."""

_SAMPLED = 6
"""Weights of which a call compares values."""

GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class Stamp:
    """The state of a model when this was made.

    Attributes:
        unversioned: some weights are inference tensors, whose changes cannot be noticed.
    """

    def __init__(self, model: nn.Module):
        self._modules = list(model.modules())
        self._attributes = list(map(vars, self._modules))
        self._with_mode = [own for own in self._attributes if "training" in own]  # torch.compile's wrapper has none
        contents: list[Any] = [
            each
            for module in self._modules
            for each in (module._modules, module._parameters, module._buffers)
            if isinstance(each, dict)  # a compiled module's are not
        ]
        hooks: list[Any] = [
            each for module in self._modules for each in (module._forward_hooks, module._forward_pre_hooks)
        ]
        hooks += [getattr(torch_module, name) for name in GLOBAL_HOOKS]
        self._filled: list[dict[Any, Any]] = [each for each in (*contents, *hooks) if each]
        self._empty = [each for each in (*contents, *hooks) if not each]
        kinds: set[Any] = set(map(type, self._modules))
        self._classes = [
            kind for kind in kinds if not issubclass(kind, torch.jit.ScriptModule)
        ]  # those have no methods
        self._called = [each for kind in self._classes for each in called_functions(kind.forward)]
        self._configs = list({id(own["config"]): own["config"] for own in self._attributes if "config" in own}.values())
        self._scalars = [(own, name) for own in self._attributes for name in _SCALARS if name in own]
        self._objects = self._contents()
        self._flags = self._read_flags()
        distinct = list({id(each): each for each in self._objects if isinstance(each, Tensor)}.values())
        self._versioned = [tensor for tensor in distinct if not tensor.is_inference()]
        self._addressed = [tensor for tensor in distinct if _has_address(tensor)]
        self.unversioned = len(self._versioned) < len(distinct)
        self._versions, self._addresses = self._read_weights()
        self._matrices = _by_kind(model)
        self._samples = [_sample(matrix) for matrix in self._matrices]
        self._turn = 0
        self._written = False
        self._ids = set(map(id, distinct))
        _stamps.add(self)

    def structure_changed(self) -> bool:
        """Whether a module, a parameter object, a hook, a class, a flag or a method is another one."""
        return any(self._empty) or not _same(self._contents(), self._objects) or self._read_flags() != self._flags

    def weights_changed(self) -> bool:
        """Whether a weight was written to, or lies elsewhere."""
        return self._written or self._read_weights() != (self._versions, self._addresses)

    def values_changed(self) -> bool:
        """Whether a sample, another one in every call, shows that weights have other values. They must not have moved."""
        count = len(self._matrices)
        turns = [(self._turn + each) % count for each in range(min(_SAMPLED, count))]
        self._turn = (self._turn + _SAMPLED) % max(1, count)
        return any(not torch.equal(_sample(self._matrices[turn]), self._samples[turn]) for turn in turns)

    def moved(self) -> bool:
        """Whether a weight lies elsewhere, as after `model.to(...)`."""
        return self._read_weights()[1] != self._addresses

    def _contents(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._filled)))

    def _read_flags(self) -> tuple[Any, ...]:
        return (
            # A new attribute may be a method that replaces the class's own.
            list(map(len, self._attributes)),
            list(map(_TRAINING, self._with_mode)),
            list(map(type, self._modules)),
            [(kind.forward, kind.__call__) for kind in self._classes],
            [namespace.get(name) for namespace, name in self._called],
            list(vars(type(self._modules[0])).values()),
            [own.get(name) for own, name in self._scalars],
            [id(own.get("config")) for own in self._attributes],
            [dict(vars(config)) for config in self._configs],
        )

    def _read_weights(self) -> tuple[list[int], list[int]]:
        return list(map(_VERSION, self._versioned)), list(map(Tensor.data_ptr, self._addressed))


_stamps: weakref.WeakSet[Stamp] = weakref.WeakSet()


def _note_fused_step(optimizer: Any, *_: Any) -> None:
    """A fused optimizer writes to weights without a new version."""
    written = {id(each) for group in optimizer.param_groups if group.get("fused") for each in group["params"]}
    for stamp in list(_stamps) if written else ():
        stamp._written = stamp._written or not written.isdisjoint(stamp._ids)


register_optimizer_step_post_hook(_note_fused_step)

_TRAINING, _VERSION = itemgetter("training"), attrgetter("_version")


def called_functions(method: Any) -> list[tuple[dict[str, Any], str]]:
    """(module's namespace, name) of the functions of its module that a method, under its decorators, names."""
    method = inspect.unwrap(method)
    code, namespace = getattr(method, "__code__", None), getattr(method, "__globals__", {})
    names = code.co_names if code is not None else ()
    return [(namespace, name) for name in names if isinstance(namespace.get(name), FunctionType)]


def _by_kind(model: nn.Module) -> list[Tensor]:
    """A model's weight matrices, one of each kind (gate projections, embeddings, ...), then the next of each."""
    kinds: dict[str, list[Tensor]] = {}
    for name, weight in model.named_parameters():
        if (
            weight.dim() > 1
            and type(weight) is nn.Parameter
            and weight.is_contiguous()
            and weight.device.type != "meta"
        ):
            kinds.setdefault(re.sub(r"[0-9]+", "", name), []).append(weight)
    return [weight for turn in zip_longest(*kinds.values()) for weight in turn if weight is not None]


@torch.no_grad()
def _sample(matrix: Tensor) -> Tensor:
    """The bits of eight values, on the CPU."""
    step = max(1, matrix.numel() // 8)
    values = matrix.detach().as_strided((min(8, matrix.numel()),), (step,), matrix.storage_offset())
    return values.clone().cpu().view(torch.uint8)


def _same(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists hold the same objects. Lists compare by identity first, which is fast; tensors that are not identical
    may have no truth value."""
    try:
        return bool(a == b)
    except (RuntimeError, ValueError):
        return False


def _has_address(tensor: Tensor) -> bool:
    """False for tensor subclasses without memory of their own."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True
