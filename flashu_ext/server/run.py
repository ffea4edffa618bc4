"""Runs the application on uvicorn until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..planning.extras import extra
from .limits import Limits
from .protocol import protocol

with extra("serve"):
    import uvicorn
    from uvicorn.config import LOGGING_CONFIG

__all__ = ["Server", "listen"]

GIVES_WAY = 5
"""Niceness, on Linux of the calling thread and those that it starts. At 5 others have three times the share of a core."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections; port 0: any free one. Raises OSError, naming host and port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(error.errno, f"{host} port {port}: {error.strerror or error}") from error


class Server(uvicorn.Server):
    """uvicorn's server that ends quietly on SIGINT and SIGTERM: it takes no new requests, and gives those it has `grace`
    seconds. A second SIGINT ends it at once."""

    def __init__(self, app: Any, limits: Limits, grace: int, log_level: str, started: Callable[[], None]):
        """Args:
        app: an `application`.
        grace: seconds for requests to end.
        started: called when requests are served.
        """
        log = copy.deepcopy(LOGGING_CONFIG)
        log["handlers"]["access"]["stream"] = "ext://sys.stderr"
        log["loggers"]["flashu_ext.server"] = log["loggers"]["uvicorn"]
        config = uvicorn.Config(
            app,
            http=protocol(limits),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=log,
            log_level=log_level,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=limits.connections,
            h11_max_incomplete_event_size=16 << 10,
            timeout_graceful_shutdown=grace,
        )
        super().__init__(config)
        self._told = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._told()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without uvicorn's raising them again in the end, which would kill the process before it says how it ended."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def serve_on(self, listener: socket.socket) -> None:
        """Serve until told to stop. The event loop and what decodes images give way to the model's threads, where there are not
        cores enough for both."""
        os.nice(GIVES_WAY)
        asyncio.run(self.serve(sockets=[listener]))
