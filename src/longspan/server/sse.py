"""Server-sent events, and clients that go away.

Holds the response that streams, and the watch over the connection. Must not know what is streamed.
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
"""A comment: clients skip it, and nothing between us and them takes the connection for dead."""

DONE = b"data: [DONE]\n\n"

SEND_S = 60.0
"""How long a client may read nothing of a stream that has something to tell; then it counts as gone."""

ABORT = "longspan.abort"
"""In an ASGI scope: a function that drops the connection, with whatever the client has not read."""

_UNICODE_LINE_ENDS = [(char.encode(), b"\\u%04x" % ord(char)) for char in "\x85\u2028\u2029"]
"""Characters legal in JSON at which clients that split text as Python's `str.splitlines` does end a line, escaped."""

CLIENT_GONE = 499
"""Status of an answer that nobody reads."""


def event(data: object) -> bytes:
    """One event with a JSON object, on what every client takes for one line."""
    line = msgspec.json.encode(data)
    for end, escape in _UNICODE_LINE_ENDS:
        line = line.replace(end, escape)
    return b"data: " + line + b"\n\n"


class EventStream(Response):
    """Sends events as they come; ends when they end or the client goes, whichever is first."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], on_end: Callable[[], None]) -> None:
        """Args: `on_end` is called in any case, also if no event was ever asked for."""
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
    """Where the server gives no way to drop a connection."""


class HttpProtocol(H11Protocol):
    """uvicorn's, whose `close` waits until the client has read everything; so streams get an `abort`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        app = self.app

        async def with_abort(scope: Any, receive: Any, send: Any) -> None:
            scope[ABORT] = transport.abort
            await app(scope, receive, send)

        self.app = with_abort


async def unless_gone(request: Request, making: Coroutine[Any, Any, Response]) -> Response:
    """Make a response; stop making it when the client goes."""
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
    """Returns when a task is done or the client has gone."""
    watching = asyncio.create_task(_wait_until_gone(receive))
    try:
        await asyncio.wait({task, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()


async def _wait_until_gone(receive: Receive) -> None:
    """The request's body has been read, so all that can still come is the end of the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
