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
from starlette._utils import get_route_path
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

    def response(self, path: str) -> Response:
        """Return the error as an HTTP response, in the shape of the API to which a path belongs."""
        is_anthropic = path.startswith(ANTHROPIC_PATH)
        return json_response(anthropic_body(self) if is_anthropic else self.body, self.status_code, self.headers)


ANTHROPIC_PATH = "/v1/messages"

_ANTHROPIC_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """Return the JSON object of an error in Anthropic's shape."""
    kind = _ANTHROPIC_KINDS.get(error.status_code, "invalid_request_error" if error.status_code < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


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


MAX_NAMED = 20
"""Most unknown fields that one error names."""


def is_tag(part: int | str) -> bool:
    """Whether a part of pydantic's place of an error is the name of an alternative, and no field of the body."""
    return isinstance(part, str) and part.startswith("(") and part.endswith(")")


def describe_place(place: Sequence[int | str]) -> str:
    """Return the name of a field from the place that pydantic gives it, such as `messages.0.role`."""
    return ".".join(str(part) for part in place if part not in ("body", "path", "query") and not is_tag(part))


def describe(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Return a message, and a field's name or None, for what pydantic found wrong with a request."""
    first = errors[0]
    name = describe_place(first["loc"]) or None
    if first["type"] == "json_invalid":
        return f"body: not JSON at character {name}: {first['ctx']['error']}", None
    if first["type"] == "extra_forbidden":
        unknown = [describe_place(one["loc"]) for one in errors if one["type"] == "extra_forbidden"]
        names = ", ".join(one if len(one) <= 100 else f"{one[:100]}..." for one in unknown[:MAX_NAMED])
        rest = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
        it = "it" if len(unknown) == 1 else "them"
        return f"{names}{rest}: not supported by this server; leave {it} out", unknown[0][:100]
    if first["type"] == "missing" and name is None:
        return "body: got none, legal is a JSON object", None
    if first["type"] == "longspan" and name is None:
        return first["msg"], _param(first["msg"])
    if first["type"] == "longspan" and (inner := re.match(r"(\w+): ", first["msg"])):  # of a part, about its field
        return f"{name}.{first['msg']}", f"{name}.{inner[1]}"
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


def _path(request: Request) -> str:
    return get_route_path(request.scope)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param = describe(error.errors())
    return ApiError(400, message, param=param).response(_path(request))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    if isinstance(error, ApiError):
        return error.response(_path(request))
    message = str(error.detail)
    if error.status_code == 404:
        message = f"no such address: {request.url.path}"
    elif error.status_code == 405:
        message = f"{request.method} is not allowed for {request.url.path}"
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, message, headers=headers).response(_path(request))


async def _on_longspan_error(request: Request, error: Exception) -> Response:
    return as_api_error(error).response(_path(request))


async def _on_any_error(request: Request, error: Exception) -> Response:
    return ApiError(500, f"internal error: {type(error).__name__}").response(_path(request))


def error_handlers() -> dict[Any, Any]:
    """Return the handlers for the app's constructor."""
    return {
        RequestValidationError: _on_validation_error,
        StarletteHTTPException: _on_http_error,
        LongspanError: _on_longspan_error,
        Exception: _on_any_error,
    }
