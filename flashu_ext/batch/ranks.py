"""Ranks of a parallel run: their numbers, the items of each, and a heartbeat that detects dead ranks.

Data parallelism needs no collective: `shard` distributes a list, and `Heartbeat` tracks through a store which ranks have ended.
"""

from __future__ import annotations

import datetime
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch

from ..planning.reading import printable

__all__ = ["Heartbeat", "Ranks", "shard"]

T = TypeVar("T")

JOIN_SECONDS = 120.0
"""Timeout for ranks to meet at the start."""
PATIENCE_SECONDS = 30.0
"""Silence after which a rank counts as gone. Heartbeats need only the GIL, which long torch calls release."""
BEAT_SECONDS = 0.5
LEAVE_SECONDS = 5.0
"""How long the last beat may hang on a store that does not answer."""


# ---- ranks


@dataclass(frozen=True)
class Ranks:
    """This process's rank among those of a run.

    Attributes:
        rank: its number, from 0.
        world: the number of ranks.
        local_rank: its number on this machine.
        attempt: how often the launcher has restarted the ranks.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    attempt: int = 0

    def __post_init__(self) -> None:
        for name, low in (("rank", 0), ("world", 1), ("local_rank", 0), ("attempt", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
        if self.rank >= self.world:
            raise ValueError(f"rank: expected a number in [0, {self.world}), got {self.rank}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Ranks:
        """From RANK, WORLD_SIZE and LOCAL_RANK, as set by torchrun or accelerate; one process if they are not set.

        Without LOCAL_RANK all ranks are assumed to be on one machine.

        Raises:
            ValueError: only some variables are set, or one is not a number in its range; the message names it.
        """
        environment = os.environ if environment is None else environment
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            return cls()

        def number(name: str, default: str | None = None) -> int:
            text = environment.get(name, default)
            if text is None:
                raise ValueError(f"{name}: expected a number in the environment beside RANK or WORLD_SIZE, got none")
            if not text.isascii() or not text.isdecimal():
                raise ValueError(f"{name}: expected a number in the environment, got {text!r:.40}")
            return int(text)

        rank, world = number("RANK"), number("WORLD_SIZE")
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if world > 1 and not environment.get(name):
                raise ValueError(f"{name}: expected it in the environment where WORLD_SIZE is above 1, got none")
        return cls(rank, world, number("LOCAL_RANK", str(rank)), number("TORCHELASTIC_RESTART_COUNT", "0"))

    def device(self) -> torch.device:
        """The GPU with this rank's local number; the CPU if torch sees no GPU.

        Raises:
            ValueError: there are fewer GPUs than ranks on this machine.
        """
        if not torch.cuda.is_available():
            return torch.device("cpu")
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise ValueError(
                f"LOCAL_RANK: expected a number in [0, {count}), one rank for each GPU, got {self.local_rank}"
            )
        return torch.device("cuda", self.local_rank)


def shard(items: Sequence[T], rank: int, world: int) -> list[T]:
    """The items of one rank: every world-th, starting at `rank`. Each item belongs to exactly one rank.

    Raises:
        ValueError: rank is not in [0, world).
    """
    Ranks(rank, world)
    return list(items[rank::world])


class Heartbeat:
    """Tracks which ranks are alive through a store (torch.distributed's key-value server), without collectives.

    A thread of every rank increments a counter in the store. A rank whose counter stands still for `patience` seconds counts
    as gone; a failing rank reports its error. An exception in the `with` block waits for the other ranks before it leaves,
    because launchers kill all ranks when the first one exits.
    """

    def __init__(
        self,
        ranks: Ranks,
        store: Any = None,
        patience: float = PATIENCE_SECONDS,
        stop: Callable[[], bool] = lambda: False,
    ):
        """
        Args:
            store: shared by all ranks, hosted by rank 0 or the launcher; None for one process.
            patience: seconds of silence after which a rank counts as gone.
            stop: True ends waiting for another rank.
        """
        if not isinstance(patience, (int, float)) or not patience > BEAT_SECONDS:
            raise ValueError(f"patience: expected more than {BEAT_SECONDS} seconds, got {patience!r}")
        if ranks.world > 1 and store is None:
            raise ValueError(f"store: expected one for {ranks.world} ranks, got None")
        self.ranks = ranks
        self.store = store
        self.patience = patience
        self.stop = stop
        self.lost: dict[int, str] = {}
        self._ended = self._store_gone = False
        self._others = [rank for rank in range(ranks.world) if rank != ranks.rank]
        now = time.monotonic()
        self._heard = dict.fromkeys(self._others, (0, now))
        self._quit = threading.Event()
        self._thread: threading.Thread | None = None
        if self._others:
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()

    @classmethod
    def join(
        cls,
        ranks: Ranks,
        patience: float = PATIENCE_SECONDS,
        timeout: float = JOIN_SECONDS,
        stop: Callable[[], bool] = lambda: False,
    ) -> Heartbeat:
        """Meet the other ranks at MASTER_ADDR:MASTER_PORT; uses the launcher's store if it has one.

        Raises:
            RuntimeError: not all ranks met within `timeout` seconds, or `stop` ended the waiting.
        """
        if ranks.world == 1:
            return cls(ranks, None, patience, stop)
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        def meet() -> Any:
            return next(rendezvous("env://", ranks.rank, ranks.world, timeout=datetime.timedelta(seconds=timeout)))

        try:
            store, _, _ = wait_for(meet, timeout, stop)
        except InterruptedError as error:
            raise RuntimeError(f"rank {ranks.rank}: stopped before all {ranks.world} ranks met") from error
        except (RuntimeError, OSError) as error:
            raise RuntimeError(
                f"rank {ranks.rank}: not all {ranks.world} ranks met within {timeout:g} s: {first_line(error)}"
            ) from error
        # A launcher's store outlives restarts and still has the keys of the dead ranks.
        return cls(ranks, dist.PrefixStore(f"attempt {ranks.attempt}", store), patience, stop)

    # ---- while working

    def share(self, name: str, make: Callable[[], T]) -> T:
        """Broadcast the result of rank 0's `make` as JSON to all ranks; only rank 0 calls it.

        Raises:
            On rank 0 any error of `make`; on the others ValueError with its text.
            RuntimeError: rank 0 is gone, or `stop` ended the waiting.
        """
        if not self._others:
            return make()
        if self.ranks.rank == 0:
            try:
                value = make()
            except Exception as error:
                self._set(f"share/{name}", json.dumps({"error": str(error)}))
                raise
            self._set(f"share/{name}", json.dumps({"value": value}))
            return value
        while not self._has(f"share/{name}"):
            why = self._why_gone(0)
            if why is not None:
                raise RuntimeError(f"rank 0 {why}, before it said what to generate")
            if self.stop():
                raise RuntimeError(f"rank {self.ranks.rank}: stopped before rank 0 said what to generate")
            time.sleep(0.02)
        answer = json.loads(self.store.get(f"share/{name}"))
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["value"]

    # ---- the end

    def finish(self, failure: str = "") -> dict[int, str]:
        """Report that this rank has ended, then wait until every other one has ended or is gone.

        Args:
            failure: this rank's error; empty: none.

        Returns:
            rank -> reason, for the other ranks that failed or are gone; also in `lost`.
        """
        if not self._others or self._ended:
            return self.lost
        self._set(f"end/{self.ranks.rank}", failure)
        self._ended = True
        waiting = set(self._others)
        while waiting and not self.stop():
            for rank in sorted(waiting):
                if self._has(f"end/{rank}"):
                    said = self._get(f"end/{rank}")
                    if said:
                        self.lost[rank] = f"failed: {said}"
                    waiting.discard(rank)
                else:
                    why = self._why_gone(rank)
                    if why is not None:
                        self.lost[rank] = why
                        waiting.discard(rank)
            time.sleep(0.02 if waiting else 0)
        self._set(f"left/{self.ranks.rank}", "")
        if self.ranks.rank == 0:
            self._host_until_others_left()
        self.leave()
        return self.lost

    def leave(self) -> None:
        """Stop the heartbeat without waiting for other ranks."""
        self._quit.set()
        if self._thread is not None:
            self._thread.join(LEAVE_SECONDS)

    @property
    def reporter(self) -> bool:
        """Whether this rank reports for all: the lowest that is not lost."""
        return all(rank in self.lost for rank in range(self.ranks.rank))

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self.finish(first_line(error) or type(error).__name__)
        self.leave()

    # ---- the store, which disappears with the rank that hosts it

    def _beat(self) -> None:
        try:
            # A separate connection: calls that block on the other one must not delay the heartbeat.
            store = self.store.clone() if hasattr(self.store, "clone") else self.store
            while not self._quit.is_set():
                store.add(f"beat/{self.ranks.rank}", 1)
                for rank in self._others:
                    beats = int(store.add(f"beat/{rank}", 0))
                    if beats != self._heard[rank][0]:
                        self._heard[rank] = (beats, time.monotonic())
                self._quit.wait(BEAT_SECONDS)
        except (RuntimeError, OSError):
            self._store_gone = True

    def _why_gone(self, rank: int) -> str | None:
        if self._store_gone:
            return "is gone, or out of reach: the store of the ranks does not answer"
        silent = time.monotonic() - self._heard[rank][1]
        return f"is gone: not heard of for {silent:.0f} s" if silent > self.patience else None

    def _host_until_others_left(self) -> None:
        """The store ends with the rank that hosts it, so that rank leaves last."""
        until = time.monotonic() + self.patience
        left = [rank for rank in self._others if self.lost.get(rank, "failed").startswith("failed")]
        while left and time.monotonic() < until and not self.stop() and not self._store_gone:
            left = [rank for rank in left if not self._has(f"left/{rank}")]
            time.sleep(0.02)

    def _set(self, key: str, value: str) -> None:
        self._ask(lambda: self.store.set(key, value), None)

    def _has(self, key: str) -> bool:
        return bool(self._ask(lambda: self.store.check([key]), False))

    def _get(self, key: str) -> str:
        return bytes(self._ask(lambda: self.store.get(key), b"")).decode("utf-8", "replace")

    def _ask(self, call: Callable[[], Any], otherwise: Any) -> Any:
        if not self._store_gone:
            try:
                return call()
            except (RuntimeError, OSError):
                self._store_gone = True
        return otherwise


def first_line(error: BaseException) -> str:
    return printable((str(error).strip().splitlines() or [""])[0], 300)


def wait_for(call: Callable[[], T], seconds: float, stop: Callable[[], bool] = lambda: False) -> T:
    """What a call returns that is long in native code, where Python cannot handle a signal, such as one that waits for a rank.

    It runs in a thread, which is left alone where it is not waited for to its end.

    Raises:
        Whatever the call raised. TimeoutError: it took longer. InterruptedError: `stop` said to end. KeyboardInterrupt.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="wait", daemon=True).start()
    until = time.monotonic() + seconds
    while not wait([outcome], timeout=0.05).done:
        if stop():
            raise InterruptedError("stopped")
        if time.monotonic() > until:
            raise TimeoutError("they do not answer")
    return outcome.result()
