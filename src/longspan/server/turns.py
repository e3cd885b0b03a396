"""Requests that arrive together begin one after another, so that streams go on meanwhile.

Holds the middleware, and how many connections are accepted at a time. Must not know what requests are.
Read next: `longspan.server.app`, which installs it; `longspan.server.run`, which accepts.

Note [Ten thousand at once]
    An event loop runs all that is ready before it looks at anything else: 2,048 new connections, the limit of uvicorn,
    are one such round, and all of their requests are the next one, which took seconds. So few are accepted, and few
    requests begin, per round; the others wait in the listening socket and here, in the order in which they came.
"""

import asyncio
from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send

ACCEPTS = 8
"""Connections that are accepted before the event loop looks at anything else."""

BEGINS = 4
"""Requests that begin before the event loop looks at anything else; one takes about a millisecond."""


class InTurn:
    """Middleware that lets a few requests begin per round of the event loop."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._left, self._is_set = BEGINS, False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._left:
            self._left -= 1
            self._next_round()
        else:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        await self._app(scope, receive, send)

    def _next_round(self) -> None:
        if not self._is_set:
            self._is_set = True
            asyncio.get_running_loop().call_soon(self._begin_round)

    def _begin_round(self) -> None:
        self._is_set, self._left = False, BEGINS
        while self._waiting and self._left:
            turn = self._waiting.popleft()
            if not turn.done():  # else its client has gone
                turn.set_result(None)
                self._left -= 1
        if self._left < BEGINS:
            self._next_round()
