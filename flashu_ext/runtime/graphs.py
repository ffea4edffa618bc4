"""Runs pieces of device-only work over and over: captured in CUDA graphs where that is possible, else
operator by operator.

A piece is a function without arguments that reads and writes memory at fixed addresses, with a key that holds every plain
number it depends on: equal keys, equal work. It first runs operator by operator, counted; the second time it is captured;
from then on it is replayed.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .counting import Counts, DispatchCounter

__all__ = ["Capture", "Captures", "CudaCapture", "Pieces", "Readback", "lasting"]

Work = Callable[[], Any]


class Capture(Protocol):
    """Turns a piece of work into something that can be replayed. One for each workspace."""

    def __call__(self, work: Work) -> Callable[[], None]:
        """Capture work, which does not run by that, and return its replay."""
        ...


class CudaCapture:
    """CUDA graphs that share one memory pool: replays never overlap, and what outlives one lies in the workspace."""

    def __init__(self, device: torch.device):
        self._stream = _capture_stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls count: a thread that loads data may allocate meanwhile.
        mode = "thread_local"
        with torch.cuda.device(self._stream.device):
            before = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=mode):
                    work()
            finally:
                # A capture that fails leaves torch on its stream.
                torch.cuda.set_stream(before)
        return graph.replay


@functools.cache
def _capture_stream(device: torch.device) -> Any:
    """One stream a device for all captures, for libraries keep memory for every stream. Torch's own one for captures belongs to
    whatever device was current at first."""
    return torch.cuda.Stream(device)


class Captures:
    """What captures the work of one accelerated model; its images and its answers share it.

    Attributes:
        make: makes the capture of a workspace, or None: work runs operator by operator. why_not: why nothing is captured, from
            the start. failure: why a capture failed; after that none is tried.
        counts: of every piece of work seen, what it asks of the device.
    """

    def __init__(self, model: nn.Module, device: torch.device, wanted: bool):
        """wanted: `FlashUConfig.step_graphs`."""
        self.make: Callable[[], Capture] | None = None
        self.why_not: str | None = None
        self.failure: str | None = None
        self.counts: dict[Hashable, Counts] = {}
        self._model = model
        if not wanted:
            self.why_not = "FlashUConfig.step_graphs is False"
        elif device.type != "cuda":
            self.why_not = f"CUDA graphs need a CUDA device, the model is on {device.type}"
        else:
            self.make = functools.partial(CudaCapture, device)

    def pieces(self) -> Pieces:
        """For the work of one workspace."""
        return Pieces(self.make() if self.make else None, self.counts, self._failed)

    def _failed(self, why: str) -> None:
        self.make, self.failure = None, why

    def addresses(self) -> int:
        """A number that changes where weights do not lie where they lay, as after `model.to(...)`: what was captured reads the
        old place."""
        return hash(tuple(tensor.data_ptr() for tensor in (*self._model.parameters(), *self._model.buffers())))


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Memory made inside may be written to in any mode, wherever the caller is: tensors made under `torch.inference_mode` may
    not, once it has ended."""
    with torch.inference_mode(False), torch.no_grad():
        yield


KEPT_GRAPHS = 48
"""Graphs of one workspace; the least recently used make room. Which layers are skipped depends on prompts, so there is no end
to the kinds of work."""

KEPT_COUNTS = 1024

RARE_USES = 3
"""A capture costs as much as a few runs."""


class Pieces:
    """The pieces of work of one workspace.

    Attributes:
        captured: pieces that are replayed.
        replayed, eager: runs so far of either kind.
    """

    def __init__(
        self,
        capture: Capture | None,
        counts: dict[Hashable, Counts],
        failed: Callable[[str], None] = lambda why: None,
    ):
        """capture: None runs everything operator by operator. counts: of every key, shared by all workspaces. failed: told
        why, where a capture fails."""
        self._failed = failed
        self._capture = capture
        self._counts = counts
        self._uses: Counter[Hashable] = Counter()
        self._replays: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()
        self.replayed = self.eager = 0

    @property
    def captured(self) -> int:
        return len(self._replays)

    def run(self, key: Hashable, work: Work, rare: bool = False) -> Counts:
        """Run a piece and return what it asks of the device. A rare one is captured only once it has come back often."""
        replay = self._replays.get(key)
        if replay is None and self._capture is not None and self._uses[key] >= (RARE_USES if rare else 1):
            replay = self._captured(key, work)
        if replay is not None:
            self._replays.move_to_end(key)
            replay()
            self.replayed += 1
        else:
            self._run_eagerly(key, work)
            if len(self._uses) > KEPT_COUNTS:
                self._uses.clear()
            self._uses[key] += 1
            self.eager += 1
        return self._counts[key]

    def _run_eagerly(self, key: Hashable, work: Work) -> None:
        if key in self._counts:
            work()
            return
        with DispatchCounter() as counter:
            work()
        if len(self._counts) > KEPT_COUNTS:
            self._counts.clear()
        self._counts[key] = counter.counts

    def _captured(self, key: Hashable, work: Work) -> Callable[[], None] | None:
        assert self._capture is not None
        try:
            self._replays[key] = self._capture(work)
        except RuntimeError as error:
            # What cannot be captured still runs. Capturing has run nothing, so the images' memory is as it was.
            self._capture = None
            self._failed(f"capturing failed: {str(error).splitlines()[0]}")
            return None
        while len(self._replays) > KEPT_GRAPHS:
            self._replays.popitem(last=False)
        return self._replays[key]


class Readback:
    """A few numbers on their way from the device to the host, which waits only when it needs them.

    The copy is queued behind the work that makes the numbers; whatever is launched between `post` and `wait` keeps the device
    busy while the host waits.
    """

    def __init__(self) -> None:
        self.waits = 0
        self._values: Tensor | None = None
        self._event: Any = None

    def post(self, values: Tensor) -> None:
        """Send values, of any shape, contiguous, exact in fp64. They may be overwritten on the device from here on."""
        if values.device.type != "cuda":
            self._values, self._event = values.clone(), None
            return
        if self._values is None or self._values.shape != values.shape:
            with lasting():
                self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._event = torch.cuda.Event()
        self._values.copy_(values, non_blocking=True)
        self._event.record(torch.cuda.current_stream(values.device))

    def wait(self) -> list[float]:
        """The numbers sent last, flat."""
        assert self._values is not None, "`post` comes first"
        self.waits += 1
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values.numpy().ravel()]
