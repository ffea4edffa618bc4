"""Errors as OpenAI's clients know them."""

from __future__ import annotations

import math
import time
from typing import Any

from ..planning.reading import printable

__all__ = ["ApiError", "Refusals", "invalid"]

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told instead of a result.

    Attributes:
        status: of HTTP.
        message: one line.
        param: the argument that is wrong, or None.
        code: for programs, or None.
        retry_after: seconds after which the same request may be met, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.retry_after = status, printable(message), code, retry_after
        self.param = None if param is None else printable(param, 200)

    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str, expected: str, code: str = "invalid_value", status: int = 400) -> ApiError:
    """The error of a wrong argument.

    Args:
        expected: what was expected and what came.
    """
    return ApiError(status, f"{printable(param, 200)}: {expected}", param, code)


class Refusals:
    """How long the reply to a wrong request is held back: the more of them came in the last second, the longer. So whoever sends
    them one after the other takes little from the others, and one mistake is told at once."""

    FREE = 10
    EACH = 0.005
    """Seconds for each of the last second's that is beyond FREE."""

    def __init__(self, most: float):
        """most: seconds."""
        self._most, self._recent, self._at = most, 0.0, time.monotonic()

    def delay(self) -> float:
        """Seconds, of one more refusal."""
        now = time.monotonic()
        self._recent, self._at = self._recent * math.exp(self._at - now) + 1, now
        return min(self._most, self.EACH * max(0.0, self._recent - self.FREE))
