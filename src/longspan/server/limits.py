"""Checks in front of all routes: API key, size and time of bodies, and whether the server still takes requests.

Holds the ASGI middleware. Must not know what routes do.
Read next: `longspan.server.app`.
"""

import asyncio
import base64
import hmac

from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longspan.server.errors import ApiError
from longspan.server.page import is_of_page
from longspan.server.state import ServerState

HEALTH_PATH = "/health"

BODY_S = 60.0
"""Seconds that a body may take to arrive."""


CHALLENGE_PAGE = 'Basic realm="longspan: any name, and the API key as password", charset="UTF-8"'
"""Challenge to browsers, which then ask for the key, and send it with all that the page calls."""


class Gate:
    """Middleware that checks API keys, counts open requests, and refuses long bodies and, while draining, new work."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = self._state
        error = self._refusal(scope)
        if error is None and scope["method"] == "POST":
            # A request is open once its body is there: a client that stops half way must not keep a server from ending.
            try:
                body = await self._read(receive)
            except ApiError as refusal:
                error = refusal
            else:
                if body is None:
                    return
                error, receive = self._refusal(scope), _replay(body, receive)
        state.num_open += 1
        state.idle.clear()
        try:
            if error is not None:
                await error.response(get_route_path(scope))(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        finally:
            state.num_open -= 1
            if not state.num_open:
                state.idle.set()

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if get_route_path(scope) != HEALTH_PATH and not self._knows(headers):
            return ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": CHALLENGE_PAGE if is_of_page(get_route_path(scope)) else "Bearer"},
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
        if scheme.lower() == "basic":  # as a browser sends what its user has typed
            given = _password(given)
        elif scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")  # as Anthropic's clients send it
        return hmac.compare_digest(given.strip().encode("latin-1"), key.encode())

    def _too_long(self) -> ApiError:
        limit = self._state.config.max_body_bytes
        return ApiError(413, f"body: legal is at most {limit} bytes (--max-body-size)", code="body_too_long")

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the whole body, or None if the client has gone. Counts bytes: a chunked body does not say its length.

        Raises:
            ApiError: the body is too long, or takes too long.
        """
        pieces: list[bytes] = []
        left = self._state.config.max_body_bytes
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    pieces.append(message.get("body", b""))
                    left -= len(pieces[-1])
                    if left < 0:
                        raise self._too_long()
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            text = f"body: got a part of it in {BODY_S:g} s, legal is all of it"
            raise ApiError(408, text, code="body_too_slow", headers={"Connection": "close"}) from None


def _password(credentials: str) -> str:
    """Return the password of HTTP's Basic scheme; empty if they are none."""
    try:
        return base64.b64decode(credentials, validate=True).decode("latin-1").partition(":")[2]
    except ValueError:
        return ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that was read already, and then the client's next messages."""
    is_read = False

    async def replay() -> Message:
        nonlocal is_read, body
        if is_read:
            return await receive()
        is_read, found, body = True, body, b""
        return {"type": "http.request", "body": found, "more_body": False}

    return replay
