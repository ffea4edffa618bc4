"""What a cache of BAGEL's contexts is made of, while nobody reads its keys and values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from ..models.bagel.model import Image, Text

__all__ = ["Call", "Contents", "UnknownContents", "contents_of"]


class UnknownContents(Exception):
    """A cache, or a call, that the runtime cannot compute; the message says why."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call of upstream's that was not made: it appends to a cache."""

    method: Callable[..., Any]
    arguments: Mapping[str, Any]
    """Without the cache."""
    item: Text | Image | None
    """The same for the runtime; None: it has none."""
    tokens: int
    positions: int
    """Rotary positions that it takes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Call:
        return self  # nobody writes to it, and equal objects show that contexts begin alike


class Contents:
    """Calls in order, until somebody reads what they compute: then keys and values as upstream's own code computes them.

    Attributes:
        markers: ids around texts and around images, where there are some.
    """

    def __init__(self, kind: type, layers: int):
        """kind: upstream's class of caches."""
        self.calls: tuple[Call, ...] = ()
        self.markers: dict[str, tuple[int, ...]] = {}
        self._kind, self._layers = kind, layers
        self._computed: Any = None

    @property
    def length(self) -> int:
        return sum(call.tokens for call in self.calls)

    @property
    def position(self) -> int:
        """Of the next token."""
        return sum(call.positions for call in self.calls)

    @property
    def items(self) -> tuple[Text | Image, ...]:
        """Raises UnknownContents where a call has none."""
        items = tuple(call.item for call in self.calls if call.item is not None)
        if len(items) < len(self.calls):
            raise UnknownContents("the context goes on behind an answer")
        return items

    @property
    def read(self) -> bool:
        return self._computed is not None

    def append(self, call: Call) -> None:
        self.calls += (call,)

    def marks(self, kind: str, ids: tuple[int, ...]) -> None:
        """Note a call's markers. Raises UnknownContents where others came before."""
        if self.markers.setdefault(kind, ids) != ids:
            raise UnknownContents("markers of several kinds")

    @torch.no_grad()
    def computed(self) -> Any:
        """The cache as upstream's own code fills it. From now on its tensors are what counts."""
        if self._computed is None:
            cache = self._kind(self._layers)
            for call in self.calls:
                cache = call.method(past_key_values=cache, **call.arguments)
            self._computed = cache
        return self._computed

    def hold(self, cache: Any) -> None:
        """Take the place of a cache's keys and values."""
        cache.key_cache, cache.value_cache = Held(self, "key_cache"), Held(self, "value_cache")


class Held(MutableMapping[int, Any]):
    """A cache's keys or values by layer, computed when one is read or written."""

    def __init__(self, contents: Contents, name: str):
        self.contents, self._name = contents, name

    def _tensors(self) -> dict[int, Any]:
        tensors: dict[int, Any] = getattr(self.contents.computed(), self._name)
        return tensors

    def __getitem__(self, layer: int) -> Any:
        return self._tensors()[layer]

    def __setitem__(self, layer: int, value: Any) -> None:
        self._tensors()[layer] = value

    def __delitem__(self, layer: int) -> None:
        del self._tensors()[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.contents._layers) if not self.contents.read else self._tensors())

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        return Held(copy.deepcopy(self.contents, memo), self._name)


def contents_of(cache: Any) -> Contents:
    """What a cache is made of; an empty one begins here.

    Raises:
        UnknownContents: it was filled by upstream's code, or is no cache of upstream's.
    """
    keys = getattr(cache, "key_cache", None)
    if isinstance(keys, Held):
        if keys.contents.read or getattr(cache.value_cache, "contents", None) is not keys.contents:
            raise UnknownContents("the context's keys and values were read or computed by upstream's code")
        return keys.contents
    if not isinstance(keys, dict) or any(each is not None for each in (*keys.values(), *cache.value_cache.values())):
        raise UnknownContents("the context was filled before acceleration, or is none")
    contents = Contents(type(cache), len(keys))
    contents.hold(cache)
    return contents
