"""Runs recurring device work: captured in CUDA graphs where possible, else operator by operator.

The first run is eager and counts launches; the second (of rare work the fourth) is captured, and all later ones are replays.
The eager run also makes sure that lazily allocated memory exists before the capture.
"""

from __future__ import annotations

import functools
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar

import torch

from .counting import Counts, DispatchCounter

__all__ = ["Capture", "CudaCapture", "GraphCache", "GraphCapture"]

M = TypeVar("M")
W = TypeVar("W", bound=Hashable)


class Capture(Protocol):
    """Captures device work so that it can be replayed. One for each memory."""

    def __call__(self, work: Callable[[], Any]) -> Callable[[], None]:
        """Capture work without running it, and return its replay."""
        ...


class CudaCapture:
    """CUDA graphs that share one memory pool: replays never overlap, and results that outlive one are in the image's or
    answers' memory."""

    def __init__(self, device: torch.device):
        self._stream = _capture_stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Any]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Checks this thread's calls only: another thread, which loads data, may allocate meanwhile.
        mode = "thread_local"
        with torch.cuda.device(self._stream.device):
            before = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=mode):
                    work()
            finally:
                # A failed capture would leave its stream current.
                torch.cuda.set_stream(before)
        return graph.replay


MAX_COUNTS = 1024


@functools.cache
def _capture_stream(device: torch.device) -> Any:
    """One capture stream per device, because libraries hold memory per stream. Torch's own capture stream belongs to whichever
    device was current first."""
    return torch.cuda.Stream(device)


def counted(known: dict[Hashable, Counts], work: Hashable, run: Callable[[], Any]) -> Counts:
    """Run work operator by operator; its launches and syncs, which are counted the first time."""
    if work in known:
        run()
        return known[work]
    with DispatchCounter() as counter:
        run()
    if len(known) > MAX_COUNTS:
        known.clear()
    known[work] = counter.counts
    return counter.counts


class GraphCapture:
    """Graph capture for one accelerated model, shared by its images and answers.

    Attributes:
        make: makes a `Capture` for one memory; None: work runs operator by operator.
        why_not: why nothing is captured, known from the start.
        failure: why a capture failed; after that none is tried.
        disabled: why the model as it is now must not be captured.
        counts: launches and syncs of every work seen.
    """

    def __init__(self, device: torch.device, wanted: bool):
        """wanted: `FlashUConfig.step_graphs`."""
        self.device = device
        self.make: Callable[[], Capture] | None = None
        self.why_not: str | None = None
        self.failure: str | None = None
        self.disabled: str | None = None
        self.counts: dict[Hashable, Counts] = {}
        if not wanted:
            self.why_not = "FlashUConfig.step_graphs is False"
        elif device.type != "cuda":
            self.why_not = f"CUDA graphs need a CUDA device, the model is on {device.type}"
        else:
            self.make = functools.partial(CudaCapture, device)

    @property
    def active(self) -> bool:
        return self.make is not None and self.disabled is None

    def cache(self, memory: M) -> GraphCache[M]:
        """A cache for the work on one memory."""
        make = self.make if self.active else None
        return GraphCache(memory, make() if make else None, self.counts, self._failed)

    def run_together(self, execute: Callable[[Any, Any], None], memories: Any, works: Hashable) -> Counts:
        """Execute the work of several memories in one call, operator by operator; returns its launches and syncs."""
        return counted(self.counts, works, functools.partial(execute, memories, works))

    def _failed(self, why: str) -> None:
        self.make, self.failure = None, why


MAX_GRAPHS = 48
"""Graphs per memory; the least recently used is evicted. Skipped layers depend on the prompt, so distinct works are unbounded."""

RARE_USES = 3
"""Runs of rare work before it is captured: a capture costs as much as a few runs."""


class GraphCache(Generic[M]):
    """The captured work of one memory, keyed by its value (`work`).

    Attributes:
        captured: number of captured works.
        replayed, eager: runs so far of either kind.
    """

    def __init__(
        self,
        memory: M,
        capture: Capture | None,
        counts: dict[Hashable, Counts],
        failed: Callable[[str], None] = lambda why: None,
    ):
        """Args:
        capture: None runs everything operator by operator.
        counts: launches and syncs of every work seen, shared by all memories.
        failed: called with the reason when a capture fails.
        """
        self._memory = memory
        self._failed = failed
        self._capture = capture
        self._counts = counts
        self._uses: Counter[Hashable] = Counter()
        self._replays: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()
        self.replayed = self.eager = 0

    @property
    def captured(self) -> int:
        return len(self._replays)

    def run(self, execute: Callable[[M, W], Any], work: W) -> Counts:
        """Execute work and return its launches and syncs.

        Args:
            execute: always the same function for one type of work; must depend on nothing but the memory and the work.
        """
        replay = self._replays.get(work)
        if replay is None and self._capture is not None and self._uses[work] >= _uses_before(work):
            replay = self._captured(execute, work)
        if replay is not None:
            self._replays.move_to_end(work)
            replay()
            self.replayed += 1
        else:
            self._run_eagerly(execute, work)
            if len(self._uses) > MAX_COUNTS:
                self._uses.clear()
            self._uses[work] += 1
            self.eager += 1
        return self._counts[work]

    def _run_eagerly(self, execute: Callable[[M, W], Any], work: W) -> None:
        counted(self._counts, work, functools.partial(execute, self._memory, work))

    def _captured(self, execute: Callable[[M, W], Any], work: W) -> Callable[[], None] | None:
        assert self._capture is not None
        try:
            self._replays[work] = self._capture(functools.partial(execute, self._memory, work))
        except RuntimeError as error:
            # Work that cannot be captured still runs eagerly: a capture executes nothing, so memory is unchanged.
            self._capture = None
            self._failed(f"capturing failed: {str(error).splitlines()[0]}")
            return None
        while len(self._replays) > MAX_GRAPHS:
            self._replays.popitem(last=False)
        return self._replays[work]


def _uses_before(work: Any) -> int:
    """How often work runs eagerly before it is captured."""
    return RARE_USES if getattr(work, "rare", False) else 1
