"""The engine behind an event loop: requests come in at any moment, tokens go out as they come.

Holds one thread that runs the engine, and the streams that it feeds. Must not know text or HTTP.
Read next: `longspan.server`, which uses it; `longspan.engine.engine`, which it drives.

Note: one queue
    The engine thread sleeps on a single queue. New requests, cancels and finished plans all arrive there, so a request
    that arrives while ranks 0 and 1 run a long chunk starts at once on an idle rank 2.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future

from longspan.engine.engine import Engine
from longspan.engine.stats import EngineStats
from longspan.engine.update import Update, update_of
from longspan.errors import LongspanError
from longspan.plan.types import PlanResult
from longspan.scheduler.request import Constraint, Request
from longspan.types import FinishReason, SamplingParams

IDLE_CHECK_S = 0.5
"""How often ranks that have nothing to do are looked at: one that died must not go unnoticed until the next request."""

CHECK_INLINE_TOKENS = 10_000
"""Prompts longer than this are checked and hashed in a thread: a million tokens take more than 100 ms."""


class QueueFullError(LongspanError):
    """As many requests wait as may."""

    def __init__(self, num_waiting: int, limit: int) -> None:
        super().__init__(f"{num_waiting} requests wait, legal is at most {limit}; try again later")


class RequestStream:
    """The updates of one request, in order. Read it from the event loop that submitted the request."""

    def __init__(self, engine: "AsyncEngine", prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self._engine = engine
        self.prompt_token_ids, self.params = prompt_token_ids, params
        self._loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[Update | LongspanError] = asyncio.Queue()
        self._ended = False
        # The engine thread's own:
        self._request: Request | None = None
        self._num_read = 0
        self._started_s: float | None = None

    def __aiter__(self) -> AsyncIterator[Update]:
        return self

    async def __anext__(self) -> Update:
        """The next update; the one with a `finish_reason` is the last.

        Raises:
            LongspanError: the engine failed or was closed before the request ended, or this request cannot go on.
        """
        if self._ended:
            raise StopAsyncIteration
        update = await self._updates.get()
        if isinstance(update, LongspanError):
            self._ended = True
            raise update
        self._ended = update.finish_reason is not None
        return update

    def cancel(self) -> None:
        """Nobody waits for the rest: free its pages before the next step that would have computed it.

        May be called at any time and from any thread; after the end it does nothing.
        """
        self._ended = True
        self._engine._events.put(lambda: self._engine._cancel(self))


class AsyncEngine:
    """Requests from an event loop to an `Engine`, which it owns. `submit` and `close` belong to the event loop."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_queued_requests: int | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Start the engine's thread.

        Args:
            engine: from now on used by this object alone.
            max_queued_requests: most requests that wait; None admits any number. A request waits if `max_num_seqs`
                others have not ended, or if the engine's thread, when it last looked, found no pages for it. One that
                it has not looked at yet takes a place that may be free.
            on_failure: called once, from the engine's thread, when the ranks have failed for good and no request can be
                served.
        """
        self.engine = engine
        self._max_queued_requests = max_queued_requests
        self._on_failure = on_failure
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[int, RequestStream] = {}  # the engine thread's own, as the next two
        self._not_started: dict[int, RequestStream] = {}
        self._done: list[Future[PlanResult]] = []
        self._num_waiting = 0  # when the engine's thread last tried to let requests in
        self._num_arriving = 0  # submitted, not yet seen by the engine's thread; guarded by _lock
        self._takes_requests = True  # guarded by _lock
        self._lock = threading.Lock()
        self.failure: BaseException | None = None
        """What made the ranks fail for good."""
        self.is_recovering = False
        """The ranks are lost, and new ones are on their way."""
        self._reason = LongspanError("the engine is closed")  # what requests are told that can't be answered any more
        self._thread = threading.Thread(target=self._run, name="longspan-engine", daemon=True)
        self._thread.start()

    # -- the event loop's side ---------------------------------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        scheduler = self.engine.scheduler
        return self._num_arriving + len(scheduler.waiting) + len(scheduler.running)

    async def submit(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, *, constraint: Constraint | None = None
    ) -> RequestStream:
        """Queue a request.

        Raises:
            ConfigError, CapacityError: as `Scheduler.check_request`.
            QueueFullError: too many requests wait.
            LongspanError: the engine has failed or is closed.
        """
        self._check_alive()
        num_waiting = max(self._num_waiting, self.num_unfinished - self.engine.config.max_num_seqs)
        if self._max_queued_requests is not None and num_waiting >= self._max_queued_requests:
            raise QueueFullError(num_waiting, self._max_queued_requests)
        with self._lock:
            self._num_arriving += 1
        try:
            check = self.engine.scheduler.check_request
            if len(prompt_token_ids) > CHECK_INLINE_TOKENS:
                page_hashes = await asyncio.to_thread(check, prompt_token_ids, params)
            else:
                page_hashes = check(prompt_token_ids, params)
            stream = RequestStream(self, prompt_token_ids, params)
            with self._lock:  # else the thread might end between the check and the put, and nobody would answer
                self._check_alive()
                self._events.put(lambda: self._add(stream, constraint, page_hashes))
        except BaseException:
            with self._lock:
                self._num_arriving -= 1
            raise
        return stream

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise LongspanError(f"the ranks have failed: {self.failure}")
        if not self._takes_requests:
            raise LongspanError("the engine is closed")

    def stats(self) -> EngineStats:
        """What the engine is doing and has done. May be called from any thread."""
        scheduler = self.engine.scheduler
        allocators = scheduler.memory.allocators
        ranks = self.engine.rank_stats()
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=self._num_arriving + len(scheduler.waiting),
            kv_pages_used=tuple(sum(group.num_used for group in groups) for groups in allocators),
            kv_pages_total=tuple(sum(group.num_pages for group in groups) for groups in allocators),
            busy_s=tuple(rank.busy_s for rank in ranks),
            tokens_computed=tuple(rank.tokens_computed for rank in ranks),
            steps_per_strategy=dict(self.engine.strategy_counts),
            bytes_per_strategy=self.engine.bytes_per_strategy(),
            num_preemptions=scheduler.num_preemptions,
            prefix_queries_tokens=scheduler.memory.num_queried_tokens,
            prefix_hit_tokens=scheduler.memory.num_hit_tokens,
            num_restarts=self.engine.restarts.num_done,
            recovery_s=self.engine.restarts.total_s,
            last_recovery_s=self.engine.restarts.last_s,
        )

    def close(self) -> None:
        """End all requests and the ranks, new ones that start included. Blocks until they are gone. May be called
        twice."""
        self.engine.give_up()
        self._events.put(None)
        self._thread.join()
        self.engine.close()

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                event = self._next_event()
                while event is not None:  # everything that has come, before the next plans are made
                    event()
                    try:
                        event = self._events.get_nowait()
                    except queue.Empty:
                        break
                if event is None:
                    break
                done, self._done = self._done, []
                updates = self._updates(self.engine.take_in(done))
                if self.engine.failure is not None:
                    self._deliver(updates)
                    updates = self._recover()
                for future in self.engine.submit_plans():
                    future.add_done_callback(self._plan_done)
                self._deliver(updates)  # the ranks have work again before the event loop wants the interpreter
                self._num_waiting = len(self.engine.scheduler.waiting)
                self._note_starts()
        except Exception as failure:
            self.failure = failure
            reason = failure if isinstance(failure, LongspanError) else LongspanError(f"the engine failed: {failure}")
            self._reason = reason
            if self._on_failure is not None:
                self._on_failure(failure)
        with self._lock:
            self._takes_requests = False
        for stream in self._streams.values():
            _call_soon(stream, self._reason)
        self._streams.clear()
        while True:  # requests that came too late are told so as well
            try:
                late = self._events.get_nowait()
            except queue.Empty:
                break
            if late is not None:
                late()

    def _next_event(self) -> Callable[[], None] | None:
        """What comes next; nothing in particular, if the ranks are lost while they have nothing to do."""
        while True:
            try:
                return self._events.get(timeout=IDLE_CHECK_S)
            except queue.Empty:
                if self.engine.failure is not None:
                    return lambda: None

    def _recover(self) -> "_Updates":
        """Replace the ranks, telling streams before. Returns what streams are to hear afterwards.

        Raises:
            BaseException: what made the ranks fail, for good.
        """
        self.is_recovering = self.engine.config.max_restarts > 0
        if self.is_recovering:
            self._deliver(self._pauses())
        updates = self._updates(self.engine.recover())
        self.is_recovering = False  # and not where it raised: `failure` takes over, with no moment of health between
        return updates

    def _pauses(self) -> "_Updates":
        """What the streams of requests that have to be computed again are to hear."""
        updates: _Updates = {}
        for stream in self._streams.values():
            if _has_started(stream) and stream._request is not None:
                cached = stream._request.num_cached
                update = Update([], [], 0, cached, self._since_start_s(stream), None, None, is_recovering=True)
                updates.setdefault(stream._loop, []).append((stream, update))
        return updates

    @staticmethod
    def _since_start_s(stream: RequestStream) -> float:
        return 0.0 if stream._started_s is None else time.perf_counter() - stream._started_s

    def _note_starts(self) -> None:
        started = [request_id for request_id, stream in self._not_started.items() if _has_started(stream)]
        for request_id in started:
            self._not_started.pop(request_id)._started_s = time.perf_counter()

    def _plan_done(self, future: "Future[PlanResult]") -> None:
        """In whatever thread completed the plan."""
        self._events.put(lambda: self._done.append(future))

    def _add(self, stream: RequestStream, constraint: Constraint | None, page_hashes: list[bytes]) -> None:
        with self._lock:
            self._num_arriving -= 1
        if not self._takes_requests:
            _call_soon(stream, self._reason)
            return
        try:
            stream._request = self.engine.add_request(
                stream.prompt_token_ids, stream.params, constraint=constraint, page_hashes=page_hashes
            )
        except LongspanError as error:
            _call_soon(stream, error)
            return
        self._streams[stream._request.request_id] = self._not_started[stream._request.request_id] = stream

    def _cancel(self, stream: RequestStream) -> None:
        request = stream._request
        if request is not None and self._streams.pop(request.request_id, None) is not None:
            self._not_started.pop(request.request_id, None)
            self.engine.abort(request)

    def _updates(self, advanced: Sequence[Request]) -> "_Updates":
        """What the streams of these requests are to hear, per event loop."""
        updates: _Updates = {}
        for request in advanced:
            stream = self._streams.get(request.request_id)
            if stream is None:
                continue
            if request.finish_reason is FinishReason.ERROR:
                del self._streams[request.request_id]
                self._not_started.pop(request.request_id, None)
                updates.setdefault(stream._loop, []).append((stream, LongspanError(request.error)))
                continue
            update = update_of(request, stream._num_read, self._since_start_s(stream))
            stream._num_read = request.num_generated
            updates.setdefault(stream._loop, []).append((stream, update))
            if request.finish_reason is not None:
                del self._streams[request.request_id]
        return updates

    def _deliver(self, updates: "_Updates") -> None:
        """One call into every event loop per step, whatever the number of requests."""
        for loop, found in updates.items():
            try:
                loop.call_soon_threadsafe(_put_all, found)
            except RuntimeError:  # that loop has closed; nobody waits
                for stream, _ in found:
                    self._cancel(stream)


_Updates = dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, Update | LongspanError]]]


def _has_started(stream: RequestStream) -> bool:
    request = stream._request
    return request is not None and (request.in_flight or request.num_computed > 0)


def _put_all(updates: Sequence[tuple[RequestStream, Update | LongspanError]]) -> None:
    for stream, update in updates:
        stream._updates.put_nowait(update)


def _call_soon(stream: RequestStream, error: LongspanError) -> None:
    try:
        stream._loop.call_soon_threadsafe(stream._updates.put_nowait, error)
    except RuntimeError:  # the loop has closed
        return
