"""The engine behind an event loop: requests come in at any moment, tokens go out as they come.

Holds the thread that steps the engine, and the calls that it is asked to make. Must not know text or HTTP.
Read next: `longspan.server`, which uses it; `longspan.engine.engine`, whose `step` is the loop;
`longspan.engine.request_stream`, which carries tokens back.

Note [One place to sleep]
    The engine's thread sleeps only in `Engine.step`. A plan that ends wakes it there, and so does a request or a
    cancellation that arrives. So a request that arrives while ranks 0 and 1 run a long chunk starts at once on an idle
    rank 2.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.engine.live import LiveSnapshot, take_snapshot
from longspan.engine.request_stream import OpenStreams, RequestStream
from longspan.engine.stats import Capacity, EngineStats
from longspan.errors import LongspanError
from longspan.scheduler.request import Constraint, Request
from longspan.types import Adapter, ModelSpec, SamplingParams

CHECK_INLINE_TOKENS = 10_000
"""Tokens above which a prompt is checked and hashed in a thread: a million take more than 100 ms."""


class QueueFullError(LongspanError):
    """The queue of waiting requests is full."""

    def __init__(self, num_waiting: int, limit: int) -> None:
        super().__init__(f"{num_waiting} requests wait, legal is at most {limit}; try again later")


class _Asked:
    """What the engine's thread was asked to do, and somebody in an event loop waits for."""

    def __init__(self, future: "asyncio.Future[None]") -> None:
        self.future = future
        self.is_ended = False

    def end(self, last: Callable[[], None]) -> None:
        """Do the last of it; whoever waits goes on, with what `last` raises."""
        try:
            last()
        except Exception as error:
            self.fail(error)
        else:
            self._give(lambda: self.future.set_result(None))

    def fail(self, error: BaseException) -> None:
        """Let whoever waits raise an error."""
        self._give(lambda: self.future.set_exception(error))

    def _give(self, give: Callable[[], None]) -> None:
        def give_once() -> None:
            if not self.future.done():  # else nobody waits any more
                give()

        self.is_ended = True
        with contextlib.suppress(RuntimeError):  # the loop has closed
            self.future.get_loop().call_soon_threadsafe(give_once)


