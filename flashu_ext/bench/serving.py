"""A server on the loopback under load: together, one by one, and what slow, vanishing and hostile clients do to others.

Two `flashu-ext serve` run, one of which takes one request at a time. Arrivals, rows and the report are those of
`flashu-ext bench arrivals`; latencies are what clients see. Nothing but the standard library speaks HTTP here.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..ops import machine
from ..planning.extras import extra
from .arrivals import PROMPTS, QUESTIONS, Report, Row, Settings

__all__ = ["TROUBLE", "WAYS", "run"]

WAYS = ("together", "one by one")
TROUBLE = ("+ slow", "+ vanishing", "+ hostile")
"""Served together, beside clients that misbehave."""

IMAGES, CHAT = "/v1/images/generations", "/v1/chat/completions"
PATIENCE = 120.0
"""Seconds for one reply."""


class _Server:
    """A server's address and how to ask it."""

    def __init__(self, host: str, port: int):
        self.host, self.port = host, port

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def served(self, path: str, body: bytes) -> bytes:
        """The body of a good reply. Raises RuntimeError for any other."""
        status, reply = self.post(path, body)
        if status != 200:
            raise RuntimeError(f"server: expected 200, got {status}: {reply[:200]!r}")
        return reply

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=PATIENCE)


@contextlib.contextmanager
def _serving(settings: Settings, at_once: int) -> Iterator[_Server]:
    command = [sys.executable, "-m", "flashu_ext.cli", "serve", "--port", "0", "--log-level", "error", "--grace", "0"]
    command += ["--model", settings.model, "--preset", settings.preset, "--at-once", str(at_once)]
    command += ["--waiting", str(settings.requests + 64), "--device", "cpu"]
    environment = dict(os.environ)
    environment.pop("FLASHU_API_KEY", None)
    if settings.threads is not None:
        environment["OMP_NUM_THREADS"] = str(settings.threads)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None, "it is a pipe"
    try:
        address = process.stdout.readline().strip().removeprefix("http://")
        if not address:
            raise RuntimeError("server: it did not start")
        host, _, port = address.rpartition(":")
        yield _Server(host, int(port))
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _bodies(settings: Settings, server: _Server) -> list[bytes]:
    """The requests of a run."""
    choose = random.Random(settings.seed)
    if settings.task == "images":
        fields: list[dict[str, object]] = [
            {"prompt": choose.choice(PROMPTS), "seed": index, "steps": settings.steps}
            for index in range(settings.requests)
        ]
    else:
        drawn = json.loads(server.served(IMAGES, json.dumps({"prompt": PROMPTS[0], "steps": 4}).encode()))
        name = json.loads(_get(server, "/v1/models"))["data"][0]["id"]
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + drawn["data"][0]["b64_json"]}}
        fields = [
            {
                "model": name,
                "max_tokens": settings.tokens,
                "messages": [{"role": "user", "content": [part, {"type": "text", "text": choose.choice(QUESTIONS)}]}],
            }
            for _ in range(settings.requests)
        ]
    return [json.dumps(each).encode() for each in fields]


def _get(server: _Server, path: str) -> bytes:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()


def run(settings: Settings, budget: float = 300.0, say: Callable[[str], None] | None = None) -> Report:
    """Measure both ways under every load, then trouble under the first load.

    Args:
        budget: seconds; runs that would begin later are left out, and said.
        say: called with what runs now.

    Raises:
        RuntimeError: a server did not start, or did not serve a good request.
    """
    tell = say or (lambda text: None)
    path = IMAGES if settings.task == "images" else CHAT
    began = time.monotonic()
    rows: list[Row] = []
    with _serving(settings, settings.at_once) as together, _serving(settings, 1) as single:
        servers = dict(zip(WAYS, (together, single), strict=True))
        bodies = _bodies(settings, together)
        for server in servers.values():
            server.served(path, bodies[0])
        alone = statistics.median(_took(single, path, each) for each in bodies[:5])
        plan = [(load, way) for load in settings.loads for way in WAYS]
        plan += [(settings.loads[0], way) for way in TROUBLE]
        for load, way in plan:
            if time.monotonic() - began > budget:
                tell(f"load {load:g}, {way}: left out, because {budget:g} s have passed")
                continue
            tell(f"load {load:g}, {way}")
            gaps = random.Random(settings.seed + 1)
            arrivals, now = [], 0.0
            for _ in bodies:
                now += gaps.expovariate(load / alone)
                arrivals.append(now)
            row, server = Row(load, way), servers.get(way, together)
            for _ in range(settings.rounds):
                with _trouble(way, server, load / alone):
                    latencies = _serve(server, path, bodies, arrivals)
                row.latencies += latencies
                row.seconds += max(a + b for a, b in zip(arrivals, latencies, strict=True)) - arrivals[0]
            rows.append(row)
    return Report(settings, alone, rows, machine.describe(), machine.command_line())


