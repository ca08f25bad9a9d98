"""Turn what went wrong into the answer that a client expects: OpenAI's error object, or Anthropic's.

Messages of our own errors are shown as they are; of anything else only its kind is, so that no path or text leaks.
"""

from __future__ import annotations

import logging
import traceback
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from focus_core.errors import (
    CancelledError,
    ConfigError,
    ContextTooLongError,
    CorpusError,
    FocusError,
    OutOfMemoryError,
    StoreError,
)
from focus_core.server.admission import QueueFullError

log = logging.getLogger("focusllm.server")

ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An error with its status, and the parameter that it is about.

    Args:
        status: of HTTP.
        message: what happened, the value, and what to do next.
        param: name of the request's field.
        code: a word that programs may test.
        retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after


def translate(error: Exception) -> ApiError:
    """Return any error as an :class:`ApiError`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), code="not_found" if error.status_code == 404 else None)
    if isinstance(error, ContextTooLongError):
        return ApiError(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, ConfigError | CorpusError):
        return ApiError(400, str(error))
    if isinstance(error, OutOfMemoryError):
        return ApiError(503, str(error), code="out_of_memory", retry_after=10)
    if isinstance(error, StoreError):
        log.error("the store failed: %s", error)  # its message names folders
        return ApiError(500, "the memory cannot be read or written; the server's log says why", code="store_error")
    if isinstance(error, CancelledError):
        return ApiError(499, "the request was cancelled", code="cancelled")
    if isinstance(error, TimeoutError):
        return ApiError(504, str(error) or "the answer took too long", code="timeout")
    if isinstance(error, FocusError):
        return ApiError(500, str(error))
    frames = "".join(traceback.format_tb(error.__traceback__))  # not its message, which may hold what nobody may see
    log.error("unexpected %s while answering a request\n%s", type(error).__name__, frames)
    return ApiError(500, f"the server failed ({type(error).__name__}); its log says more", code="internal_error")


def error_body(error: ApiError, anthropic: bool = False) -> dict[str, Any]:
    """Return the JSON of an error."""
    if anthropic:
        return {
            "type": "error",
            "error": {"type": ANTHROPIC_KINDS.get(error.status, "api_error"), "message": error.message},
        }
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(error.status, kind)
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


async def answer_error(request: Request, error: Exception) -> Response:
    """Answer a request with what went wrong."""
    found = translate(error)
    headers = {"Retry-After": str(found.retry_after)} if found.retry_after is not None else {}
    if isinstance(error, HTTPException) and error.headers:
        headers |= dict(error.headers)
    if found.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    anthropic = request.url.path.startswith("/v1/messages")
    return JSONResponse(error_body(found, anthropic), found.status, headers)


def _invalid(error: RequestValidationError) -> ApiError:
    """Name the first field that is wrong, and what it is."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter {param!r}: it is not supported here; leave it out", param=param)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON ({first.get('ctx', {}).get('error', first['msg'])})")
    said = str(first["msg"]).removeprefix("Value error, ")
    where = f"{param}: " if param else ""
    shown = first.get("input")
    value = f"; got {shown!r}" if isinstance(shown, str | int | float | bool) and len(repr(shown)) < 100 else ""
    return ApiError(400, f"{where}{said}{value}", param=param)
