"""The engine: schedule, run, update, until no request is left.

Holds the loop and the start-up. Must not know text: prompts and outputs are token ids here.
Read next: `longspan.llm`, the Python API on top; `longspan.scheduler.scheduler`.
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from types import TracebackType

import msgspec
import torch
from msgspec import structs

from longspan.config import REMOTE_EXECUTORS, EngineConfig
from longspan.costmodel.parameters import Costs
from longspan.engine.cost_parameters import file_costs, find_costs, striped_from
from longspan.engine.executor import Executor
from longspan.engine.gpus import GPU, choose_device
from longspan.engine.interrupts import deferred_interrupt
from longspan.engine.launcher import Launcher
from longspan.engine.memory import gpu_cache_memory, kv_cache_memory
from longspan.engine.recovery import STARTS, Restarts, add_totals, fail_poison, fail_unfit, fewer_ranks
from longspan.engine.start import start_executor
from longspan.errors import ConfigError, LongspanError
from longspan.group.messages import Start
from longspan.models.inspect import inspect_model
from longspan.models.loader import load_config, resolve_dtype
from longspan.plan.types import PlanResult, RankResult
from longspan.scheduler.invariants import check_books
from longspan.scheduler.request import Constraint, Request
from longspan.scheduler.scheduler import Scheduler
from longspan.sharding.capacity import pool_pages
from longspan.types import FinishReason, ModelSpec, SamplingParams


class RankStats(msgspec.Struct, frozen=True):
    """One rank's share of the work so far. Page and byte figures are peaks, summed over KV groups."""

    rank: int
    kv_pages_used: int
    kv_pages_total: int
    kv_bytes: int
    tokens_computed: int
    bytes_sent: int
    busy_s: float
    """Seconds spent on plans, waits for peers included."""


