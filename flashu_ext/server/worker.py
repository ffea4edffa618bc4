"""A thread that serves images and answers together as they come, for callers of one event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

__all__ = ["Busy", "Closed", "ModelThread", "Worker"]

LOG = logging.getLogger("flashu_ext.server")


class Busy(Exception):
    """As many requests wait as may. retry_after: seconds after which there may be room."""

    def __init__(self, retry_after: int):
        super().__init__(f"as many requests wait as may; try again in {retry_after} s")
        self.retry_after = retry_after


class Closed(Exception):
    """The worker was closed before the request ended."""


class ModelThread:
    """The thread of all work with a model: a step of each of its workers in turn.

    There is one, because OpenMP keeps a team of threads for every thread that starts parallel work. With more of them than
    cores GNU's sleep at each barrier, and a small model takes twice as long.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.closed = False
        self._workers: list[Worker] = []
        self._thread = threading.Thread(target=self._serve, name="model", daemon=True)
        self._thread.start()

    def worker(self, many: Any, waiting: int) -> Worker:
        """A worker of this thread.

        Args:
            many: `generate_many` or `answer_many` of a pipeline.
            waiting: requests that may wait besides those that are under way.
        """
        with self.changed:
            self._workers.append(Worker(self, many, waiting))
            return self._workers[-1]

    @property
    def alive(self) -> bool:
        """Whether it serves."""
        return self._thread.is_alive() and not self.closed

    def close(self, seconds: float = 60.0) -> None:
        """Give up all requests, and wait for the step under way. They end by `Closed`."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self._thread.join(seconds)

    def _serve(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or any(each.busy for each in self._workers))
                if self.closed:
                    break
                busy = [each for each in self._workers if each.busy]
            for each in busy:
                each.step()
        for each in self._workers:
            each.end()


class Worker:
    """Serves what `Many` serves; see `ModelThread.worker`.

    Attributes:
        failures: steps that raised, which ended every request under way.
    """

    def __init__(self, thread: ModelThread, many: Any, waiting: int):
        self.failures = 0
        self._thread, self._changed = thread, thread.changed
        self._many = many
        self._most = many.at_once + waiting
        self._asked: dict[int, Future[Any]] = {}
        self._typical = 1.0  # seconds of a request, from asking to the result

    @property
    def busy(self) -> bool:
        """Whether there is work."""
        return bool(self._asked or self._many.in_progress)

    @property
    def asked(self) -> int:
        """Requests that have not ended."""
        return len(self._asked)

    @property
    def under_way(self) -> int:
        """Those of them that have begun."""
        return len(self._many.in_progress)

    def check_room(self, count: int = 1) -> None:
        """That as many requests can be added now. Raises Busy or Closed."""
        if self._thread.closed:
            raise Closed("the server is stopping")
        if len(self._asked) + count > self._most:
            rounds = math.ceil(len(self._asked) / self._many.at_once)
            raise Busy(min(60, max(1, math.ceil(self._typical * rounds))))

    def ask(self, requests: Sequence[Any]) -> list[tuple[int, Future[Any]]]:
        """Add requests, all or none; index and future of each.

        Raises:
            Busy: there is no room. Closed: it serves no more.
        """
        with self._changed:
            self.check_room(len(requests))
            added: list[tuple[int, Future[Any]]] = []
            for request in requests:
                index = self._many.add(request)
                added.append((index, Future()))
            self._asked.update(added)
            self._changed.notify()
        return added

    async def results(self, requests: Sequence[Any]) -> list[Any]:
        """The results of requests. They are given up where this is cancelled, or where one of them fails.

        Raises:
            Busy, Closed: as `ask`. What a request's result has as its error.
        """
        added, began = self.ask(requests), time.monotonic()
        try:
            results = []
            for _, future in added:
                result = await asyncio.wrap_future(future)
                if result.error is not None:
                    raise result.error
                results.append(result)
        except BaseException:
            self.give_up(added)
            raise
        self._typical += 0.2 * (time.monotonic() - began - self._typical)
        return results

    def give_up(self, added: Sequence[tuple[int, Future[Any]]]) -> None:
        """Cancel requests that have not ended."""
        for index, future in added:
            if future.cancel() or not future.done():
                self._many.cancel(index)
        with self._changed:
            self._changed.notify()

    def step(self) -> None:
        """Advance what is under way; of the model's thread."""
        try:
            self._end({result.index: result for result in self._many.step()})
        except Exception as error:  # the step has given up all requests; the next ones are served
            LOG.exception("a step failed")
            self.failures += 1
            self._end_all(RuntimeError(f"a step failed: {error}"))

    def end(self) -> None:
        """Give up all requests; of the model's thread, which serves no more."""
        self._many.close()
        self._end_all(Closed("the server is stopping"))

    def _end(self, results: dict[int, Any]) -> None:
        with self._changed:
            for index, future in list(self._asked.items()):
                if index in results or future.cancelled():
                    del self._asked[index]
                    if future.set_running_or_notify_cancel():
                        future.set_result(results[index])

    def _end_all(self, error: Exception) -> None:
        with self._changed:
            for index, future in self._asked.items():
                self._many.cancel(index)  # one that was added after the failure
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            self._asked.clear()
