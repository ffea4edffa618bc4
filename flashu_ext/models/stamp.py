"""Notices that a model changed: its modules, hooks and weights, in one pass of a fraction of a millisecond.

Values written through `.data`, or through another view of a weight's memory, change no version. A few bytes in the middle of
every matrix show such a write where it reached all of a matrix, as a merged adapter's or a synchronised model's does. What is
not noticed: such writes to parts of a matrix, and values of inference tensors.
"""

from __future__ import annotations

import inspect
import re
import sys
import weakref
from collections.abc import Mapping
from ctypes import string_at
from itertools import chain, repeat, zip_longest
from operator import attrgetter, itemgetter, methodcaller
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["COMPUTED", "GLOBAL_HOOKS", "Stamp", "called_functions", "registered_attention"]

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

_BYTES = 16
"""Of every matrix on the CPU that each call compares."""

_SAMPLED = 6
"""Matrices on other devices that a call compares; the next call takes the next ones."""

COMPUTED = ("linear", "silu")
"""Functions of torch.nn.functional that kernels compute instead."""

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
        methods = [kind.forward for kind in self._classes]
        methods += [each for each in vars(type(model)).values() if isinstance(each, FunctionType)]
        self._called = [each for method in methods for each in called_functions(method)]
        self._configs = list({id(own["config"]): own["config"] for own in self._attributes if "config" in own}.values())
        self._scalars = [(own, name) for own in self._attributes for name in _SCALARS if name in own]
        self._objects = self._contents()
        self._flags = self._read_flags()
        distinct = list({id(each): each for each in self._objects if isinstance(each, Tensor)}.values())
        self._versioned = [tensor for tensor in distinct if not tensor.is_inference()]
        self._addressed = [tensor for tensor in distinct if _has_address(tensor)]
        self.unversioned = len(self._versioned) < len(distinct)
        self._versions, self._addresses = self._read_weights()
        matrices = _by_kind(model)
        self._places = [_middle(matrix) for matrix in matrices if matrix.device.type == "cpu"]
        self._values = self._read_values()
        self._matrices = [matrix for matrix in matrices if matrix.device.type != "cpu"]
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
        """Whether a sample shows that weights have other values. They must not have moved (`weights_changed`)."""
        if self._read_values() != self._values:
            return True
        count = len(self._matrices)
        turns = [(self._turn + each) % count for each in range(min(_SAMPLED, count))]
        self._turn = (self._turn + _SAMPLED) % max(1, count)
        return any(not torch.equal(_sample(self._matrices[turn]), self._samples[turn]) for turn in turns)

    def _read_values(self) -> list[bytes]:
        return list(map(string_at, self._places, repeat(_BYTES)))

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
            [getattr(nn.functional, name) for name in COMPUTED],
            [registered_attention().get(name) for name in ("sdpa", "eager")],
            list(vars(type(self._modules[0])).values()),
            [own.get(name) for own, name in self._scalars],
            [id(own.get("config")) for own in self._attributes],
            # Emptied by another dict in its place.
            list(map(id, map(_HOOKS, self._attributes))),
            list(map(id, map(_PRE_HOOKS, self._attributes))),
            [dict(vars(config)) for config in self._configs],
        )

    def _read_weights(self) -> tuple[list[int], list[int]]:
        return list(map(_VERSION, self._versioned)), list(map(Tensor.data_ptr, self._addressed))


_stamps: weakref.WeakSet[Stamp] = weakref.WeakSet()


def _note_step(optimizer: Any, *_: Any) -> None:
    """Optimizers that are fused, or write through `.data`, make no new version."""
    written = {id(each) for group in optimizer.param_groups for each in group["params"]}
    for stamp in list(_stamps):
        stamp._written = stamp._written or not written.isdisjoint(stamp._ids)


register_optimizer_step_post_hook(_note_step)

_TRAINING, _VERSION = itemgetter("training"), attrgetter("_version")
_HOOKS, _PRE_HOOKS = (methodcaller("get", name) for name in ("_forward_hooks", "_forward_pre_hooks"))


def called_functions(method: Any) -> list[tuple[dict[str, Any], str]]:
    """(module's namespace, name) of the functions of its module that a method, under its decorators, names, and of those that
    these name."""
    found: dict[int, tuple[dict[str, Any], str]] = {}
    waiting = [inspect.unwrap(method)]
    while waiting:
        function = waiting.pop()
        code, namespace = getattr(function, "__code__", None), getattr(function, "__globals__", {})
        for name in code.co_names if code is not None else ():
            called = namespace.get(name)
            if isinstance(called, FunctionType) and id(called) not in found:
                found[id(called)] = (namespace, name)
                if called.__module__ == function.__module__:
                    waiting.append(called)
    return list(found.values())


def registered_attention() -> Mapping[Any, Any]:
    """Transformers' attention functions by name, where that library is loaded."""
    functions = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", {})
    return functions if isinstance(functions, Mapping) else {}


def _by_kind(model: nn.Module) -> list[Tensor]:
    """A model's weight matrices, one of each kind (gate projections, embeddings, ...), then the next of each."""
    kinds: dict[str, list[Tensor]] = {}
    for name, weight in model.named_parameters():
        if (
            weight.dim() > 1
            and weight.nbytes >= _BYTES
            and type(weight) is nn.Parameter
            and weight.is_contiguous()
            and weight.device.type != "meta"
        ):
            kinds.setdefault(re.sub(r"[0-9]+", "", name), []).append(weight)
    return [weight for turn in zip_longest(*kinds.values()) for weight in turn if weight is not None]


def _middle(matrix: Tensor) -> int:
    return matrix.data_ptr() + (matrix.nbytes - _BYTES) // 2 // matrix.element_size() * matrix.element_size()


@torch.no_grad()
def _sample(matrix: Tensor) -> Tensor:
    """The bits of eight values of a matrix on another device."""
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