class Engine:
    """Runs requests on the ranks of one cp_group. Not safe to use from several threads."""

    def __init__(
        self, config: EngineConfig, model: torch.nn.Module | None = None, launcher: Launcher | None = None
    ) -> None:
        """Check everything that can be checked before weights are loaded, then start the ranks.

        Args:
            config: what to run, and how.
            model: with the `threads` executor, a loaded module with the `longspan` attention function.
            launcher: of ranks that start already, as `early_ranks` has them; None starts them here.

        Raises:
            ConfigError: something in the config is illegal or not proven.
            WorkerError: a worker could not start.
        """
        if sys.platform != "linux":
            raise ConfigError(f"platform: got {sys.platform!r}, legal is 'linux'")
        if model is not None and config.executor != "threads":
            raise ConfigError(f"executor: got {config.executor!r} with a loaded model, legal is 'threads'")
        device, gpus = choose_device(config, model)
        config = structs.replace(config, device=device)
        model_config, generation_config = load_config(config.model)
        spec = inspect_model(model_config, generation_config, resolve_dtype(config.dtype, torch.device(device)))
        groups = [structs.replace(g, float32_partials=config.partial_dtype == "float32") for g in spec.kv_groups]
        self.spec: ModelSpec = structs.replace(spec, kv_groups=tuple(groups))
        self._hidden_size: int = model_config.get_text_config().hidden_size
        memory = self._kv_cache_memory(config, gpus, is_loaded=model is not None)
        self.config = config = structs.replace(config, kv_cache_memory=memory)
        num_pages = pool_pages(self.spec, memory, config.page_size, config.max_num_batched_tokens)
        self.scheduler = Scheduler(self.spec, config, num_pages)
        costs = file_costs(config, self.spec)
        self._model, self._start = model, Start(config, self.spec, num_pages, None)
        self._launcher = launcher  # of ranks that are lost, or start: until an executor starts them with it
        self._given_up = threading.Event()
        self.executor: Executor
        """The ranks; others after a loss."""
        self.costs = costs
        """What ranks and links can do; None where nobody knows."""
        self._futures: dict[Future[PlanResult], None] = {}  # in the order submitted
        self.strategy_counts: Counter[str] = Counter()
        """(plan, KV group) pairs per strategy."""
        self.restarts = Restarts(config.max_restarts)
        """How often ranks that were lost have been replaced."""
        self._lost: BaseException | None = None  # why a plan failed; the ranks are to be replaced
        self._failure: BaseException | None = None  # the end: they are not replaced any more
        self._recovery_began_s: float | None = None
        self._recovered: list[Request] = []  # what `recover` has to tell, once it is done
        self._num_unchecked = 0  # plans since the books were checked
        self._last_results: dict[int, RankResult] = {}  # per rank; its totals count from the start of these ranks
        self._earlier: dict[int, RankResult] = {}  # the same, of ranks that were lost
        self._start_until_ready(may_lose_ranks=False)

    def _kv_cache_memory(self, config: EngineConfig, gpus: Sequence[GPU], *, is_loaded: bool) -> int:
        """Bytes per rank."""
        asked, size = config.kv_cache_memory, config.context_parallel_size
        if config.device == "cpu":
            return kv_cache_memory(asked, size)
        if config.executor in REMOTE_EXECUTORS:
            if asked is None:
                raise ConfigError(
                    f"kv_cache_memory: got none with executor {config.executor!r} and device 'cuda', legal is a size: "
                    "the GPUs are elsewhere"
                )
            return asked
        sharing = size // len(gpus)  # threads share one
        weight_bytes = 0 if is_loaded else self.spec.weight_bytes
        together = None if asked is None else asked * sharing
        tokens = config.max_num_batched_tokens * sharing
        return gpu_cache_memory(together, gpus, self.spec, weight_bytes, self._hidden_size, tokens) // sharing

    def _start_ranks(self, launcher: Launcher | None, costs: Costs | None) -> tuple[Executor, Costs | None]:
        """Ranks that are ready, and what they can do.

        Args:
            launcher: of ranks that start already; None starts them here.
            costs: if they are known; None measures them.
        """
        executor = start_executor(self._start, self._model, launcher, self._given_up)
        try:
            if costs is None:
                costs = find_costs(self.config, self.spec, executor, executor.hosts)
            if costs is not None:
                num_pages = self._start.num_pages
                shortest = striped_from(self.config, self.spec, costs, self._hidden_size, num_pages)
                self.scheduler.use_costs(costs, shortest)
        except BaseException:
            executor.close()
            raise
        return executor, costs

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        constraint: Constraint | None = None,
        page_hashes: list[bytes] | None = None,
    ) -> Request:
        """Queue a request. Raises: as `Scheduler.add_request`, and what made the ranks fail before."""
        if self._failure is not None:
            raise self._failure
        return self.scheduler.add_request(prompt_token_ids, params, constraint=constraint, page_hashes=page_hashes)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request early, for example because its text holds a stop string."""
        self.scheduler.finish(request, reason)

    def abort(self, request: Request) -> None:
        """End a request that nobody waits for any more, in flight or not. `step` does not return it again."""
        if self._failure is None:
            self.scheduler.cancel(request)

    @property
    def failure(self) -> BaseException | None:
        """Why the ranks are lost, also while none of them had anything to do; `recover` replaces them."""
        return self._failure or self._lost or self.executor.failure

    @property
    def has_requests(self) -> bool:
        """Whether any request has not ended."""
        return self.scheduler.has_requests

    def step(self) -> list[Request]:
        """Submit what can run, wait for the first plan to end, take in its result, and no other.

        If the ranks are lost, replace them, once all that was done before is taken in, and no more.

        Returns:
            The requests that advanced, by one token at most: who reads text can end one before its next token counts.
            After a loss those that ended, as `recover` returns them.

        Raises:
            WorkerError: a worker died or failed, too often; the engine is of no more use.
        """
        if self.failure is not None:
            done = [future for future in self._futures if future.done() and future.exception() is None]
            return self.take_in(done[:1]) if done else self.recover()
        with deferred_interrupt():
            self.submit_plans()
        assert self._futures, "requests wait, but no plan runs"
        wait(self._futures, return_when=FIRST_COMPLETED)
        # The newest is asked first: a plan ends after the one that it stands behind, which is then found too. `wait`
        # itself may return the one without the other, as it asks them one after another in any order.
        oldest = [future for future in reversed(self._futures) if future.done()][-1]
        with deferred_interrupt():
            return self.take_in([oldest])

    def submit_plans(self) -> list[Future[PlanResult]]:
        """Submit all plans that can start now; returns their futures. Raises: what made the ranks fail for good."""
        if self._failure is not None:
            raise self._failure
        submitted: list[Future[PlanResult]] = []
        while (plan := self.scheduler.schedule()) is not None:
            self.strategy_counts.update(group.strategy.value for group in plan.groups)
            submitted.append(self.executor.submit(plan))
        self._futures.update(dict.fromkeys(submitted))
        return submitted

    def take_in(self, done: Iterable[Future[PlanResult]]) -> list[Request]:
        """Hand results to the scheduler. A plan that failed leaves a `failure`; results of lost ranks change nothing.

        Returns:
            The requests that advanced and were not aborted meanwhile, each once. A plan and the one that stood behind
            it take a request two tokens further.
        """
        advanced: dict[Request, None] = {}
        results: list[PlanResult] = []
        for future in done:
            if future not in self._futures:
                continue  # of ranks that were lost, and replaced meanwhile
            del self._futures[future]
            error = future.exception()
            if error is None:
                results.append(future.result())
            else:
                self._lost = self._lost or error
        for result in sorted(results, key=lambda result: result.plan_id):  # one may stand behind another
            self._last_results.update({r.rank: r for r in result.ranks})
            advanced.update(dict.fromkeys(self.scheduler.update(result)))
        if results and self.config.check_invariants:
            self._check(len(results))
        return list(advanced)

    def _check(self, num_plans: int) -> None:
        """See the option `check_invariants`. Args: plans that have just been taken in."""
        self._num_unchecked += num_plans
        if self._num_unchecked >= self.config.check_invariants or not self.has_requests:
            self._num_unchecked = 0
            try:
                check_books(self.scheduler)
            except AssertionError as broken:
                self._failure = broken  # no token of theirs can be trusted
                raise

    def recover(self) -> list[Request]:
        """Replace ranks that were lost: end what is left of them, start new ones, and compute again what ran.

        Blocks until the new ranks are ready, or `give_up` is called. If it is interrupted, it may be called again.

        Returns:
            The requests that advanced by plans that were done before the loss, and, with a `finish_reason`, those that
            seem to be its reason, or that fewer ranks cannot hold.

        Raises:
            BaseException: what made the ranks fail, if they are not replaced; the engine is of no more use.
        """
        cause = self.failure
        assert cause is not None, "no rank is lost"
        if self._failure is not None or self._given_up.is_set():
            raise cause
        if self._recovery_began_s is None:
            self._take_restart(cause)
            self._recovery_began_s = time.monotonic()
        with deferred_interrupt():
            self._launcher = self.executor.replace() or self._launcher
            self._recovered += self.take_in([f for f in self._futures if f.done() and f.exception() is None])
            self._futures.clear()
            self.scheduler.restart()
            self._recovered += fail_poison(self.scheduler, cause)
            self._earlier, self._last_results = add_totals(self._earlier, self._last_results.values()), {}
        self._next_generation()
        self._start_until_ready(may_lose_ranks=True)
        self.restarts.note_ready(time.monotonic() - self._recovery_began_s, len(self.scheduler.waiting))
        recovered, self._recovered = list(dict.fromkeys(self._recovered)), []
        self._lost = self._recovery_began_s = None
        return recovered

    def _next_generation(self) -> None:
        self._start = structs.replace(self._start, generation=self._start.generation + 1)

    def _start_until_ready(self, *, may_lose_ranks: bool) -> None:
        """Start ranks, and again if they fail to. Args: whether fewer will do if that happens often."""
        num_failed = 0
        while True:
            launcher, self._launcher = self._launcher, None
            try:
                self.executor, self.costs = self._start_ranks(launcher, self.costs)
            except LongspanError as error:
                if self._given_up.is_set():
                    self._failure = error
                    raise
                self._take_restart(error)
                self._next_generation()
                num_failed += 1
            else:
                return
            is_enough = may_lose_ranks and num_failed % STARTS == 0
            if is_enough and (config := fewer_ranks(self.config)) is not None:
                with deferred_interrupt():
                    before, self.config, self.costs = self.scheduler, config, None
                    self._start = structs.replace(self._start, config=config)
                    self.scheduler = Scheduler(self.spec, config, self._start.num_pages)
                    self.scheduler.take_over(before)
                    self._recovered += fail_unfit(self.scheduler)

    def _take_restart(self, cause: BaseException) -> None:
        try:
            self.restarts.take(cause)
        except BaseException as final:
            self._failure = final
            raise

    def rank_stats(self) -> list[RankStats]:
        """What every rank holds and has done."""
        stats: list[RankStats] = []
        totals = self._totals()
        for rank, allocators in enumerate(self.scheduler.memory.allocators):
            last = totals.get(rank)
            stats.append(
                RankStats(
                    rank=rank,
                    kv_pages_used=sum(allocator.peak_used for allocator in allocators),
                    kv_pages_total=sum(allocator.num_pages for allocator in allocators),
                    kv_bytes=sum(
                        allocator.peak_used * group.page_bytes(self.config.page_size)
                        for allocator, group in zip(allocators, self.spec.kv_groups, strict=True)
                    ),
                    tokens_computed=last.tokens_computed if last else 0,
                    bytes_sent=last.bytes_sent if last else 0,
                    busy_s=last.busy_s if last else 0.0,
                )
            )
        return stats

    def bytes_per_strategy(self) -> dict[str, int]:
        """Bytes that ranks sent each other, per strategy."""
        total: Counter[str] = Counter()
        for last in self._totals().values():
            total.update(last.strategy_bytes)
        return dict(total)

    def _totals(self) -> dict[int, RankResult]:
        """Per rank, what it did until now. May be called from any thread."""
        return add_totals(self._earlier, list(self._last_results.values()))

    def give_up(self) -> None:
        """Do not wait for new ranks any more: `recover` raises. Any thread may call it."""
        self._given_up.set()

    def close(self) -> None:
        """End the ranks. May be called twice."""
        self.give_up()
        self.executor.close()
        if self._launcher is not None:
            self._launcher.release(0.0)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
