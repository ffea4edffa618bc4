"""Memory that images and answers run in: acquired for one of them, released, and kept for the next where that pays."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from .graphs import GraphCache, GraphCapture

__all__ = ["Lease", "MemoryPool", "outside_inference_mode"]


class Memory(Protocol):
    def nbytes(self) -> dict[str, int]:
        """Bytes by purpose."""
        ...


M = TypeVar("M", bound=Memory)


@dataclass(eq=False)
class Lease(Generic[M]):
    """Memory in use, with the work captured on it.

    Attributes:
        weights: `GraphCapture.addresses` when it was made. done: the end of its last user's work, on a GPU.
    """

    memory: M
    graphs: GraphCache[M]
    weights: int
    done: Any = None


class MemoryPool(Generic[M]):
    """The memory of one task of one accelerated model.

    Where work is captured, released memory is kept with its graphs for what fits it next. Else it is dropped: there is
    nothing to save by keeping it.
    """

    def __init__(self, capture: GraphCapture, idle: int):
        """idle: how many to keep; the least recently released make room."""
        self.capture = capture
        self._most_idle = idle
        self._weights = 0
        self._idle: list[Lease[M]] = []
        self._leased: list[Lease[M]] = []

    @property
    def fixed(self) -> bool:
        """Whether memory is kept, at fixed addresses."""
        return self.capture.make is not None

    def acquire(self, fits: Callable[[M], bool], make: Callable[[], M]) -> Lease[M]:
        """Idle memory that fits, or new memory. The caller's until `release`."""
        if self.fixed and (weights := self.capture.addresses()) != self._weights:
            self._weights = weights
            self._idle.clear()
        lease = next((lease for lease in self._idle if fits(lease.memory)), None)
        if lease is not None:
            self._idle.remove(lease)
            self.join(lease)
        else:
            with outside_inference_mode():
                memory = make()
            lease = Lease(memory, self.capture.cache(memory), self._weights)
        self._leased.append(lease)
        return lease

    def release(self, lease: Lease[M]) -> None:
        """The user is done. The next one may run on another stream; it waits for this one's work."""
        if not self.leased(lease):
            return
        self._leased.remove(lease)
        if self.fixed and lease.weights == self._weights:
            self.mark(lease)
            self._idle = [*self._idle, lease][-self._most_idle :]

    def mark(self, lease: Lease[M]) -> None:
        """What the current stream was given so far is work on this memory."""
        if self.capture.device.type == "cuda":
            lease.done = torch.cuda.current_stream(self.capture.device).record_event()

    def join(self, lease: Lease[M]) -> None:
        """Have the current stream wait for the work that was marked."""
        if lease.done is not None:
            torch.cuda.current_stream(self.capture.device).wait_event(lease.done)

    def leased(self, lease: Lease[M]) -> bool:
        """Whether memory is still its user's: not after `clear`."""
        return lease in self._leased

    def check(self, lease: Lease[M], doing: str) -> None:
        """Raises RuntimeError where the memory is no longer its user's. doing: what is under way, for the message."""
        if not self.leased(lease):
            raise RuntimeError(f"model: its handle was removed or reset while {doing}")

    def moved(self) -> bool:
        """Whether the weights no longer lie where captured work reads them."""
        return self.fixed and self.capture.addresses() != self._weights

    def clear(self) -> None:
        """Drop what is idle, and forget what is leased: its users find out at their next step."""
        self._idle.clear()
        self._leased.clear()

    def nbytes(self) -> Counter[str]:
        """Bytes of all memory, idle or leased, by purpose."""
        total: Counter[str] = Counter()
        for lease in (*self._idle, *self._leased):
            total.update(lease.memory.nbytes())
        return total

    def graphs(self) -> list[GraphCache[M]]:
        """Of all memory, idle or leased."""
        return [lease.graphs for lease in (*self._idle, *self._leased)]


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Memory made inside may be written to in any mode: tensors made under `torch.inference_mode` may not, once it has ended."""
    with torch.inference_mode(False), torch.no_grad():
        yield
