"""Error responses, in the shape that OpenAI's clients read.

Holds `ApiError`, its JSON, and the conversion of other errors to it. Must not know engines or streams.
Read next: `longspan.server.app`, which installs the handlers.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "temperature", "code": null}}
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from longspan.engine.async_engine import QueueFullError
from longspan.errors import CapacityError, ConfigError, LongspanError

RETRY_AFTER_S = 1
"""Seconds that a client is told to wait when the queue is full."""

TOO_LONG = "context_length_exceeded"


class ApiError(HTTPException):
    """Error that is the answer to a request."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.message, self.param, self.code = message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """JSON object of the error."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        if self.status_code == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the error as an HTTP response."""
        return json_response(self.body, self.status_code, self.headers)


def json_response(body: object, status: int = 200, headers: Any = None) -> Response:
    """Return a JSON response."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def as_api_error(error: Exception) -> ApiError:
    """Convert an error of the engine to the one that the client gets."""
    text = str(error)
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, text, code="queue_full", headers={"Retry-After": str(RETRY_AFTER_S)})
    if isinstance(error, ConfigError):
        code = TOO_LONG if isinstance(error, CapacityError) else None
        return ApiError(400, text, param=_param(text), code=code)
    return ApiError(500, text or type(error).__name__, code="engine_error")


def _param(message: str) -> str | None:
    """Return the field that a `ConfigError` names, or None."""
    found = re.match(r"(\w+)(: | needs | goes )", message)
    return found[1] if found else None


# -- handlers ----------------------------------------------------------------------------------------------------------


def describe(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Return a message, and a field's name or None, for what pydantic found wrong with a request."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "path", "query")]
    name = ".".join(place) or None
    if first["type"] == "json_invalid":
        return f"body: not JSON at character {place[0]}: {first['ctx']['error']}", None
    if first["type"] == "extra_forbidden":
        return f"{name}: not supported by this server; leave it out", name
    if first["type"] == "missing" and name is None:
        return "body: got none, legal is a JSON object", None
    if first["type"] == "longspan" and name is None:
        return first["msg"], _param(first["msg"])
    if name is None:
        return "body: legal is a JSON object, sent with the header Content-Type: application/json", None
    message = first["msg"][:1].lower() + first["msg"][1:]
    got = "" if first["type"] in ("missing", "longspan") else f"got {_shown(first['input'])}, "
    return f"{name}: {got}{message}", name


def _shown(value: object) -> str:
    """Return a value as text for a message, or only its type or length."""
    if isinstance(value, str) and len(value) > 60:
        return f"a text of {len(value)} characters"
    return repr(value) if isinstance(value, (str, int, float, bool)) or value is None else f"a {type(value).__name__}"


async def _on_validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param = describe(error.errors())
    return ApiError(400, message, param=param).response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    if isinstance(error, ApiError):
        return error.response()
    message = str(error.detail)
    if error.status_code == 404:
        message = f"no such address: {request.url.path}"
    elif error.status_code == 405:
        message = f"{request.method} is not allowed for {request.url.path}"
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, message, headers=headers).response()


async def _on_longspan_error(_request: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def _on_any_error(_request: Request, error: Exception) -> Response:
    return ApiError(500, f"internal error: {type(error).__name__}").response()


def error_handlers() -> dict[Any, Any]:
    """Return the handlers for the app's constructor."""
    return {
        RequestValidationError: _on_validation_error,
        StarletteHTTPException: _on_http_error,
        LongspanError: _on_longspan_error,
        Exception: _on_any_error,
    }
