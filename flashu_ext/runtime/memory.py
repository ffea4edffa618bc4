"""A pool of device memory for images and answers: acquired, released, and reused together with its captured graphs."""

from __future__ import annotations

import contextlib
import weakref
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
    """Memory in use, with the work captured on it."""

    memory: M
    graphs: GraphCache[M]
    done: Any = None
    """CUDA event: the end of the last user's work."""


class MemoryPool(Generic[M]):
    """The memory of one task of one accelerated model.

    With graph capture, released memory is pooled with its graphs. Without, it is freed: there are no graphs to save.
    """

    def __init__(self, capture: GraphCapture, idle: int):
        """idle: how many released memories to pool; the least recently released is freed first."""
        self.capture = capture
        self._most_idle = idle
        self._idle: list[Lease[M]] = []
        # What its user has forgotten without an end, such as a loop that was left by `break`, is nobody's.
        self._leased: weakref.WeakSet[Lease[M]] = weakref.WeakSet()

    @property
    def fixed(self) -> bool:
        """Whether work is captured, so that memory is pooled and stays at fixed addresses."""
        return self.capture.active

    def acquire(self, fits: Callable[[M], bool], make: Callable[[], M]) -> Lease[M]:
        """Idle memory that fits, or new memory, leased until `release`."""
        lease = next((lease for lease in self._idle if fits(lease.memory)), None)
        if lease is not None:
            self._idle.remove(lease)
            self.join(lease)
        else:
            with outside_inference_mode():
                memory = make()
            lease = Lease(memory, self.capture.cache(memory))
        self._leased.add(lease)
        return lease

    def release(self, lease: Lease[M]) -> None:
        """End a lease. The next user may run on another stream, and waits there for this one's work."""
        if not self.leased(lease):
            return
        self._leased.discard(lease)
        if self.fixed:
            self.mark(lease)
            self._idle = [*self._idle, lease][-self._most_idle :]

    def mark(self, lease: Lease[M]) -> None:
        """Record that everything queued on the current stream so far may use this memory."""
        if self.capture.device.type == "cuda":
            lease.done = torch.cuda.current_stream(self.capture.device).record_event()

    def join(self, lease: Lease[M]) -> None:
        """Make the current stream wait for the work recorded by `mark`."""
        if lease.done is not None:
            torch.cuda.current_stream(self.capture.device).wait_event(lease.done)

    def leased(self, lease: Lease[M]) -> bool:
        """Whether a lease is still valid; `clear` ends all of them."""
        return lease in self._leased

    def check(self, lease: Lease[M], doing: str) -> None:
        """Raise RuntimeError where the lease has ended. doing: what its user does, for the message."""
        if not self.leased(lease):
            raise RuntimeError(f"model: its handle was removed or reset while {doing}")

    def clear(self) -> None:
        """Free idle memory and end all leases; `check` raises at their users' next step."""
        self._idle.clear()
        self._leased.clear()

    def nbytes(self) -> Counter[str]:
        """Bytes of all memory, idle or leased, by purpose."""
        total: Counter[str] = Counter()
        for lease in (*self._idle, *self._leased):
            total.update(lease.memory.nbytes())
        return total

    def graphs(self) -> list[GraphCache[M]]:
        """The graph caches of all memory, idle or leased."""
        return [lease.graphs for lease in (*self._idle, *self._leased)]


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Allocate ordinary tensors inside: inference tensors could not be written to once `torch.inference_mode` has ended."""
    with torch.inference_mode(False), torch.no_grad():
        yield
