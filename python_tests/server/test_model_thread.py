"""The thread of a server's model: what it serves, in which turn, and what it must not share cores with."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from flashu_ext.server.worker import Closed, ModelThread, in_passing_thread


class Counted:
    """Requests of a number of steps each; `log` receives the kind and the thread of every step."""

    def __init__(self, kind: str, log: list[tuple[str, int]]):
        self.at_once = 4
        self._kind, self._log = kind, log
        self._left: dict[int, int] = {}
        self._count = 0

    @property
    def in_progress(self) -> Sequence[int]:
        return tuple(self._left)

    def add(self, steps: int) -> int:
        index, self._count = self._count, self._count + 1
        self._left[index] = steps
        return index

    def cancel(self, index: int) -> None:
        self._left.pop(index, None)

    def step(self) -> list[Any]:
        self._log.append((self._kind, threading.get_ident()))
        time.sleep(0.001)
        self._left = {index: left - 1 for index, left in self._left.items()}
        ended = [index for index, left in self._left.items() if left == 0]
        for index in ended:
            del self._left[index]
        return [SimpleNamespace(index=index, error=None) for index in ended]

    def close(self) -> None:
        self._left.clear()


def test_one_thread_serves_all_by_turns() -> None:
    log: list[tuple[str, int]] = []
    thread = ModelThread()
    images, answers = (thread.worker(Counted(kind, log), 8) for kind in ("image", "answer"))

    async def both() -> None:
        await asyncio.gather(images.results([40]), answers.results([40]))

    asyncio.run(both())
    thread.close()
    assert len({ident for _, ident in log}) == 1 and threading.get_ident() not in dict(log).values()
    kinds = [kind for kind, _ in log]
    assert kinds.count("image") == kinds.count("answer") == 40
    # Both have come after a few steps of the first; from then on neither waits for more than one step of the other.
    first = max(kinds.index("image"), kinds.index("answer"))
    last = min(len(kinds) - kinds[::-1].index(kind) for kind in ("image", "answer"))
    assert last - first > 40, kinds
    assert all(a != b for a, b in zip(kinds[first : last - 1], kinds[first + 1 : last], strict=True)), kinds


def test_a_closed_thread_ends_what_it_has_and_takes_nothing() -> None:
    thread = ModelThread()
    worker = thread.worker(Counted("image", []), 8)
    ((_, future),) = worker.ask([10**9])
    thread.close()
    assert isinstance(future.exception(5), Closed) and not thread.alive and not worker.busy
    with pytest.raises(Closed):
        worker.ask([1])


def test_a_passing_thread_ends_and_gives_what_came_of_it() -> None:
    before = threading.active_count()
    assert in_passing_thread(threading.get_ident) != threading.get_ident()

    def fails() -> None:
        raise KeyError("from there")

    with pytest.raises(KeyError, match="from there"):
        in_passing_thread(fails)
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
