"""Updates of requests on their way from the engine's thread to the event loops that submitted them.

Holds a stream per request, and the engine thread's record of the open ones. Must not know text or HTTP.
Read next: `longspan.engine.async_engine`, which fills streams; `longspan.engine.update`, which they carry.

Note [A step of a thousand requests]
    A step tells all of its requests' streams at once, and what follows for each of them (text, JSON, a write) takes the
    event loop 0.1 to 0.2 ms. So an event loop takes `AT_ONCE` streams at a time, and looks at everything else in
    between. Where it gets behind, the updates of a stream that wait are merged into one.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from weakref import WeakKeyDictionary

from longspan.engine.update import Update, merged, update_of
from longspan.errors import LongspanError
from longspan.scheduler.request import Request
from longspan.types import FinishReason

AT_ONCE = 16
"""Streams that an event loop hands an update before it looks at anything else."""

MOST_MERGED = 256
"""Most tokens of an update that others are merged into."""


class RequestStream:
    """The updates of one request, in order. Read it from the event loop that submitted the request."""

    def __init__(self, cancel: "Callable[[RequestStream], None]") -> None:
        """Make a stream without updates.

        Args:
            cancel: called with this stream, from any thread, when the client wants no more of it.
        """
        self._cancel = cancel
        self._updates: asyncio.Queue[Update | LongspanError] = asyncio.Queue()
        self._is_ended = False
        self.pending: list[Update] = []
        """Updates that the event loop has not handed over, merged as far as they can be; only for the event loop."""
        self.loop = asyncio.get_running_loop()
        """Event loop that reads the stream."""

    def __aiter__(self) -> AsyncIterator[Update]:
        return self

    async def __anext__(self) -> Update:
        """Return the next update; the one with a `finish_reason` is the last.

        Raises:
            LongspanError: the engine failed or was closed before the request ended, or this request cannot go on.
        """
        if self._is_ended:
            raise StopAsyncIteration
        update = await self._updates.get()
        if isinstance(update, LongspanError):
            self._is_ended = True
            raise update
        self._is_ended = update.finish_reason is not None
        return update

    def cancel(self) -> None:
        """End the request, and free its pages before the next step that would have computed it.

        May be called from any thread; after the request's end it does nothing.
        """
        self._is_ended = True
        self._cancel(self)

    def put(self, update: Update | LongspanError) -> None:
        """Hand the reader an update, or an error, which is the last. Only the event loop may call it."""
        self.hand_over()
        self._updates.put_nowait(update)

    def wait_with(self, update: Update) -> None:
        """Keep an update until `hand_over`. Only the event loop may call it."""
        last = self.pending[-1] if self.pending else None
        if last is None or last.is_recovering or update.is_recovering or len(last.token_ids) >= MOST_MERGED:
            self.pending.append(update)
        else:
            self.pending[-1] = merged(last, update)

    def hand_over(self) -> None:
        """Hand the reader the updates that wait. Only the event loop may call it."""
        pending, self.pending = self.pending, []
        for update in pending:
            self._updates.put_nowait(update)

    def put_soon(self, error: LongspanError) -> None:
        """Hand the reader an error, from any thread."""
        try:
            self.loop.call_soon_threadsafe(self.put, error)
        except RuntimeError:  # the loop has closed
            return


class _Open:
    """A request that has not ended, and its stream."""

    __slots__ = ("num_read", "request", "started_s", "stream")

    def __init__(self, request: Request, stream: RequestStream) -> None:
        self.request, self.stream = request, stream
        self.num_read = 0  # tokens that updates have carried
        self.started_s: float | None = None

    @property
    def has_started(self) -> bool:
        return self.request.in_flight or self.request.num_computed > 0

    @property
    def since_start_s(self) -> float:
        return 0.0 if self.started_s is None else time.perf_counter() - self.started_s


class _Deliveries:
    """Updates on their way to the readers in one event loop, some at a time. Only the event loop may use it."""

    def __init__(self) -> None:
        self._waiting: dict[RequestStream, None] = {}  # in the order in which they will be told

    def take(self, updates: Sequence[tuple[RequestStream, Update | LongspanError]]) -> None:
        """Take the updates of a step."""
        is_idle = not self._waiting
        for stream, update in updates:
            if isinstance(update, LongspanError):
                stream.put(update)
            else:
                stream.wait_with(update)
                self._waiting[stream] = None
        if is_idle:
            self._hand_over()

    def _hand_over(self) -> None:
        for stream in [*itertools.islice(self._waiting, AT_ONCE)]:
            del self._waiting[stream]
            stream.hand_over()
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._hand_over)


class OpenStreams:
    """Streams of requests that have not ended, and updates to deliver. Only the engine's thread may use it."""

    def __init__(self) -> None:
        self._open: dict[int, _Open] = {}  # by request id, as is `_not_started`
        self._not_started: dict[int, _Open] = {}
        self._ids: dict[RequestStream, int] = {}
        self._untold: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, Update | LongspanError]]] = {}
        self._deliveries: WeakKeyDictionary[asyncio.AbstractEventLoop, _Deliveries] = WeakKeyDictionary()

    def add(self, request: Request, stream: RequestStream) -> None:
        """Note a request that was queued."""
        request_id = request.request_id
        self._open[request_id] = self._not_started[request_id] = _Open(request, stream)
        self._ids[stream] = request_id

    def remove(self, stream: RequestStream) -> Request | None:
        """Forget a stream; return its request, or None if the request has ended."""
        request_id = self._ids.pop(stream, None)
        if request_id is None:
            return None
        self._not_started.pop(request_id, None)
        return self._open.pop(request_id).request

    def note_starts(self) -> None:
        """Start the clock of requests whose first plan has been submitted."""
        started = [request_id for request_id, found in self._not_started.items() if found.has_started]
        for request_id in started:
            self._not_started.pop(request_id).started_s = time.perf_counter()

    def since_start_s(self, request_id: int) -> float | None:
        """Return the seconds since a request's first plan was submitted; None if there was none."""
        found = self._open.get(request_id)
        return None if found is None or found.started_s is None else found.since_start_s

    def take(self, advanced: Iterable[Request]) -> None:
        """Queue an update for the stream of every request that has advanced."""
        for request in advanced:
            found = self._open.get(request.request_id)
            if found is None:
                continue
            stream = found.stream
            if request.finish_reason is FinishReason.ERROR:
                self._tell(stream, LongspanError(request.error))
            else:
                self._tell(stream, update_of(request, found.num_read, found.since_start_s))
                found.num_read = request.num_generated
            if request.finish_reason is not None:
                self.remove(stream)

    def pause(self) -> None:
        """Queue the news that the ranks are lost, for streams of requests that must be computed again."""
        for found in self._open.values():
            if found.has_started:
                cached = found.request.num_cached
                self._tell(found.stream, Update([], [], 0, cached, found.since_start_s, None, None, is_recovering=True))

    def _tell(self, stream: RequestStream, update: Update | LongspanError) -> None:
        self._untold.setdefault(stream.loop, []).append((stream, update))

    def deliver(self) -> list[Request]:
        """Deliver the queued updates, with one call into each event loop.

        Returns:
            Requests whose event loop has closed, so that nothing reads them any more.
        """
        lost: list[Request] = []
        untold, self._untold = self._untold, {}
        for loop, updates in untold.items():
            try:
                loop.call_soon_threadsafe(self._deliveries.setdefault(loop, _Deliveries()).take, updates)
            except RuntimeError:
                lost += [request for stream, _ in updates if (request := self.remove(stream)) is not None]
        return lost

    def end_all(self, reason: LongspanError) -> None:
        """End all streams with an error."""
        for found in self._open.values():
            found.stream.put_soon(reason)
        self._open.clear()
        self._not_started.clear()
        self._ids.clear()
