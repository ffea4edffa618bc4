"""The application: OpenAI's images and chat on one pipeline, for any ASGI server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ..models.accelerated import handle_of
from ..models.lora import adapter_names
from ..models.pipeline import ModelPipeline
from ..models.prompts import Parts
from ..planning.extras import extra
from ..planning.reading import shown
from .arguments import ChatArguments, ImageArguments, chat_arguments, image_arguments, read_object
from .bodies import Bodies, Gone
from .errors import ApiError, Refusals, invalid
from .gate import GONE, Gate, check_key
from .limits import Limits
from .metrics import CONTENT_TYPE, Metrics
from .worker import Busy, Closed, ModelThread

with extra("serve"):
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse, StreamingResponse
    from starlette.exceptions import HTTPException

__all__ = ["Service", "application"]

T = TypeVar("T")
LOG = logging.getLogger("flashu_ext.server")

_NAMED = re.compile(r"([a-z_]+)(?:\[[0-9]+\])?: ")
_PARAMS = {"max_new_tokens": "max_tokens", "question": "messages", "images": "messages", "adapter": "model"}
"""Names of the pipeline's arguments that a client knows by another one."""


class Service:
    """What the routes need; one for each application.

    Attributes:
        pipe: the pipeline, accelerated or dense.
        name: of the model with what is active in it, for clients.
        thread: of all work with the model.
        drawing, answering: its workers.
    """

    def __init__(self, pipe: Any, limits: Limits):
        if not isinstance(pipe, ModelPipeline):
            raise TypeError(f"pipe: expected a pipeline of flashu_ext, got {type(pipe).__name__}")
        self.pipe, self.limits = pipe, limits
        self.name = Path(pipe.name).name or "model"
        self.bodies = Bodies(limits)
        self.refusals = Refusals(limits.refusal_seconds)
        self.thread = ModelThread()
        self.drawing = self.thread.worker(pipe.generate_many(at_once=limits.at_once), limits.waiting)
        self.answering = self.thread.worker(pipe.answer_many(at_once=limits.at_once), limits.waiting)
        self.metrics = Metrics({"image": self.drawing, "answer": self.answering})
        self._threads = ThreadPoolExecutor(2, "images")  # no more than these are decoded or encoded at a time

    @property
    def models(self) -> list[str]:
        """The model's name, and the LoRA adapters that it has, which an accelerated one draws and answers with where a request
        names them."""
        adapters = adapter_names(self.pipe.model) if handle_of(self.pipe.model) is not None else []
        return list(dict.fromkeys((self.name, *adapters)))

    def adapter(self, model: str) -> str | None:
        """The adapter that a name of `models` stands for, or None."""
        return None if model == self.name else model

    async def in_thread(self, run: Callable[[], T]) -> T:
        """Run what would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, run)

    def close(self) -> None:
        """Give up all requests and end the threads."""
        self.thread.close()
        self._threads.shutdown(cancel_futures=True)

    # ---- images

    async def images(self, request: Request) -> Response:
        """POST /v1/images/generations."""
        self.drawing.check_room()  # before its body is read and looked at
        async with self.bodies.read(request) as body:
            ends = self._ends()
            asked = await self._while_there(request, self.in_thread(lambda: self._image_arguments(body)), ends)
        pngs = await self._while_there(request, self._drawn(asked), ends, "image", asked.n)
        self.metrics.images.inc(asked.n)
        return JSONResponse(
            {
                "created": int(time.time()),
                "data": [{"b64_json": png} for png in pngs],
                "output_format": "png",
            }
        )

    def _image_arguments(self, body: bytes) -> ImageArguments:
        asked = image_arguments(read_object(body), self.models, self.limits)
        with _arguments():
            room = self.pipe.text_room(asked.size)
        tokens = 0 if room is None else len(self.pipe.layout.encode(asked.prompt))
        if room is not None and tokens > room:  # the pipeline would cut it
            raise invalid("prompt", f"expected at most {room} tokens, got {tokens}", "string_above_max_length")
        return asked

    async def _drawn(self, asked: ImageArguments) -> list[str]:
        fields = {
            "prompt": asked.prompt,
            "size": asked.size,
            "steps": asked.steps,
            "guidance_scale": asked.guidance_scale,
            "adapter": self.adapter(asked.model),
        }
        requests = [{**fields, "seed": asked.seed + index} for index in range(asked.n)]
        with _arguments():
            results = await self.drawing.results(requests)
        return await self.in_thread(lambda: [_png(result.image) for result in results])

    # ---- chat

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self.answering.check_room()
        async with self.bodies.read(request) as body:
            ends = self._ends()
            asked = await self._while_there(request, self.in_thread(lambda: self._chat_arguments(body)), ends)
        answer = _Answer(self, asked, ends)
        if asked.stream:
            first = await self._while_there(request, answer.first(), ends, "answer")  # errors until here have a status
            return _Stream(answer.events(first), answer)
        text = await self._while_there(request, answer.whole(), ends, "answer")
        self.metrics.tokens.inc(len(answer.parts.tokens))
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.reason}
        return JSONResponse(answer.head("chat.completion") | {"choices": [choice], "usage": answer.usage()})

    def _chat_arguments(self, body: bytes) -> ChatArguments:
        asked = chat_arguments(read_object(body), self.models, self.limits)
        with _arguments():
            for index, picture in enumerate(asked.pictures):  # here, so that a request that waits holds little
                asked.pictures[index] = self.pipe.question_image(picture, f"images[{index}]")
        return asked

    # ---- waiting

    def _ends(self) -> float:
        """When a request whose body has come has taken too long, by `time.monotonic`."""
        return time.monotonic() + self.limits.request_seconds

    async def _while_there(
        self, request: Request, work: Coroutine[Any, Any, T], ends: float, kind: str | None = None, count: int = 1
    ) -> T:
        """The result of work, which is given up where its client goes away or time runs out. kind: what it counts as then.

        Raises:
            Gone. ApiError: 504 in the second case.
        """
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
        try:
            left = max(0.0, ends - time.monotonic())
            await asyncio.wait((task, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise Gone
            raise self.late()
        finally:
            if kind is not None and not task.done():
                self.metrics.given_up.labels(kind).inc(count)
            for each in (task, gone):
                each.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    def late(self) -> ApiError:
        """The error of a request that took too long."""
        return ApiError(504, f"expected a result within {self.limits.request_seconds:g} s, got none", code="timeout")


class _Answer:
    """A question of one client.

    Attributes:
        reason: why it ended: 'stop' or 'length'; None before.
    """

    def __init__(self, service: Service, asked: ChatArguments, ends: float):
        self.parts, self.asked = Parts(service.pipe.layout), asked
        self.reason: str | None = None
        self._service, self._loop = service, asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str] = asyncio.Queue()
        self._task: asyncio.Task[str] | None = None
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}
        self._ends = ends

    def head(self, kind: str) -> dict[str, Any]:
        """What all objects of this answer have."""
        return self._head | {"object": kind}

    def usage(self) -> dict[str, int]:
        """Tokens of the question's text, and of the answer with the token that ends it."""
        asked = len(self._service.pipe.layout.encode(self.asked.question))
        answer = len(self.parts.tokens)
        return {"prompt_tokens": asked, "completion_tokens": answer, "total_tokens": asked + answer}

    async def whole(self) -> str:
        """The answer's text."""
        asked = self.asked
        request = {
            "images": asked.pictures,
            "question": asked.question,
            "max_new_tokens": asked.max_tokens,
            "temperature": asked.temperature,
            "top_k": asked.top_k,
            "top_p": asked.top_p,
            "seed": asked.seed,
            "adapter": self._service.adapter(asked.model),
            "on_token": self._on_token,
        }
        with _arguments():
            (result,) = await self._service.answering.results([request])
        ended = self.parts.tokens[-1:] == [self._service.pipe.layout.eos]
        self.reason = "stop" if ended else "length"
        return str(result.answer)

    def _on_token(self, token: int) -> None:
        """Called by the answering thread."""
        part = self.parts.add(token)
        if part and self.asked.stream:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, part)

    async def first(self) -> str | None:
        """Begin, and wait for the first part; None where the answer ended before one came."""
        self._task = asyncio.ensure_future(self.whole())
        try:
            return await self._next()
        except BaseException:
            self.cancel()
            raise

    async def _next(self) -> str | None:
        """The next part; None after the last."""
        assert self._task is not None, "first() was called"
        if not self._pieces.empty():
            return self._pieces.get_nowait()
        piece = asyncio.ensure_future(self._pieces.get())
        try:
            await asyncio.wait((piece, self._task), return_when=asyncio.FIRST_COMPLETED)
            if piece.done():
                return piece.result()
        finally:
            piece.cancel()
        if not self._pieces.empty():
            return self._pieces.get_nowait()
        self._task.result()  # raises what went wrong
        return None

    async def events(self, piece: str | None) -> AsyncIterator[str]:
        """The chunks of a stream, after its first part."""
        assert self._task is not None, "first() was called"
        yield self._event({"role": "assistant", "content": ""})
        try:
            given = 0
            while piece is not None:
                given += len(piece)
                yield self._event({"content": piece})
                async with asyncio.timeout(self._ends - time.monotonic()):
                    piece = await self._next()
            if rest := self._task.result()[given:]:
                yield self._event({"content": rest})
        except Exception as error:  # the status is sent; the client is told in the stream
            told = self._service.late() if isinstance(error, TimeoutError) else _error_of(error)
            if told.status == 500:
                LOG.error("an answer failed", exc_info=error)
            yield f"data: {json.dumps(told.body())}\n\n"
            return
        self._service.metrics.tokens.inc(len(self.parts.tokens))
        yield self._event({}, self.reason)
        if self.asked.include_usage:
            end = self.head("chat.completion.chunk") | {"choices": [], "usage": self.usage()}
            yield f"data: {json.dumps(end)}\n\n"
        yield "data: [DONE]\n\n"

    def _event(self, delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = self.head("chat.completion.chunk") | {"choices": [choice]}
        if self.asked.include_usage:
            chunk["usage"] = None
        return f"data: {json.dumps(chunk)}\n\n"

    def cancel(self) -> bool:
        """Give up what has not ended; whether there was any."""
        return self._task is not None and self._task.cancel()


class _Stream(StreamingResponse):
    """A stream whose answer is given up where it breaks off."""

    def __init__(self, events: AsyncIterator[str], answer: _Answer):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._answer.cancel():
                self._answer._service.metrics.given_up.labels("answer").inc()


async def _gone(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _png(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


# ---- errors


@contextlib.contextmanager
def _arguments() -> Iterator[None]:
    """Around what refuses arguments: the client is told which."""
    try:
        yield
    except (ValueError, TypeError) as error:
        match = _NAMED.match(str(error))
        name = None if match is None else _PARAMS.get(match[1], match[1])
        raise ApiError(400, str(error), name, "invalid_value") from error


def _error_of(error: Exception) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="rate_limit_exceeded", retry_after=error.retry_after)
    if isinstance(error, Closed):
        return ApiError(503, str(error), code="stopping")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    return ApiError(500, f"the request failed: {type(error).__name__}", code="internal_error")


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, Gone):
        return Response(status_code=GONE)
    told = _error_of(error)
    if told.status in (400, 404, 405, 413, 415):  # the client's mistake
        await asyncio.sleep(request.app.state.service.refusals.delay())
    headers = {} if told.retry_after is None else {"Retry-After": str(told.retry_after)}
    return JSONResponse(told.body(), told.status, headers)


# ---- the application


def _model(name: str) -> dict[str, Any]:
    """OpenAI's object of a model."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "flashu_ext"}


def application(
    pipe: Any, limits: Limits | None = None, api_key: str | None = None, closes: Sequence[Callable[[], None]] = ()
) -> FastAPI:
    """An ASGI application on a pipeline. Its threads end with its lifespan.

    Args:
        pipe: of any family, accelerated or dense; it may be used elsewhere too.
        api_key: that clients must send, None: nothing.
        closes: called after the threads have ended.

    Raises:
        TypeError: `pipe` is no pipeline.
        ValueError: `api_key` is none that a header can have.
    """
    check_key(api_key)
    service = Service(pipe, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)
            for close in closes:
                close()

    # No pages of its own: they would load scripts from elsewhere.
    app = FastAPI(title="flashu_ext", openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    for kind in (ApiError, Busy, Closed, Gone, HTTPException, Exception):
        app.add_exception_handler(kind, _refused)
    app.add_api_route("/v1/images/generations", service.images, methods=["POST"])
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in service.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name not in service.models:
            raise ApiError(404, f"model: expected one of /v1/models, got {shown(name)}", "model", "model_not_found")
        return _model(name)

    @app.get("/health")
    async def health() -> Response:
        alive = service.thread.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    app.add_middleware(Gate, api_key=api_key, metrics=service.metrics)
    return app
