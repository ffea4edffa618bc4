"""Reads bodies of a bounded size, in bounded time and memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from .errors import ApiError
from .limits import Limits

__all__ = ["Bodies", "Gone"]


class Gone(Exception):
    """The client went away."""


class Bodies:
    """All bodies that a server holds."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Any) -> AsyncIterator[bytes]:
        """A request's body, which counts as held inside the context.

        Raises:
            ApiError: 408 too slow, 413 too long, 415 no JSON, 429 too many at once. Gone: the client went away.
        """
        limits, size = self._limits, 0
        # A page of another site cannot send this type without asking first, which no answer here allows.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"Content-Type: expected application/json, got {kind[:80]!r}")
        length = request.headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > limits.body_bytes:
            raise self._too_long()
        chunks = []
        try:
            async with asyncio.timeout(limits.read_seconds):
                while True:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    chunk = message.get("body", b"")
                    if size + len(chunk) > limits.body_bytes:
                        raise self._too_long()
                    if self._held + len(chunk) > limits.bodies_bytes:
                        raise ApiError(429, "too many requests are being read; try again", retry_after=1)
                    chunks.append(chunk)
                    size += len(chunk)
                    self._held += len(chunk)
                    if not message.get("more_body", False):
                        break
            yield b"".join(chunks)
        except TimeoutError as error:
            raise ApiError(408, f"body: expected within {limits.read_seconds:g} s", code="timeout") from error
        finally:
            self._held -= size

    def _too_long(self) -> ApiError:
        return ApiError(413, f"body: expected at most {self._limits.body_bytes} bytes, got more", code="body_too_large")
