"""The engine: schedule, run, update, until no request is left.

Holds the loop, its one copy: `Engine.step`, which `LLM` calls and the thread of `AsyncEngine`. Must not know text:
prompts and outputs are token ids here.
Read next: `longspan.llm`, the Python API on top; `longspan.scheduler.scheduler`; `longspan.engine.ranks`.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from types import TracebackType

import torch
from msgspec import structs

from longspan.config import EngineConfig
from longspan.costmodel.parameters import Costs
from longspan.engine.cost_parameters import striped_from
from longspan.engine.gpus import choose_device
from longspan.engine.in_flight import PlansInFlight
from longspan.engine.interrupts import deferred_interrupt
from longspan.engine.launcher import Launcher
from longspan.engine.memory import rank_cache_memory
from longspan.engine.ranks import Ranks
from longspan.engine.recovery import fail_poison, fail_unfit
from longspan.engine.stats import Capacity, EngineStats, RankStats, WorkDone
from longspan.errors import ConfigError
from longspan.group.messages import Start
from longspan.models.inspect import inspect_model
from longspan.models.loader import load_config, resolve_dtype
from longspan.plan.types import PlanResult
from longspan.scheduler.invariants import check_books
from longspan.scheduler.request import Constraint, Request
from longspan.scheduler.scheduler import Scheduler
from longspan.sharding.capacity import pool_pages
from longspan.types import FinishReason, ModelSpec, SamplingParams

IDLE_CHECK_S = 0.5
"""How often ranks that have nothing to do are looked at: one that died must not go unnoticed until the next request."""


class Engine:
    """Runs requests on the ranks of one cp_group. Not safe to use from several threads, but for what says so."""

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
        hidden_size: int = model_config.get_text_config().hidden_size
        memory = rank_cache_memory(config, gpus, self.spec, hidden_size, is_loaded=model is not None)
        self.config = config = structs.replace(config, kv_cache_memory=memory)
        num_pages = pool_pages(self.spec, memory, config.page_size, config.max_num_batched_tokens)
        self.scheduler = Scheduler(self.spec, config, num_pages)
        self.choices = self.scheduler.writer.choices
        """Which strategies were chosen so far, and why."""
        self.strategy_counts: Counter[str] = Counter()
        """(plan, KV group) pairs per strategy."""
        self.in_flight = PlansInFlight()
        """Plans that the ranks have not answered."""
        self._work = WorkDone()
        self._num_unchecked = 0  # plans since the books were checked
        self._lost: BaseException | None = None  # why a plan failed; the ranks are to be replaced
        self._recovery_began_s: float | None = None
        self._recovered: list[Request] = []  # what `recover` has to tell, once it is done

        def use(costs: Costs) -> None:
            shortest = striped_from(self.config, self.spec, costs, hidden_size, num_pages)
            self.scheduler.use_costs(costs, shortest)

        self.ranks = Ranks(Start(config, self.spec, num_pages, None), model, launcher, use)
        """The ranks, and what starts new ones."""
        self.restarts = self.ranks.restarts
        """How often ranks that were lost have been replaced."""
        self.executor = self.ranks.start()
        """Runs plans on the ranks; another one after a loss."""

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        constraint: Constraint | None = None,
        page_hashes: list[bytes] | None = None,
    ) -> Request:
        """Queue a request. Raises: as `Scheduler.add_request`, and what made the ranks fail before."""
        if self.ranks.failure is not None:
            raise self.ranks.failure
        return self.scheduler.add_request(prompt_token_ids, params, constraint=constraint, page_hashes=page_hashes)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request early, for example because its text holds a stop string."""
        self.scheduler.finish(request, reason)

    def abort(self, request: Request) -> None:
        """End a request that nobody waits for any more, in flight or not. `step` does not return it again."""
        if self.ranks.failure is None:
            self.scheduler.cancel(request)

    @property
    def failure(self) -> BaseException | None:
        """Why the ranks are lost, also while none of them had anything to do; `recover` replaces them."""
        return self.ranks.failure or self._lost or self.executor.failure

    @property
    def has_requests(self) -> bool:
        """Whether any request has not ended."""
        return self.scheduler.has_requests

    def step(
        self, *, meanwhile: Callable[[], None] | None = None, on_loss: Callable[[], None] | None = None
    ) -> list[Request]:
        """Submit what can run, wait until a plan ends, and take in all that have ended.

        If the ranks are lost, replace them, once all that was done before is taken in, and no more. Without a request
        it waits for `wake`.

        Args:
            meanwhile: called when the ranks have their work, or are lost, and before the wait.
            on_loss: called before ranks that are lost are replaced.

        Returns:
            The requests that advanced; after a loss as `recover` returns them.

        Raises:
            WorkerError: a worker died or failed, too often; the engine is of no more use.
        """
        is_lost = self.failure is not None
        if not is_lost:
            with deferred_interrupt():
                self.submit_plans()
            assert self.in_flight or not self.has_requests, "requests wait, but no plan runs"
        if meanwhile is not None:
            meanwhile()
        if not is_lost:
            while not self.in_flight.wait(IDLE_CHECK_S) and self.failure is None:
                pass
        elif not any(future.exception() is None for future in self.in_flight.ended()):
            if on_loss is not None:
                on_loss()
            return self.recover()
        with deferred_interrupt():
            return self.take_in(self.in_flight.ended())

    def wake(self) -> None:
        """End the wait of a `step`, or of the next one. Any thread may call it."""
        self.in_flight.wake()

    def submit_plans(self) -> int:
        """Submit all plans that can start now; returns their number. Raises: what made the ranks fail for good."""
        if self.ranks.failure is not None:
            raise self.ranks.failure
        num_plans = 0
        while (plan := self.scheduler.schedule()) is not None:
            self.strategy_counts.update(group.strategy.value for group in plan.groups)
            self.in_flight.add(self.executor.submit(plan))
            num_plans += 1
        return num_plans

    def take_in(self, done: Iterable[Future[PlanResult]]) -> list[Request]:
        """Hand results to the scheduler. A plan that failed leaves a `failure`; results of lost ranks change nothing.

        Returns:
            The requests that advanced and were not aborted meanwhile, each once. A plan and the one that stood behind
            it take a request two tokens further.
        """
        advanced: dict[Request, None] = {}
        results: list[PlanResult] = []
        for future in done:
            if not self.in_flight.remove(future):
                continue  # of ranks that were lost, and replaced meanwhile
            error = future.exception()
            if error is None:
                results.append(future.result())
            else:
                self._lost = self._lost or error
        for result in sorted(results, key=lambda result: result.plan_id):  # one may stand behind another
            self._work.note(result.ranks)
            advanced.update(dict.fromkeys(self.scheduler.update(result)))
        self._num_unchecked += len(results)
        check_every = self.config.check_invariants
        if results and check_every and (self._num_unchecked >= check_every or not self.has_requests):
            self._num_unchecked = 0
            try:
                check_books(self.scheduler)
            except AssertionError as broken:
                self.ranks.failure = broken  # no token of theirs can be trusted
                raise
        return list(advanced)

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
        self.ranks.check_wanted(cause)
        if self._recovery_began_s is None:
            self.ranks.take_restart(cause)
            self._recovery_began_s = time.monotonic()
        with deferred_interrupt():
            self.ranks.end_lost()
            self._recovered += self.take_in([f for f in self.in_flight.ended() if f.exception() is None])
            self.in_flight.clear()
            self.scheduler.restart()
            self._recovered += fail_poison(self.scheduler, cause)
            self._work.lose_ranks()
        self.executor = self.ranks.start(self._lose_rank)
        self.restarts.note_ready(time.monotonic() - self._recovery_began_s, len(self.scheduler.waiting))
        recovered, self._recovered = list(dict.fromkeys(self._recovered)), []
        self._lost = self._recovery_began_s = None
        return recovered

    def _lose_rank(self, config: EngineConfig) -> None:
        """Go on with one rank less. Args: the options for those that are left."""
        before, self.config = self.scheduler, config
        self.scheduler = Scheduler(self.spec, config, self.ranks.told.num_pages)
        self.scheduler.take_over(before)
        self._recovered += fail_unfit(self.scheduler)

    # -- questions, which any thread may ask -------------------------------------------------------------------------

    def capacity(self) -> Capacity:
        """What the ranks can hold."""
        num_pages = self.ranks.told.num_pages
        unbounded = [n for n, group in zip(num_pages, self.spec.kv_groups, strict=True) if group.spec.window is None]
        pages_per_rank = min(unbounded) if unbounded else num_pages[0]
        return Capacity(self.config.context_parallel_size, self.config.page_size, pages_per_rank)

    def check_fits(self, prompt_len: int, max_tokens: int) -> None:
        """Refuse a request that would not fit even on empty ranks. Raises: CapacityError, with what would fit."""
        self.scheduler.memory.placer.check_fits(prompt_len, max_tokens)

    def stats(self) -> EngineStats:
        """What the engine is doing and has done."""
        scheduler, memory, restarts = self.scheduler, self.scheduler.memory, self.restarts
        ranks = self.rank_stats()
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_pages_used=tuple(sum(group.num_used for group in groups) for groups in memory.allocators),
            kv_pages_total=tuple(rank.kv_pages_total for rank in ranks),
            busy_s=tuple(rank.busy_s for rank in ranks),
            tokens_computed=tuple(rank.tokens_computed for rank in ranks),
            steps_per_strategy=dict(self.strategy_counts),
            bytes_per_strategy=self._work.bytes_per_strategy(),
            num_preemptions=scheduler.num_preemptions,
            prefix_queries_tokens=memory.num_queried_tokens,
            prefix_hit_tokens=memory.num_hit_tokens,
            num_restarts=restarts.num_done,
            recovery_s=restarts.total_s,
            last_recovery_s=restarts.last_s,
        )

    def rank_stats(self) -> list[RankStats]:
        """What every rank holds and has done."""
        stats: list[RankStats] = []
        done = self._work.per_rank()
        for rank, allocators in enumerate(self.scheduler.memory.allocators):
            last = done.get(rank)
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

    # -- the end -----------------------------------------------------------------------------------------------------

    def give_up(self) -> None:
        """Do not wait for new ranks any more: `recover` raises. Any thread may call it."""
        self.ranks.give_up()

    def close(self) -> None:
        """End the ranks. May be called twice."""
        self.ranks.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
