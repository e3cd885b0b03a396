"""The gate in front of all routes: who may enter, how much they may bring, and whether anybody may enter at all.

Holds the ASGI middleware. Must not know what routes do.
Read next: `longspan.server.app`.
"""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longspan.server.errors import ApiError
from longspan.server.state import ServerState

HEALTH_PATH = "/health"


class Gate:
    """Checks the key, counts open requests, refuses new work while draining, and bodies that are too long."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = self._state
        state.num_open += 1
        state.idle.clear()
        try:
            error = self._refusal(scope)
            if error is not None:
                await error.response()(scope, receive, send)
            else:
                await self._app(scope, self._limited(receive), send)
        finally:
            state.num_open -= 1
            if not state.num_open:
                state.idle.set()

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if scope["path"] != HEALTH_PATH and not self._knows(headers):
            return ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if scope["method"] == "POST":
            if self._state.is_draining:
                return ApiError(503, "the server is shutting down", code="shutting_down")
            if self._state.engine.failure is not None:
                return ApiError(503, f"the ranks have failed: {self._state.engine.failure}", code="engine_error")
        length = headers.get("content-length", "")
        if length.isdigit() and (len(length) > 18 or int(length) > self._state.config.max_body_bytes):
            return self._too_long()
        return None

    def _knows(self, headers: Headers) -> bool:
        key = self._state.config.api_key
        if key is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), key.encode())

    def _too_long(self) -> ApiError:
        limit = self._state.config.max_body_bytes
        return ApiError(413, f"body: legal is at most {limit} bytes (--max-body-size)", code="body_too_long")

    def _limited(self, receive: Receive) -> Receive:
        """Counts what comes: a body in pieces does not say its length."""
        left = self._state.config.max_body_bytes

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            if message["type"] == "http.request":
                left -= len(message.get("body", b""))
                if left < 0:
                    raise self._too_long()
            return message

        return limited
