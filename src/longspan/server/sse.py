"""Server-sent events, and clients that go away.

Holds the streaming response, and the watch over the connection. Must not know what is streamed.
Read next: `longspan.server.answers`.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

KEEP_ALIVE = b": keep-alive\n\n"
"""Comment that clients skip, and that keeps proxies from closing a silent connection."""

DONE = b"data: [DONE]\n\n"

SEND_S = 60.0
"""Seconds that a client may leave an event of a stream unread; then it counts as gone."""

ABORT = "longspan.abort"
"""Key in an ASGI scope of a function that drops the connection, unread data included."""

_UNICODE_LINE_ENDS = [(char.encode(), b"\\u%04x" % ord(char)) for char in "\x85\u2028\u2029"]
"""Characters legal in JSON at which some clients, like Python's `str.splitlines`, end a line; and their escapes."""

CLIENT_GONE = 499
"""Status of an answer whose client has gone."""


def event(data: object) -> bytes:
    """Return one event with a JSON object, in what every client takes for one line."""
    line = msgspec.json.encode(data)
    for end, escape in _UNICODE_LINE_ENDS:
        line = line.replace(end, escape)
    return b"data: " + line + b"\n\n"


class EventStream(Response):
    """Response that sends events as they come; ends with the events, or when the client goes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], on_end: Callable[[], None]) -> None:
        """Send nothing yet.

        Args:
            events: encoded events.
            on_end: called in any case, even if no event was read.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send, scope.get(ABORT, _nothing)))
        try:
            await _first(sending, receive)
        finally:
            self._on_end()
            sending.cancel()
            await asyncio.wait({sending})
            await self._events.aclose()
        if not sending.cancelled():
            sending.result()

    async def _send(self, send: Send, abort: Callable[[], None]) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for data in self._events:
                async with asyncio.timeout(SEND_S):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError:
            abort()
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _nothing() -> None:
    """Do nothing, where the server gives no way to drop a connection."""


class HttpProtocol(H11Protocol):
    """uvicorn's protocol with an `abort` for streams: its `close` waits until the client has read everything."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        app = self.app

        async def with_abort(scope: Any, receive: Any, send: Any) -> None:
            scope[ABORT] = transport.abort
            await app(scope, receive, send)

        self.app = with_abort


async def unless_gone(request: Request, making: Coroutine[Any, Any, Response]) -> Response:
    """Make a response, but stop when the client goes."""
    task = asyncio.create_task(making)
    try:
        await _first(task, request.receive)
    except BaseException:
        task.cancel()
        raise
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return Response(status_code=CLIENT_GONE)


async def _first(task: "asyncio.Task[Any]", receive: Receive) -> None:
    """Wait until a task is done or the client has gone."""
    watching = asyncio.create_task(_wait_until_gone(receive))
    try:
        await asyncio.wait({task, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()


async def _wait_until_gone(receive: Receive) -> None:
    """Wait for the end of the connection; the request's body has been read, so nothing else can come."""
    while (await receive())["type"] != "http.disconnect":
        pass
