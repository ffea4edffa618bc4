"""What of a server takes turns: the work with its model, and replies to wrong requests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from flashu_ext.server.errors import Refusals
from flashu_ext.server.worker import Closed, ModelThread


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


def test_replies_to_many_wrong_requests_are_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("flashu_ext.server.errors.time.monotonic", lambda: now[0])
    refusals = Refusals(0.5)
    assert [refusals.delay() for _ in range(10)] == [0.0] * 10, "some mistakes are told at once"
    assert refusals.delay() == pytest.approx(Refusals.EACH)
    delays = [refusals.delay() for _ in range(200)]
    assert delays == sorted(delays) and delays[-1] == 0.5
    # One after the other, each a millisecond's work: some twenty in a second and no more.
    now[0], count = 200.0, 0
    while now[0] < 210.0:
        now[0] += 0.001 + refusals.delay()
        count += 1
    assert 150 < count < 300
    now[0] += 10
    assert refusals.delay() == 0.0, "later ones are told at once again"


def test_a_server_holds_them_back_and_serves_the_others(pipe: Any) -> None:
    from support.serving import running

    from flashu_ext.server.limits import Limits

    with running(pipe, Limits()) as server:
        server.service.refusals.delay = lambda: 2.0  # type: ignore[method-assign]
        began = time.monotonic()
        assert server.post("/v1/images/generations", {"prompt": 3})[0] == 400
        assert time.monotonic() - began >= 2.0
        server.service.refusals.delay = pytest.fail  # type: ignore[assignment]
        assert server.post("/v1/images/generations", {"prompt": "a", "steps": 2})[0] == 200
