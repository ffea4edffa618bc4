"""Attributes that one module instance has while its model is accelerated, and that its copies and pickles do not have."""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

__all__ = ["Overrides"]

_MISSING = object()


class Overrides:
    """Shadows methods of one module by instance attributes. `copy.deepcopy` and pickle get the module without them."""

    def __init__(
        self,
        module: nn.Module,
        attributes: Mapping[str, Any],
        original: Callable[[dict[str, Any], dict[int, Any]], None] = lambda state, memo: None,
    ):
        """original: edits the attributes that copies and pickles receive, a shallow copy of the module's; with deepcopy's memo,
        which is empty for pickles."""
        self._module = module
        self._original = original
        self._ours = {**attributes, "__deepcopy__": self._deepcopy, "__reduce_ex__": self._reduce}
        self._shadowed: dict[str, Any] = {}

    def install(self) -> None:
        """A second call does nothing."""
        attributes = vars(self._module)
        found = {name: attributes[name] for name, ours in self._ours.items() if attributes.get(name, ours) != ours}
        self._shadowed.update(found)
        attributes.update(self._ours)

    def remove(self) -> None:
        """What somebody else has set meanwhile stays. A second call does nothing."""
        attributes = vars(self._module)
        for name, ours in self._ours.items():
            if attributes.get(name, _MISSING) == ours:
                if name in self._shadowed:
                    attributes[name] = self._shadowed[name]
                else:
                    del attributes[name]

    def intact(self, name: str) -> bool:
        """Whether an attribute is still ours."""
        return bool(vars(self._module).get(name, _MISSING) == self._ours[name])

    def _state(self, memo: dict[int, Any]) -> dict[str, Any]:
        state = dict(vars(self._module))
        state.pop("_compiled_call_impl", None)  # as torch does: it calls this module
        for name, ours in self._ours.items():
            if state.get(name, _MISSING) == ours:
                del state[name]
        state.update(self._shadowed)
        self._original(state, memo)
        return state

    def _deepcopy(self, memo: dict[int, Any]) -> nn.Module:
        clone: nn.Module = type(self._module).__new__(type(self._module))
        memo[id(self._module)] = clone
        vars(clone).update(copy.deepcopy(self._state(memo), memo))
        return clone

    def _reduce(self, protocol: int) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self._module),), self._state({})  # type: ignore[attr-defined]
