"""Errors as OpenAI's clients know them."""

from __future__ import annotations

from typing import Any

from ..planning.reading import printable

__all__ = ["ApiError", "invalid"]

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
