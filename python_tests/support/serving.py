"""A server in a thread of the test's process, and clients that speak HTTP by hand."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flashu_ext.server.app import Service, application
from flashu_ext.server.limits import Limits
from flashu_ext.server.run import Server, listen

LIMITS = Limits(
    at_once=4,
    waiting=3,
    body_bytes=1 << 20,
    bodies_bytes=2 << 20,
    image_bytes=1 << 17,
    image_pixels=1 << 20,
    read_seconds=1.5,
    write_seconds=1.0,
    refusal_seconds=1e-3,
    steps=2000,
)
"""Of the tests' server: small, so that each is reached soon."""

PATIENCE = 60.0
"""Seconds after which what was waited for counts as not happening; the machine may be busy."""


@dataclass
class Running:
    """A server that serves. service: its inside, to look at and to slow down."""

    host: str
    port: int
    service: Service
    server: Server

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=PATIENCE)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a reply."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
            reply = connection.getresponse()
            return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    def post(self, path: str, fields: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        """Status and object of a reply to a JSON body (or to bytes as they are)."""
        body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
        status, _, reply = self.request("POST", path, body, headers)
        return status, json.loads(reply)

    def error(self, path: str, fields: Any) -> tuple[int, str | None, str]:
        """Status, param and message of a refusal, whose form is checked."""
        status, reply = self.post(path, fields)
        error = reply["error"]
        assert set(error) == {"message", "type", "param", "code"} and 1 <= len(error["message"]) <= 500
        return status, error["param"], error["message"]

    def metric(self, line: str) -> float:
        """The value of a metric, by its name and labels."""
        text = self.request("GET", "/metrics")[2].decode()
        values = [float(each.rsplit(" ", 1)[1]) for each in text.splitlines() if each.rsplit(" ", 1)[0] == line]
        return values[0] if values else 0.0


@contextlib.contextmanager
def running(
    pipe: Any, limits: Limits, api_key: str | None = None, change: Callable[[Any], None] | None = None
) -> Iterator[Running]:
    """A server on a pipeline. change: called with the application before it runs."""
    app = application(pipe, limits, api_key)
    if change is not None:
        change(app)
    ready = threading.Event()
    with listen("127.0.0.1", 0) as listener:
        host, port = listener.getsockname()
        server = Server(app, limits, 5, "critical", ready.set)
        thread = threading.Thread(target=server.serve_on, args=(listener,), daemon=True)
        thread.start()
        assert ready.wait(PATIENCE)
        try:
            yield Running(host, port, app.state.service, server)
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


def until(holds: Callable[[], Any]) -> None:
    """Wait until something holds."""
    ends = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < ends, "it did not come to hold"
        time.sleep(0.01)


@contextlib.contextmanager
def held(worker: Any) -> Iterator[None]:
    """No step of a worker begins inside."""
    many, go = worker._many, threading.Event()
    step = many.step

    def waits() -> Any:
        go.wait(PATIENCE)
        return step()

    many.step = waits
    try:
        yield
    finally:
        go.set()
        many.step = step


def data_url(image: Any, kind: str = "PNG") -> str:
    """A PIL image as clients send it."""
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def chat(question: str, *urls: str, **more: Any) -> dict[str, Any]:
    """A body of a question about images."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": question}]
    return {"model": "nano", "messages": [{"role": "user", "content": content}], **more}