def _took(server: _Server, path: str, body: bytes) -> float:
    start = time.perf_counter()
    server.served(path, body)
    return time.perf_counter() - start


def _serve(server: _Server, path: str, bodies: Sequence[bytes], arrivals: Sequence[float]) -> list[float]:
    """Send each request when it arrives, whatever became of the others; seconds from arrival to reply of each."""
    start = time.perf_counter()

    def client(index: int) -> float:
        time.sleep(max(0.0, start + arrivals[index] - time.perf_counter()))
        server.served(path, bodies[index])
        return time.perf_counter() - start - arrivals[index]

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(client, range(len(bodies))))


# ---- trouble


@contextlib.contextmanager
def _trouble(way: str, server: _Server, rate: float) -> Iterator[None]:
    """Clients of a kind, in the background. rate: of the good requests, per second."""
    make = {"+ slow": _slow, "+ vanishing": _vanishing, "+ hostile": _hostile}.get(way)
    if make is None:
        yield
        return
    _bomb()  # made before the run, in which it would take a core
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(make, server, rate, stop)
        try:
            yield
        finally:
            stop.set()
        done.result(PATIENCE)


def _slow(server: _Server, _: float, stop: threading.Event) -> None:
    """A hundred connections that send a byte of a head, or of a body, in a second."""
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(server.connect()) for _ in range(100)]
        for index, each in enumerate(connections):
            each.sendall(head + (b"X-Slow: " if index % 2 else b"Content-Length: 1000\r\n\r\n"))
        while not stop.wait(1.0):
            for each in connections:
                with contextlib.suppress(OSError):  # ended by the server
                    each.sendall(b"a")


def _vanishing(server: _Server, rate: float, stop: threading.Event) -> None:
    """As often as good requests come, long images are asked for; each client leaves after as long as lies between two."""
    body = json.dumps({"prompt": PROMPTS[0], "steps": 200}).encode()
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    while not stop.wait(1 / rate):
        with contextlib.suppress(OSError), server.connect() as connection:
            connection.sendall(head.encode() + body)
            stop.wait(1 / rate)


@functools.cache
def _bomb() -> str:
    """A small file of a large image, in base 64."""
    with extra("serve"):
        from PIL import Image

    file = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _hostile(server: _Server, _: float, stop: threading.Event) -> None:
    """One after the other, as fast as they are refused: broken JSON, deep JSON, wrong arguments, images that are none."""
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_bomb()}"}}
    asked = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
    name = json.loads(_get(server, "/v1/models"))["data"][0]["id"]
    bodies = [
        b'{"prompt": ',
        b"[" * 100_000,
        b'{"prompt": "' + b"a" * (1 << 20) + b'"}',
        json.dumps({"prompt": "a", "n": 10**9}).encode(),
        json.dumps({"model": name, "messages": asked}).encode(),
    ]
    while not stop.is_set():
        for wrong in bodies:
            with contextlib.suppress(OSError, http.client.HTTPException):
                status = server.post(CHAT if b"messages" in wrong else IMAGES, wrong)[0]
                if not 400 <= status < 500:
                    raise RuntimeError(f"server: expected a refusal, got {status}")
