"""Holds an FFN's weights in plan order, and gives everybody else the model's own order: whoever saves, loads, copies or pickles
them, and whoever edits them inside `handle.editing()`."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor, nn

from ..planning.neurons import NeuronLayout, ffn_weights
from .forked import ForkedLock
from .mapped import read_only_ranges
from .memory import outside_inference_mode
from .overrides import Overrides

__all__ = ["EditedWeightsError", "FfnOrder", "check_not_planned", "why_not_moved"]

PROBES = 64
"""Values of a weight that tell whether its memory was moved or its values were replaced."""


class EditedWeightsError(RuntimeError):
    """Weights were written to in plan order, outside `handle.editing()`."""


class _Weight:
    """The weight of one projection: dimension `dim` is the neurons'."""

    def __init__(self, linear: nn.Linear, dim: int, layout: NeuronLayout, lock: ForkedLock):
        """lock: held while neurons are moved, so that no other thread saves, loads or copies them half-way."""
        self.linear = linear
        self.dim = dim
        self._layout = layout
        self._lock = lock
        self.parameter: Tensor = linear.weight
        self._planned = False
        self._copies: list[tuple[weakref.ref[Tensor], Tensor]] = []
        self.overrides = Overrides(
            linear,
            {"_save_to_state_dict": self._save, "_load_from_state_dict": self._load},
            original=self._copied,
        )
        self.accept(False)

    def accept(self, planned: bool) -> None:
        """Take the weight's values, in the order named, as the ones to hold."""
        weight = self.parameter
        self._planned = planned
        self._copies = []
        self._version, self._address, self._probe = _version(weight), weight.data_ptr(), _probe(weight)

    def edited(self) -> bool:
        """Whether somebody else has replaced the values since `accept`. A move, as by `model.to(...)`, is no edit."""
        weight = self.linear.weight
        if weight is not self.parameter or _version(weight) != self._version or self.copies_written():
            return True
        if weight.data_ptr() == self._address:
            return not torch.allclose(_probe(weight), self._probe, rtol=0, atol=0, equal_nan=True)
        probe = _probe(weight)
        same = probe.shape == self._probe.shape and torch.allclose(
            probe, self._probe, rtol=2**-7, atol=1e-6, equal_nan=True
        )
        if same:
            self._address, self._probe = weight.data_ptr(), probe
        return not same

    def copies_written(self) -> bool:
        """Whether somebody wrote to a copy that `state_dict()` gave, which would be a write to the weight in a dense model."""
        return any(watched._version for _, watched in self._copies)

    def _watch(self, copied: Tensor) -> None:
        if copied.is_inference():
            return
        watched = copied.detach()
        watched.data = copied.new_empty(0)  # it has the copy's version still, but not its memory
        alive = [pair for pair in self._copies if pair[0]() is not None or pair[1]._version]
        self._copies = [*alive, (weakref.ref(copied), watched)]

    def reordered(self, values: Tensor, planned: bool) -> Tensor:
        """A copy of values of the weight's shape, from the other order."""
        order = self._layout.permutation if planned else self._layout.inverse
        return values.detach().index_select(self.dim, order.to(values.device).long())

    # ---- methods of the projection, while it is accelerated

    def _save(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with self._lock.held:
            type(self.linear)._save_to_state_dict(self.linear, destination, prefix, keep_vars)
            if self._planned:
                self._check_unedited()
                for name in self._names():
                    destination[f"{prefix}{name}"] = copied = self.reordered(self.parameter, planned=False)
                    self._watch(copied)

    def _load(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        fits = False

        def to_plan_order(state: dict[str, Any], *_: Any) -> None:
            nonlocal fits
            given = state.get(f"{prefix}weight")
            fits = isinstance(given, Tensor) and given.shape == self.linear.weight.shape
            # Values that lie in the weight's own memory are in its order already.
            if self._planned and fits and isinstance(given, Tensor) and _span(given) != _span(self.linear.weight):
                state[f"{prefix}weight"] = self.reordered(given, planned=True)

        with self._lock.held:
            hooks = self.linear._load_state_dict_pre_hooks
            hooks[id(self)] = to_plan_order  # the last one: hooks of others get the model's own order
            try:
                type(self.linear)._load_from_state_dict(self.linear, dict(state_dict), prefix, *rest)
            finally:
                del hooks[id(self)]
            if fits:
                self.parameter = self.linear.weight
                self.accept(self._planned)

    def _copied(self, state: dict[str, Any], memo: dict[int, Any]) -> None:
        with self._lock.held:
            if self._planned:
                self._check_unedited()
                own = self._own_copy(memo)
                _keep_for_started_process(own)
                state["_parameters"] = {**state["_parameters"], **dict.fromkeys(self._names(), own)}

    def _check_unedited(self) -> None:
        if self.edited():
            raise EditedWeightsError(
                "model: FFN weights were written to, pruned or parametrized while their neurons lie in plan order, so they "
                "cannot be saved or copied; do so inside `with handle.editing():`, or after handle.remove()"
            )

    def _own_copy(self, memo: dict[int, Any]) -> nn.Parameter:
        """The parameter's copy in the model's own order, entered in deepcopy's memo: what else holds the parameter, such as an
        optimizer, gets the same one."""
        weight = self.parameter
        values = self.reordered(weight, planned=False)
        own = memo.get(id(weight))
        if own is None:
            own = nn.Parameter(values, weight.requires_grad)
        own.data = values
        if weight.grad is not None:
            own.grad = self.reordered(weight.grad, planned=False)
        memo[id(weight)] = memo[id(own)] = own
        return own

    def _names(self) -> list[str]:
        """The parameter's names in its projection: others than 'weight' where a mask or norm was put before it."""
        return [name for name, parameter in self.linear._parameters.items() if parameter is self.parameter]


def _keep_for_started_process(copied: Tensor) -> None:
    """A process that is being started, with the model as an argument, gets a tensor's memory as an open file, which closes
    when the tensor dies: the copy lives as long as what started the process."""
    starter = get_spawning_popen()
    if starter is not None:
        vars(starter).setdefault("_flashu_copies", []).append(copied)


class FfnOrder:
    """The order of one FFN's neurons in memory.

    Attributes:
        layout: the plan's.
        planned: the neurons lie in plan order.
    """

    def __init__(self, ffn: Any, layout: NeuronLayout, lock: ForkedLock):
        self.ffn = ffn
        self.layout = layout
        self.planned = False
        self._weights = tuple(
            _Weight(linear, dim, layout, lock)
            for linear, dim in ((ffn.gate_proj, 0), (ffn.up_proj, 0), (ffn.down_proj, 1))
        )
        self._process = os.getpid()
        self._pending: tuple[list[tuple[Tensor, Tensor]], bool] | None = None

    def holds(self, ffn: Any) -> bool:
        """Whether this is about the FFN with the projections that it has now."""
        now = (ffn.gate_proj, ffn.up_proj, ffn.down_proj)
        return ffn is self.ffn and all(
            weight.linear is linear for weight, linear in zip(self._weights, now, strict=True)
        )

    def edited(self) -> bool:
        """Whether somebody else wrote to weights that lie in plan order."""
        return self.planned and self._pending is None and any(weight.edited() for weight in self._weights)

    def copies_written(self) -> bool:
        """See `_Weight.copies_written`."""
        return any(weight.copies_written() for weight in self._weights)

    def guard(self) -> None:
        """From here on another thread that saves, loads or copies a projection waits for the lock, and finds it whole."""
        for weight in self._weights:
            weight.overrides.install()

    def arrange(self, planned: bool) -> None:
        """Bring the weights, and their gradients, into plan order or into the model's own. Once interrupted, at whatever line,
        another call completes it. All copies are made before the first write, so running out of memory changes nothing."""
        with outside_inference_mode():
            self._complete()
            if planned != self.planned and self._process != os.getpid() and self._in_shared_memory():
                raise RuntimeError(
                    "model: its FFN weights lie in memory shared with the process that accelerated it; remove the handle there"
                )
            if planned and not self.planned:
                self.guard()
                for weight in self._weights:
                    weight.parameter = weight.linear.weight
            if planned != self.planned:
                self._pending = ([pair for weight in self._weights for pair in _moves(weight, planned)], planned)
                self._complete()
            if not planned:
                for weight in self._weights:
                    weight.overrides.remove()

    def _in_shared_memory(self) -> bool:
        held = [weight.parameter for weight in self._weights]
        return any(weight.device.type == "cpu" and weight.is_shared() for weight in held)

    def _complete(self) -> None:
        if self._pending is not None:
            moves, planned = self._pending
            # Writing the same values again is harmless.
            for tensor, values in moves:
                tensor.copy_(values)
            for weight in self._weights:
                weight.accept(planned)
            self.planned = planned
            (_planned.add if planned else _planned.discard)(self)
            self._pending = None

    def spans(self) -> list[tuple[int, int]]:
        return [_span(weight.parameter) for weight in self._weights]


_planned: weakref.WeakSet[FfnOrder] = weakref.WeakSet()
"""Of all models: what lies in plan order now. Another model in the same memory would take it for its own."""


def _moves(weight: _Weight, planned: bool) -> list[tuple[Tensor, Tensor]]:
    """(tensor, its values in the order asked for) of a weight and its gradient."""
    held = weight.parameter
    tensors = [held] if held.grad is None else [held, held.grad]
    return [(tensor, weight.reordered(tensor, planned)) for tensor in tensors]


def _version(weight: Tensor) -> int | None:
    return None if weight.is_inference() else weight._version


def _probe(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, flat.shape[0] - 1, min(PROBES, flat.shape[0]), dtype=torch.float64, device=flat.device)
    return flat[places.long()].float().cpu()


# ---- which weights may be moved


def why_not_moved(ffns: Sequence[Any]) -> list[str | None]:
    """For each FFN why its neurons must stay where they are, or None. Nothing is changed."""
    shared = _shared([ffn_weights(ffn) for ffn in ffns])
    read_only = read_only_ranges()
    return [_why_not(ffn_weights(ffn), read_only) or reason for ffn, reason in zip(ffns, shared, strict=True)]


def _why_not(weights: Iterable[Tensor], read_only: Sequence[tuple[int, int]]) -> str | None:
    for weight in weights:
        if weight.is_inference():
            return "its weights are inference tensors"
        if weight.grad is not None:
            return "its weights have gradients"
        if weight.device.type == "cpu" and weight.is_shared():
            return "its weights are in memory shared between processes"
        if weight.device.type == "meta":
            return "its weights are on meta"
        start, end = _span(weight)
        if weight.device.type == "cpu" and any(low < end and start < high for low, high in read_only):
            return "its weights are in memory that cannot be written to"
    return None


def check_not_planned(ffns: Sequence[Any], own: Sequence[FfnOrder]) -> None:
    """Raise RuntimeError where another accelerated model keeps the memory of these FFNs in its plan's order.

    Args:
        own: orders of the model that asks.
    """
    taken = [span for order in list(_planned) if order not in own for span in order.spans()]
    for ffn in ffns:
        for start, end in map(_span, ffn_weights(ffn)):
            if any(low < end and start < high for low, high in taken):
                raise RuntimeError(
                    "model: its FFN weights lie in the memory of another model that is accelerated with a plan, in that plan's "
                    "order; remove that handle first, or load weights of its own"
                )


def _shared(groups: Sequence[tuple[Tensor, ...]]) -> list[str | None]:
    """For each group of weights whether another live tensor (of this model, another one, or a kept state_dict) lies in the same
    memory and would see its neurons move."""
    spans = sorted((*_span(weight), group) for group, weights in enumerate(groups) for weight in weights)
    found: list[str | None] = [None] * len(groups)
    storages = Counter(_storage(weight) for weights in groups for weight in weights)
    for group, weights in enumerate(groups):
        if any(storages[_storage(weight)] > 1 for weight in weights):
            found[group] = "its weights are views of one tensor"  # which have one version together
    for (_, end, group), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            found[group] = found[other] = "its weights are shared within the model"
    if not spans:
        return found
    own = {id(weight) for weights in groups for weight in weights}
    first, last = spans[0][0], max(end for _, end, _ in spans)
    for each in gc.get_objects():
        if issubclass(type(each), Tensor) and id(each) not in own:
            start, end = _span(each)
            if start < last and first < end:
                for low, high, group in spans:
                    if start < high and low < end:
                        found[group] = "its weights share memory with another tensor"
    return found


def _storage(tensor: Tensor) -> int:
    """Identifies the memory that a weight is a part of."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last address of a tensor's values; (0, 0) where it has none."""
    try:
        start = tensor.data_ptr()
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return (start, start + (reach + 1) * tensor.element_size()) if tensor.numel() else (0, 0)
    except (RuntimeError, NotImplementedError, AttributeError):
        return 0, 0
