"""Around the application: keys, counts, and requests that a stopping server gives up."""

from __future__ import annotations

import asyncio
import hmac
import time
from typing import Any

from ..planning.extras import extra
from .errors import ApiError
from .metrics import Metrics

with extra("serve"):
    from starlette.responses import JSONResponse

__all__ = ["GONE", "Gate", "check_key"]

GONE = 499
"""The status of a request whose client went away; nobody reads it but who counts."""

NONE = 0
"""Before a reply has begun."""

OPEN = ("/health",)
"""Needs no key."""
ROUTES = ("/v1/images/generations", "/v1/chat/completions", "/v1/models", "/health", "/metrics")


def check_key(api_key: str | None) -> None:
    """That a header can have this key. Raises ValueError, which does not show it."""
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise ValueError("api_key: expected printable ASCII without spaces around it")


class Gate:
    """ASGI middleware."""

    def __init__(self, app: Any, api_key: str | None, metrics: Metrics):
        self._app = app
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), NONE

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._admits(scope):
                await self._app(scope, receive, counted)
            else:
                error = ApiError(401, "Authorization: expected Bearer and this server's key", code="invalid_api_key")
                await JSONResponse(error.body(), 401, {"WWW-Authenticate": "Bearer"})(scope, receive, counted)
        except asyncio.CancelledError:
            self._metrics.unanswered += 1
            if status == NONE:
                error = ApiError(503, "the server is stopping", code="stopping")
                await JSONResponse(error.body(), 503)(scope, receive, counted)
            raise
        finally:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            route = path if path in ROUTES else "other"
            self._metrics.requests.labels(route, 500 if status == NONE else status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)

    def _admits(self, scope: Any) -> bool:
        if self._key is None or scope["path"].removeprefix(scope.get("root_path", "")) in OPEN:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._key)
