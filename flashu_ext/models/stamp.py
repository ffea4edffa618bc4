"""Notices that a model changed: its modules, hooks and weights, in one pass of a fraction of a millisecond.

Values written through `.data`, or through another view of a weight's memory, change no version. A few bytes in the middle of
every weight show such a write where it reached all of it, as a merged adapter's or a synchronised model's does. What is
not noticed: such writes to parts of a weight, or on a GPU to vectors, and values of inference tensors.
"""

from __future__ import annotations

import inspect
import re
import sys
import weakref
from collections.abc import Mapping
from ctypes import c_char
from operator import attrgetter, itemgetter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import register_optimizer_step_post_hook

from .int8 import inner_tensors
from .lora import is_lora, lora_state

__all__ = ["COMPUTED", "GLOBAL_HOOKS", "Stamp", "Turns", "called_functions", "registered_attention", "tracked"]

_TRACKED = ("torch.nn.modules.", "transformers.", "flashu_ext.models.", "diffusers.models.", "timm.layers.")
_TRACKED_UPSTREAM = (
    *("models.qwen2", "models.modules", "models.modeling_siglip", "models.modeling_showo2_qwen2_5"),
    *(f"modeling.bagel.{name}" for name in ("bagel", "qwen2_navit", "siglip_navit", "modeling_utils")),
    "modeling.qwen2.modeling_qwen2",
    *(f"janus.janusflow.models.{name}" for name in ("modeling_vlm", "uvit", "clip_encoder", "siglip_vit")),
)
"""Where classes are defined whose results depend on nothing but weights, attributes and inputs."""

_BYTES = 16
"""Of every weight on the CPU that each call compares."""

_VALUES = 8
"""Of a matrix on another device. A call compares one matrix of every kind there, the next call the next layer's."""

COMPUTED = ("linear", "silu")
"""Functions of torch.nn.functional that kernels compute instead."""

_LIBRARY = [
    (owner, itemgetter(*[name for name, value in vars(owner).items() if callable(value)]))
    for owner in (nn.functional, nn.Module)
]
"""What modules compute with and are called by; another library may replace any of it. Not all of a namespace: warnings add
entries."""

GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class Stamp:
    """The state of a model when this was made.

    Attributes:
        unversioned: some weights are inference tensors, whose changes cannot be noticed.
    """

    def __init__(self, model: nn.Module):
        self._modules = list(model.modules())
        self._attributes = list(map(vars, self._modules))
        pairs = zip(self._modules, self._attributes, strict=True)
        contents: list[Any] = [
            each
            for module in self._modules
            for each in (module._modules, module._parameters, module._buffers)
            if isinstance(each, dict)  # a compiled module's are not
        ]
        self._usual = [own for own in self._attributes if "training" in own]  # not torch.compile's wrapper
        self._hooks = self._read_hooks()
        hooks: list[Any] = [each for *pair, _ in self._hooks for each in pair]
        hooks += [getattr(torch_module, name) for name in GLOBAL_HOOKS]
        self._filled: list[dict[Any, Any]] = [each for each in (*contents, *hooks) if each]
        self._copies = list(map(dict, self._filled))
        self._empty = [each for each in (*contents, *hooks) if not each]
        named = [(own, name, each) for own in self._filled for name, each in own.items() if isinstance(each, Tensor)]
        self._composed = [each for *_, each in named if type(each) is not nn.Parameter and inner_tensors(each)]
        self._single = [(own, name) for own, name, each in named if each.numel() < 2]
        kinds: set[Any] = set(map(type, self._modules))
        self._classes = [
            kind for kind in kinds if not issubclass(kind, torch.jit.ScriptModule)
        ]  # those have no methods
        methods = [kind.forward for kind in self._classes]
        methods += [each for each in vars(type(model)).values() if isinstance(each, FunctionType)]
        self._called = [each for method in methods for each in called_functions(method)]
        self._configured = [own for own in self._attributes if "config" in own]
        self._configs = list({id(own["config"]): own["config"] for own in self._configured}.values())
        self._adapted = [module for module in self._modules if is_lora(module)]
        self._settings = [(own.get, _settings(own)) for module, own in pairs if tracked(module)]
        self._flags = self._read_flags()
        inner = [part for each in self._composed for part in inner_tensors(each)]
        distinct = list({id(each): each for each in (*(each for *_, each in named), *inner)}.values())
        self._versioned = [tensor for tensor in distinct if not tensor.is_inference()]
        self._addressed = [tensor for tensor in distinct if _has_address(tensor)]
        self.unversioned = len(self._versioned) < len(distinct)
        self._versions, self._addresses = self._read_weights()
        near, far = _sampled(model)
        near += [each for each in inner if each.device.type == "cpu" and each.nbytes >= _BYTES and each.is_contiguous()]
        self._middles = [(c_char * _BYTES).from_address(_middle(matrix)) for matrix in near]
        self._values = self._read_values()
        self._turns = Turns(far)
        self._written = False
        self._ids = set(map(id, distinct))
        _stamps.add(self)

    def structure_changed(self) -> bool:
        """Whether a module, a parameter object, a hook, a class, a flag or a method is another one."""
        return (
            any(self._empty)
            or not _same(self._filled, self._copies)
            or self._read_hooks() != self._hooks
            or self._read_flags() != self._flags
        )

    def weights_changed(self) -> bool:
        """Whether a weight was written to, or lies elsewhere."""
        return self._written or self._read_weights() != (self._versions, self._addresses)

    def values_changed(self) -> bool:
        """Whether a sample shows that weights have other values. They must not have moved (`weights_changed`)."""
        return self._read_values() != self._values or self._turns.changed()

    def _read_values(self) -> list[bytes]:
        return list(map(_RAW, self._middles))

    def moved(self) -> bool:
        """Whether a weight lies elsewhere, as after `model.to(...)`."""
        return self._read_weights()[1] != self._addresses

    def _read_hooks(self) -> list[tuple[Any, ...]]:
        """Both dicts, which may be replaced by others, and the mode, of every module."""
        return list(map(_HOOKS_AND_MODE, self._usual))

    def _read_flags(self) -> tuple[Any, ...]:
        return (
            # A new attribute may be a method that replaces the class's own.
            list(map(len, self._attributes)),
            list(map(type, self._modules)),
            [(kind.forward, kind.__call__) for kind in self._classes],
            [list(vars(kind).values()) for kind in self._classes],
            [namespace.get(name) for namespace, name in self._called],
            [functions(vars(owner)) for owner, functions in _LIBRARY],
            [registered_attention().get(name) for name in ("sdpa", "eager")],
            [list(map(read, names)) for read, names in self._settings],
            [id(own.get(name)) for own, name in self._single],
            [id(own.get("config")) for own in self._configured],
            [dict(vars(config)) for config in self._configs],
            list(map(lora_state, self._adapted)),
            [id(part) for each in self._composed for part in inner_tensors(each)],
        )

    def _read_weights(self) -> tuple[list[int], list[int]]:
        return list(map(_VERSION, self._versioned)), list(map(Tensor.data_ptr, self._addressed))


