"""uvicorn's HTTP/1.1, which also ends connections whose client sends or takes too slowly."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from ..planning.extras import extra
from .limits import Limits

with extra("serve"):
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["protocol"]


class _Patient(H11Protocol):
    """A connection. Its head must come within `read_seconds`, whether it is the first or a further one; what waits to be sent
    must be taken within `write_seconds`. Bodies are watched where they are read."""

    read_seconds: ClassVar[float]
    write_seconds: ClassVar[float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._late: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def _await_head(self) -> None:
        """Begin or end the wait for a head, after something has come."""
        serving = self.cycle is not None and not self.cycle.response_complete
        if serving and self._late is not None:
            self._late.cancel()
            self._late = None
        elif not serving and self._late is None:
            self._late = self.loop.call_later(self.read_seconds, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP. A request under way ends as if its client had gone, for its reply cannot be sent any more."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # a reply has begun, or was the last
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_taken()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._taken()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._await_taken()  # closing, too, waits until the rest is taken

    def _await_taken(self) -> None:
        if self._stalled is None:
            self._stalled = self.loop.call_later(self.write_seconds, self.transport.abort)

    def _taken(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._taken()
        if self._late is not None:
            self._late.cancel()


def protocol(limits: Limits) -> type[Any]:
    """The protocol with these limits, as uvicorn's `http`."""
    times = {"read_seconds": limits.read_seconds, "write_seconds": limits.write_seconds}
    return type("Patient", (_Patient,), times)
