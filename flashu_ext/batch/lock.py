"""Keeps a second run out of a folder of images while the processes of the first one are in it."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import uuid
from pathlib import Path
from types import TracebackType

from ..planning.reading import refusal, shown
from ..planning.safe_files import try_lock

__all__ = ["LOCK", "FolderLock"]

LOCK = ".lock"
"""Name of the file in the folder that is locked. It is there while somebody is, or was until he was killed."""

_RECORD_BYTES = 1000


class FolderLock:
    """A lock on a folder, held by all ranks of one run. The operating system takes it from a process that ends, however it ends.

    Rank 0 calls `begin`, makes the folder ready and calls `share`; the others call `join` with what `begin` returned. Leaving
    the `with` block lets go; the last one deletes the file.
    """

    def __init__(self, out: str | os.PathLike[str]):
        self.out = Path(out)
        self._handle: int | None = None

    def begin(self) -> str:
        """Take the folder, which is made where it is missing, for this process alone; returns the run's name for `join`.

        Raises:
            ValueError: a run is in the folder, or what stands in the lock's place is no file. OSError: it cannot be locked.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self._take(fcntl.LOCK_EX)
        run = uuid.uuid4().hex
        record = {"run": run, "process": os.getpid(), "host": os.uname().nodename}
        assert self._handle is not None
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, json.dumps(record).encode(), 0)
        return run

    def share(self) -> None:
        """Let the run's other ranks in."""
        assert self._handle is not None, "begun"
        # The kernel may let another process in between; then that one has the folder.
        if not try_lock(self._handle, fcntl.LOCK_SH):
            raise self._taken()

    def join(self, run: str) -> None:
        """Hold the folder together with the rank that began `run`; nothing where this process did.

        Raises:
            ValueError: another run is in the folder. OSError: it cannot be locked.
        """
        if self._handle is None:
            self._take(fcntl.LOCK_SH)
        if self._record().get("run") != run:
            raise self._taken()

    def _take(self, kind: int) -> None:
        while True:
            self._handle = _open(self.out / LOCK)
            if not try_lock(self._handle, kind):
                error = self._taken()
                self._let_go()
                raise error
            if os.fstat(self._handle).st_nlink:
                return
            self._let_go()  # deleted between the two calls, by the last one of a run that ended

    def _taken(self) -> Exception:
        by = self._record()
        who = f"process {shown(by.get('process'))} on {shown(by.get('host'))}" if by else "another process"
        return refusal(
            self.out, f"another run is drawing into this folder ({who}); wait for its end, or choose another folder"
        )

    def _record(self) -> dict[str, object]:
        assert self._handle is not None
        try:
            record = json.loads(os.pread(self._handle, _RECORD_BYTES, 0))
        except ValueError:  # the other one is just writing it
            return {}
        return record if isinstance(record, dict) else {}

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            if try_lock(self._handle, fcntl.LOCK_EX) and os.fstat(self._handle).st_nlink:
                os.unlink(self.out / LOCK)
            self._let_go()

    def _let_go(self) -> None:
        assert self._handle is not None
        os.close(self._handle)
        self._handle = None


def _open(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise refusal(path, "expected a regular file, which is locked while a run is in the folder")
    return handle
