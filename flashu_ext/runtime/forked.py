"""Locks for processes that fork: a forked process has one thread, so what another thread held would stay locked for ever."""

from __future__ import annotations

import os
import threading
import weakref

__all__ = ["ForkedLock"]


class ForkedLock:
    """A re-entrant lock that is free in a forked process, unless the thread that forked holds it.

    Attributes:
        abandoned: another thread held the lock when this process was forked, so what it was about may be half done. Whoever
            has put that in order sets this to False.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.abandoned = False
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def renew(self) -> None:
        """To be called in a forked process, which has one thread."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock, self.abandoned = threading.RLock(), True


_locks: weakref.WeakSet[ForkedLock] = weakref.WeakSet()


def _renew() -> None:
    for lock in list(_locks):
        lock.renew()


os.register_at_fork(after_in_child=_renew)
