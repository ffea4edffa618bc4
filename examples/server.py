"""An HTTP server that generates images and answers questions about them, from one accelerated model (standard library only).

asyncio reads and writes. One thread draws and one answers: images of all clients share evaluations, and answers steps, whenever
they were asked for; the model's lock lets the two threads take turns, a step at a time. Every client gets what it would get
alone, bit for bit on a CPU.

    POST /generate  {"prompt": "...", "seed": 0}                 -> a PNG
    POST /answer    {"image": "<base64>", "question": "..."}     -> {"answer": "..."}

A wrong request is answered by 400 and {"error": "..."}.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from PIL import Image

import flashu_ext as fx

EXAMPLE = """example:
  python examples/server.py --port 8000 &
  curl -s localhost:8000/generate -d '{"prompt": "a red circle above a blue square", "seed": 1}' -o out.png
  echo "{\\"question\\": \\"what color is the circle ?\\", \\"image\\": \\"$(base64 -w0 out.png)\\"}" > ask.json
  curl -s localhost:8000/answer -d @ask.json
"""

MAX_BODY = 8 << 20
"""Bytes of a request."""
MAX_PIXELS = 1 << 24
"""Of an image that is sent; a small PNG may hold a huge one."""
PATIENCE = 30.0
"""Seconds for a client to send its request."""

Reply = tuple[int, str, bytes]
"""Status, content type, body."""


class Worker:
    """A thread that serves requests together as they come."""

    def __init__(self, many: Any):
        """many: `generate_many` or `answer_many` of a pipeline."""
        self._many = many
        self._waiting: dict[int, Future[Any]] = {}
        self._changed = threading.Condition()
        threading.Thread(target=self._serve, daemon=True).start()

    async def result(self, request: dict[str, Any]) -> Any:
        """The result of a request. One whose client has left is given up."""
        with self._changed:
            index = self._many.add(request)
            future = self._waiting[index] = Future()
            self._changed.notify()
        try:
            result = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._many.cancel(index)
            raise
        if result.error is not None:
            raise result.error
        return result

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._many.in_progress)
            ended = self._many.step()
            with self._changed:
                for result in ended:
                    future = self._waiting.pop(result.index)
                    if not future.cancelled():
                        future.set_result(result)
                for index in [index for index, future in self._waiting.items() if future.cancelled()]:
                    del self._waiting[index]


class Service:
    """What the server does."""

    def __init__(self, pipe: fx.showo2.Pipeline, at_once: int):
        self.drawing, self.answering = (
            Worker(pipe.generate_many(at_once=at_once)),
            Worker(pipe.answer_many(at_once=at_once)),
        )
        self.routes: dict[str, tuple[Callable[[dict[str, Any]], Awaitable[Reply]], tuple[str, ...]]] = {
            "/generate": (self.generate, ("prompt", "seed")),
            "/answer": (self.answer, ("image", "question")),
        }

    async def reply(self, path: str, body: bytes) -> Reply:
        if path not in self.routes:
            return _json(404, error=f"expected POST to one of {', '.join(self.routes)}, got {path[:100]!r}")
        try:
            try:
                fields = json.loads(body)
            except ValueError as error:
                raise ValueError(f"body: expected a JSON object, got none: {error}") from error
            if not isinstance(fields, dict):
                raise TypeError(f"body: expected a JSON object, got {type(fields).__name__}")
            run, names = self.routes[path]
            unknown = [name for name in fields if name not in names]
            if unknown:
                raise ValueError(f"{unknown[0][:100]!r}: unknown field; expected {', '.join(names)}")
            return await run(fields)
        except KeyError as error:
            return _json(400, error=f"body: {error} is missing")
        except (ValueError, TypeError, OSError, RecursionError) as error:
            return _json(400, error=str(error)[:500])
        except RuntimeError as error:
            return _json(500, error=str(error)[:500])

    async def generate(self, fields: dict[str, Any]) -> Reply:
        result = await self.drawing.result({"prompt": fields["prompt"], "seed": fields.get("seed", 0)})
        png = io.BytesIO()
        result.image.save(png, "PNG")
        return 200, "image/png", png.getvalue()

    async def answer(self, fields: dict[str, Any]) -> Reply:
        image, question = await asyncio.to_thread(_image, fields["image"]), fields["question"]
        result = await self.answering.result({"images": image, "question": question})
        return _json(200, answer=result.answer)


def _image(text: Any) -> Image.Image:
    """The whole image in the field `image`. Raises ValueError or TypeError, which names it."""
    if not isinstance(text, str):
        raise TypeError(f"image: expected a string of base64, got {type(text).__name__}")
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"image: expected base64, got {text[:20]!r}: {error}") from error
    try:
        image = Image.open(io.BytesIO(content))
        width, height = image.size
        if width * height <= MAX_PIXELS:
            image.load()
            return image
    except Exception as error:  # damaged files end in errors of all kinds, also of zlib and struct
        raise ValueError(f"image: not a whole image: {error}") from error
    raise ValueError(f"image: expected at most {MAX_PIXELS} pixels, got {width} x {height}")


def _json(status: int, **fields: str) -> Reply:
    return status, "application/json", json.dumps(fields).encode()


async def read_request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """Path and body. Raises ValueError where it is no request of ours."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, _, rest = head[0].partition(" ")
    if method != "POST":
        raise ValueError(f"expected POST, got {method[:20]!r}")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    length = headers.get("content-length", "")
    if not length.isascii() or not length.isdigit() or len(length) > 12 or int(length) > MAX_BODY:
        raise ValueError(f"Content-Length: expected a number up to {MAX_BODY}, got {length[:20]!r}")
    if headers.get("expect", "").lower() == "100-continue":
        raise ValueError("Expect: not supported; curl sends it with bodies over 1 MiB, turn it off by -H 'Expect:'")
    return rest.split(" ")[0], await reader.readexactly(int(length))


async def serve(pipe: fx.showo2.Pipeline, host: str, port: int, at_once: int) -> asyncio.Server:
    """Start serving on an accelerated (or dense) pipeline; the caller closes the server."""
    service = Service(pipe, at_once)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            try:
                path, body = await asyncio.wait_for(read_request(reader), PATIENCE)
            except (ValueError, asyncio.LimitOverrunError) as error:
                reply = _json(400, error=str(error))
            else:
                reply = await service.reply(path, body)
            status, kind, content = reply
            head = f"HTTP/1.1 {status} -\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + content)
            await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has left
        finally:
            writer.close()

    return await asyncio.start_server(connected, host, port)


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano", help="'nano', or a folder with a Show-o2 checkpoint")
    parser.add_argument("--preset", default="exact", choices=("exact", "paper", "fast"))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--at-once", type=int, default=8, help="images, and answers, under way together")
    options = parser.parse_args()
    pipe = fx.showo2.Pipeline.from_pretrained(options.model)
    with pipe.accelerate(*pipe.preset(options.preset)):
        server = await serve(pipe, options.host, options.port, options.at_once)
        host, port = server.sockets[0].getsockname()[:2]
        print(f"http://{host}:{port}", flush=True)
        async with server:
            await server.serve_forever()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        pass
