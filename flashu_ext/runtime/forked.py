"""Locks for processes that fork: a forked process has one thread, so what another thread held would stay locked for ever."""

from __future__ import annotations

import os
import threading
import weakref

__all__ = ["ForkedLock"]


class ForkedLock:
    """A re-entrant lock that is free in a forked process, unless the thread that forked holds it.

    Attributes:
        held: for a `with` statement. It is the interpreter's own lock, because an interrupt cannot come between its being
            acquired and the block's begin, as it can in a method written in Python; the lock would stay locked.
        abandoned: another thread held the lock when this process was forked, so what it was about may be half done. Whoever
            has put that in order sets this to False.
    """

    def __init__(self) -> None:
        self.held = threading.RLock()
        self.abandoned = False
        _locks.add(self)

    def renew(self) -> None:
        """To be called in a forked process, which has one thread."""
        if self.held.acquire(blocking=False):
            self.held.release()
        else:
            self.held, self.abandoned = threading.RLock(), True


_locks: weakref.WeakSet[ForkedLock] = weakref.WeakSet()


def _renew() -> None:
    for lock in list(_locks):
        lock.renew()


os.register_at_fork(after_in_child=_renew)