class AsyncEngine:
    """Runs an `Engine`, which it owns, for an event loop. Only the event loop may call `submit` and `close`."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_queued_requests: int | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Start the engine's thread.

        Args:
            engine: engine that only this object uses from now on.
            max_queued_requests: most requests that wait; None admits any number. A request waits if `max_num_seqs`
                others have not ended, or if the engine's thread, when it last looked, found no pages for it. A
                request that the thread has not looked at yet counts as one that finds pages.
            on_failure: called once, from the engine's thread, when the ranks have failed for good and no request can be
                served.
        """
        self.engine = engine
        self._max_queued_requests = max_queued_requests
        self._on_failure = on_failure
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # for the engine's thread to run
        self._streams = OpenStreams()  # only for the engine's thread
        self._num_waiting = 0  # when the engine's thread last tried to let requests in
        self._num_arriving = 0  # submitted, not yet seen by the engine's thread; guarded by _lock
        self._asked: set[_Asked] = set()  # without an answer so far; only for the engine's thread
        self._is_open = True  # until `close`; only for the engine's thread
        self._takes_requests = True  # guarded by _lock
        self._lock = threading.Lock()
        self.failure: BaseException | None = None
        """Error that made the ranks fail for good, or None."""
        self.is_recovering = False
        """Whether the ranks are lost, and new ones are starting."""
        self._reason = LongspanError("the engine is closed")  # error of requests that can't be answered any more
        self._thread = threading.Thread(target=self._run, name="longspan-engine", daemon=True)
        self._thread.start()

    # -- the event loop's side ---------------------------------------------------------------------------------------

    @property
    def config(self) -> EngineConfig:
        """The engine's options; after a loss, those of the ranks that are left."""
        return self.engine.config

    @property
    def model(self) -> ModelSpec:
        """The model's facts."""
        return self.engine.spec

    @property
    def has_drafts(self) -> bool:
        """Whether steps may check drafts."""
        return self.engine.scheduler.drafting.is_on

    @property
    def num_unfinished(self) -> int:
        """Number of requests that have not ended."""
        scheduler = self.engine.scheduler
        return self._num_arriving + len(scheduler.waiting) + len(scheduler.running)

    @property
    def adapters(self) -> list[Adapter]:
        """LoRA adapters that requests may name."""
        return self.engine.adapters.named

    async def load_adapter(self, name: str, directory: str) -> None:
        """Load a LoRA adapter, and wait until requests may name it. Plans wait while ranks read its files.

        Raises:
            ConfigError: the name is illegal or taken, or the files are not those of an adapter of this model.
            LongspanError: the ranks were lost meanwhile, or the engine has failed or is closed.
        """
        self._check_alive()
        read = partial(self.engine.adapters.read, name, directory, name_field="lora_name", field="lora_path")
        adapter = await asyncio.to_thread(read)

        def begin(asked: _Asked) -> None:
            load = self.engine.begin_load_adapter(adapter)
            end = partial(self._answer, asked, lambda _: asked.end(partial(self.engine.end_load_adapter, load)))
            load.loaded.add_done_callback(lambda _: self._call(end))

        await self._ask(begin)

    async def unload_adapter(self, name: str) -> None:
        """Let no more requests name a LoRA adapter; those that run go on.

        Raises:
            ConfigError: there is none of this name.
            LongspanError: the engine has failed or is closed.
        """
        await self._ask(lambda asked: asked.end(partial(self.engine.unload_adapter, name)))

    async def _ask(self, call: "Callable[[_Asked], None]") -> None:
        """Let the engine's thread do something, and wait until it has ended what it was asked.

        Raises:
            LongspanError: what `call` raised; the engine has failed or is closed.
        """
        asked = _Asked(asyncio.get_running_loop().create_future())
        with self._lock:
            self._check_alive()
            self._call(partial(self._answer, asked, call))
        await asked.future

    async def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        constraint: Constraint | None = None,
        adapter: Adapter | None = None,
    ) -> RequestStream:
        """Queue a request.

        Args:
            prompt_token_ids, params, constraint, adapter: as for `Engine.add_request`.

        Raises:
            ConfigError, CapacityError: as in `Intake.check`.
            QueueFullError: too many requests wait.
            LongspanError: the engine has failed or is closed.
        """
        self._check_alive()
        num_waiting = max(self._num_waiting, self.num_unfinished - self.config.max_num_seqs)
        if self._max_queued_requests is not None and num_waiting >= self._max_queued_requests:
            raise QueueFullError(num_waiting, self._max_queued_requests)
        with self._lock:
            self._num_arriving += 1
        try:
            check = self.engine.scheduler.intake.check
            if len(prompt_token_ids) > CHECK_INLINE_TOKENS:
                page_hashes = await asyncio.to_thread(check, prompt_token_ids, params, adapter)
            else:
                page_hashes = check(prompt_token_ids, params, adapter)
            stream = RequestStream(lambda stream: self._call(partial(self._cancel, stream)))
            add = partial(
                self.engine.add_request,
                prompt_token_ids,
                params,
                constraint=constraint,
                page_hashes=page_hashes,
                adapter=adapter,
            )
            with self._lock:  # else the thread might end between the check and the call, which would stay unanswered
                self._check_alive()
                self._call(partial(self._add, stream, add))
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

    def capacity(self) -> Capacity:
        """Return what the ranks can hold. Any thread may call it."""
        return self.engine.capacity()

    def check_fits(self, prompt_len: int, max_tokens: int) -> None:
        """Refuse a request that would not fit even on empty ranks. Any thread may call it.

        Raises:
            CapacityError: says what would fit.
        """
        self.engine.check_fits(prompt_len, max_tokens)

    def stats(self) -> EngineStats:
        """Return what the engine is doing and has done. Any thread may call it."""
        stats = self.engine.stats()
        return replace(stats, num_waiting=stats.num_waiting + self._num_arriving)

    async def look(self, seconds: float) -> LiveSnapshot | None:
        """Return a snapshot between two steps; None if the engine's thread takes none in time, as while ranks start.

        Args:
            seconds: longest wait.
        """
        taken: asyncio.Future[LiveSnapshot] = asyncio.get_running_loop().create_future()
        self._call(partial(self._take_snapshot, taken))
        try:
            async with asyncio.timeout(seconds):
                return await taken
        except TimeoutError:
            return None

    def close(self) -> None:
        """End all requests and ranks, and wait until they are gone. May be called twice, and while new ranks start."""
        self.engine.give_up()
        self._call(self._stop)
        self._thread.join()
        self.engine.close()

    def _call(self, call: Callable[[], None]) -> None:
        """Let the engine's thread call something before it makes the next plans. Any thread may call it."""
        self._calls.put(call)
        self.engine.wake()

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._is_open:
                self._streams.take(self.engine.step(meanwhile=self._tell, on_loss=self._pause))
                self.is_recovering = False  # not if `step` raised: no health check may succeed before `failure` is set
                self._run_calls()
        except Exception as failure:
            self.failure = failure
            reason = failure if isinstance(failure, LongspanError) else LongspanError(f"the engine failed: {failure}")
            self._reason = reason
            if self._on_failure is not None:
                self._on_failure(failure)
        with self._lock:
            self._takes_requests = False
        self._streams.deliver()
        self._streams.end_all(self._reason)
        self._run_calls()  # requests that came too late are told so as well
        for asked in self._asked:
            asked.fail(self._reason)

    def _run_calls(self) -> None:
        while not self._calls.empty():
            self._calls.get_nowait()()

    def _take_snapshot(self, taken: "asyncio.Future[LiveSnapshot]") -> None:
        snapshot = take_snapshot(self.engine, self._streams.since_start_s)

        def give() -> None:
            if not taken.done():  # else nobody waits any more
                taken.set_result(snapshot)

        with contextlib.suppress(RuntimeError):  # the loop has closed
            taken.get_loop().call_soon_threadsafe(give)

    def _answer(self, asked: "_Asked", call: "Callable[[_Asked], None]") -> None:
        """Do what was asked, or say that it cannot be done any more."""
        self._asked.add(asked)
        if not self._takes_requests:
            asked.fail(self._reason)
        else:
            try:
                call(asked)
            except Exception as error:
                asked.fail(error)
        self._asked = {one for one in self._asked if not one.is_ended}

    def _stop(self) -> None:
        self._is_open = False

    def _tell(self) -> None:
        """Deliver updates, at a moment when the ranks have work and the event loops may take the interpreter."""
        for request in self._streams.deliver():
            self.engine.abort(request)
        self._streams.note_starts()
        self._num_waiting = len(self.engine.scheduler.waiting)

    def _pause(self) -> None:
        """Tell streams that the ranks are lost, if new ones will replace them."""
        self.is_recovering = self.config.max_restarts > 0
        if self.is_recovering:
            self._streams.pause()
            self._tell()

    def _add(self, stream: RequestStream, add: Callable[[], Request]) -> None:
        with self._lock:
            self._num_arriving -= 1
        if not self._takes_requests:
            stream.put_soon(self._reason)
            return
        try:
            request = add()
        except LongspanError as error:
            stream.put_soon(error)
            return
        self._streams.add(request, stream)

    def _cancel(self, stream: RequestStream) -> None:
        request = self._streams.remove(stream)
        if request is not None:
            self.engine.abort(request)