_stamps: weakref.WeakSet[Stamp] = weakref.WeakSet()


def _note_step(optimizer: Any, *_: Any) -> None:
    """Optimizers that are fused, or write through `.data`, make no new version."""
    stamps = list(_stamps)
    written = {id(each) for group in optimizer.param_groups for each in group["params"]} if stamps else set()
    for stamp in stamps:
        stamp._written = stamp._written or not written.isdisjoint(stamp._ids)


register_optimizer_step_post_hook(_note_step)

_VERSION, _RAW = attrgetter("_version"), attrgetter("raw")
_HOOKS_AND_MODE = itemgetter("_forward_hooks", "_forward_pre_hooks", "training")


def tracked(module: Any) -> bool:
    """Whether a module's results depend on nothing but weights, attributes and inputs."""
    home = type(module).__module__
    plain = is_lora(module) and not getattr(module, "lora_variant", {})
    return plain or home.startswith(_TRACKED) or home.endswith(_TRACKED_UPSTREAM)


def _settings(attributes: Mapping[str, Any]) -> list[str]:
    """Names of a module's plain attributes: numbers, texts and functions, which its results may depend on."""
    plain = (bool, int, float, str, tuple, torch.dtype, type(None))
    return [
        name
        for name, value in attributes.items()
        if not name.startswith("_") and name != "training" and (isinstance(value, plain) or callable(value))
    ]


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


def _sampled(model: nn.Module) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The weights whose values are sampled: those on the CPU, and other matrices by kind (gate projections, embeddings, ...)."""
    near: list[Tensor] = []
    far: dict[str, list[Tensor]] = {}
    for name, weight in model.named_parameters():
        plain = type(weight) is nn.Parameter and weight.nbytes >= _BYTES and weight.is_contiguous()
        if plain and weight.device.type == "cpu":
            near.append(weight)
        elif plain and weight.dim() > 1 and weight.device.type != "meta":
            far.setdefault(re.sub(r"[0-9]+", "", name), []).append(weight)
    return near, list(far.values())


def _middle(matrix: Tensor) -> int:
    """The address of a matrix's `_BYTES` in the middle."""
    return matrix.data_ptr() + (matrix.nbytes - _BYTES) // 2 // matrix.element_size() * matrix.element_size()


class Turns:
    """Compares values of matrices with those at the beginning, of one matrix of each kind at a time, because each costs a
    launch."""

    def __init__(self, kinds: list[list[Tensor]]):
        self._kinds = kinds
        self._turn = 0
        self._before = [[_bits(matrix) for matrix in kind] for kind in kinds]

    def changed(self) -> bool:
        if not self._kinds:
            return False
        self._turn += 1
        now = torch.cat([_bits(kind[self._turn % len(kind)]) for kind in self._kinds])
        return not torch.equal(now, torch.cat([kind[self._turn % len(kind)] for kind in self._before]))


@torch.no_grad()
def _bits(matrix: Tensor) -> Tensor:
    """The bits of a few values, evenly spaced."""
    count = min(_VALUES, matrix.numel())
    step = max(1, matrix.numel() // count)
    return matrix.detach().as_strided((count,), (step,), matrix.storage_offset()).clone().view(torch.uint8)


def _same(a: list[dict[Any, Any]], b: list[dict[Any, Any]]) -> bool:
    """Whether dicts hold the same objects. They compare by identity first, which is fast; tensors of several elements that are
    not identical have no truth value."""
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
