"""The engine: schedule, run, update, until no request is left.

Holds the only loop, `Engine.step`, which `LLM` and the thread of `AsyncEngine` call. Must not know text: prompts and
outputs are token ids here.
Read next: `longspan.llm`, the Python API on top; `longspan.scheduler.scheduler`; `longspan.engine.ranks`.
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait

import torch
from msgspec import structs

from longspan.config import EngineConfig
from longspan.costmodel.explain import StrategyChoices
from longspan.costmodel.parameters import Costs
from longspan.engine.adapters import AdapterLoad, EngineAdapters
from longspan.engine.closing import ClosedAtExit
from longspan.engine.cost_parameters import gpu_costs, striped_from, weights_of
from longspan.engine.drafts import draft_scheduler, draft_spec, draft_start, make_draft_model
from longspan.engine.gpus import choose_device
from longspan.engine.in_flight import PlansInFlight
from longspan.engine.interrupts import deferred_interrupt
from longspan.engine.launcher import Launcher
from longspan.engine.memory import rank_cache_memory
from longspan.engine.page_tiers import PageTiers, tier_stats
from longspan.engine.ranks import Ranks
from longspan.engine.recovery import fail_poison, fail_unfit
from longspan.engine.served_model import complete
from longspan.engine.stats import Capacity, EngineStats, RankStats, WorkDone
from longspan.errors import ConfigError
from longspan.group.messages import Start
from longspan.models.inspect import inspect_model
from longspan.models.loader import load_config, resolve_dtype
from longspan.models.lora import check_lora
from longspan.models.small_weights import with_small_weights
from longspan.native import kernels
from longspan.plan.types import Plan, PlanResult, is_draft_plan
from longspan.scheduler.invariants import check_books
from longspan.scheduler.request import Constraint, Request
from longspan.scheduler.scheduler import Scheduler
from longspan.scheduler.state_parts import PartsNote
from longspan.sharding.capacity import pages_of_ranks
from longspan.types import Adapter, FinishReason, ModelSpec, SamplingParams

WITHOUT_KERNELS = (
    "without compiled kernels (no C compiler when it was installed) decode, prefill and small weights are slower on a "
    "CPU; tokens are the same"
)
"""What a user should know where `longspan.native` was not compiled."""

IDLE_CHECK_S = 0.5
"""Seconds between checks of idle ranks: the death of one must be noticed before the next request."""


class Engine(ClosedAtExit):
    """Runs requests on the ranks of one cp_group. One thread may use it, except for methods that say otherwise."""

    def __init__(
        self,
        config: EngineConfig,
        model: torch.nn.Module | None = None,
        launcher: Launcher | None = None,
        *,
        end_token_ids: Sequence[int] = (),
    ) -> None:
        """Check everything that can be checked before weights are loaded, then start the ranks.

        Args:
            config: what to run, and how.
            model: with the `threads` executor, a loaded module with the `longspan` attention function.
            launcher: launcher of ranks that are starting, as `early_ranks` yields it; None starts them here.
            end_token_ids: tokens that end a request beside those of the model's configs: its tokenizer's.

        Raises:
            ConfigError: something in the config is illegal or not proven.
            WorkerError: a worker could not start.
        """
        if sys.platform != "linux":
            raise ConfigError(f"platform: got {sys.platform!r}, legal is 'linux'")
        if model is not None and config.executor != "threads":
            raise ConfigError(f"executor: got {config.executor!r} with a loaded model, legal is 'threads'")
        for field, value, legal in (("quantization", config.quantization, "none"), ("lora", config.lora, ())):
            if model is not None and value != legal:
                raise ConfigError(f"{field}: got {value!r} with a loaded model, legal is none")
        if config.merged_lora is not None:
            check_lora(config.merged_lora)
        device, gpus = choose_device(config, model)
        config = structs.replace(config, device=device)
        model_config, generation_config = load_config(config.model, config.hf_overrides)
        dtype = resolve_dtype(config.dtype, torch.device(device))
        if device == "cpu" and not kernels.is_available():
            print(f"longspan: {WITHOUT_KERNELS}", file=sys.stderr)
        spec = inspect_model(model_config, generation_config, dtype, config.tensor_parallel_size)
        spec = with_small_weights(spec, config.model, model_config, dtype, config.quantization)
        self.spec: ModelSpec = complete(spec, config, end_token_ids)
        draft = draft_spec(config, self.spec, dtype)
        self.adapters = EngineAdapters(config)
        """LoRA adapters that requests may name."""
        hidden_size: int = model_config.get_text_config().hidden_size
        whole = rank_cache_memory(config, gpus, self.spec, hidden_size, is_loaded=model is not None)
        memories, told_of_draft = draft_start(config, self.spec, draft, whole)
        self.config = config = structs.replace(config, kv_cache_memory=max(memories))
        num_pages = pages_of_ranks(self.spec, memories, config.page_size, config.max_num_batched_tokens)
        self.scheduler = Scheduler(self.spec, config, num_pages)
        self.drafts = make_draft_model(config, told_of_draft, self.scheduler)
        """Model that makes drafts, if there is one."""
        self.in_flight = PlansInFlight()
        """Plans that the ranks have not answered."""
        self.tiers = PageTiers(config, self.spec, self.wake) if config.has_tiers else None
        """What lies behind the ranks' pools, if anything does."""
        self._work = WorkDone()
        self._num_unchecked = 0  # plans since the books were checked
        self._lost: BaseException | None = None  # why a plan failed, until the ranks are replaced
        self._recovery_began_s: float | None = None
        self._recovered: list[Request] = []  # requests that `recover` returns, once it is done

        def use(costs: Costs) -> None:
            config, pages = self.config, self.ranks.told.num_pages
            shortest = striped_from(config, self.spec, costs, hidden_size, pages)
            self.scheduler.use_costs(costs, shortest, weights_of(config, costs))

        fingerprint = None if self.tiers is None else self.tiers.fingerprint
        start = Start(config, self.spec, num_pages, None, fingerprint, self.adapters.told, draft=told_of_draft)
        known = gpu_costs(config, self.spec, [gpu.name for gpu in gpus])
        self.ranks = Ranks(start, model, launcher, use, known)
        """The ranks, and the means to start new ones."""
        self.restarts = self.ranks.restarts
        """Record of the replacements of lost ranks."""
        try:
            self.executor = self.ranks.start()
            """Executor of the ranks; replaced after a loss."""
        except BaseException:
            if self.tiers is not None:
                self.tiers.close()
            raise

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        constraint: Constraint | None = None,
        page_hashes: list[bytes] | None = None,
        adapter: Adapter | None = None,
    ) -> Request:
        """Queue a request.

        Args:
            prompt_token_ids, params, constraint, page_hashes: as for `Scheduler.add_request`.
            adapter: one of `adapters`, which it is continued with; None for the model alone.

        Raises:
            ConfigError, CapacityError: as in `Scheduler.add_request`; the adapter was unloaded meanwhile.
            BaseException: what made the ranks fail for good.
        """
        if self.ranks.failure is not None:
            raise self.ranks.failure
        self.adapters.check(adapter)
        return self.scheduler.add_request(
            prompt_token_ids, params, constraint=constraint, page_hashes=page_hashes, adapter=adapter
        )

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request early, for example because its text holds a stop string."""
        self.scheduler.finish(request, reason)

    def abort(self, request: Request) -> None:
        """End a request that its client no longer wants, in flight or not. `step` does not return it again."""
        if self.ranks.failure is None:
            self.scheduler.cancel(request)

    @property
    def failure(self) -> BaseException | None:
        """Why the ranks are lost, idle ones included, until `recover` replaces them; None while they run."""
        return self.ranks.failure or self._lost or self.executor.failure

    @property
    def choices(self) -> StrategyChoices:
        """Strategies that were chosen so far, and why."""
        return self.scheduler.writer.choices

    @property
    def state_parts(self) -> Sequence[PartsNote]:
        """In how many parts states of recurrent layers were handed on so far, and why."""
        return self.scheduler.writer.state_parts.all

    @property
    def strategy_counts(self) -> dict[str, int]:
        """(plan, KV group) pairs per strategy."""
        return self.choices.steps_per_strategy()

    @property
    def has_requests(self) -> bool:
        """Whether any request has not ended."""
        return self.scheduler.has_requests

    def step(
        self, *, meanwhile: Callable[[], None] | None = None, on_loss: Callable[[], None] | None = None
    ) -> list[Request]:
        """Submit what can run, wait until a plan ends, and take in all that have ended.

        If the ranks are lost, take in the plans that ended before; if there are none, replace the ranks. Without a
        request, wait for `wake`.

        Args:
            meanwhile: called before the wait, when the ranks have their work, or are lost.
            on_loss: called before lost ranks are replaced.

        Returns:
            The requests that advanced; after a loss, those that `recover` returns.

        Raises:
            WorkerError: workers died or failed too often; the engine cannot be used any more.
        """
        is_lost = self.failure is not None
        if not is_lost:
            with deferred_interrupt():
                self.submit_plans()
            assert self.in_flight or self.tiers or not self.has_requests, "requests wait, but no plan runs"
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
            advanced = self.take_in(self.in_flight.ended())
            if self.tiers is not None:
                advanced = list(dict.fromkeys([*advanced, *self.tiers.take_in(self.scheduler)]))
            self._drop_adapters()
            return advanced

    # -- adapters ----------------------------------------------------------------------------------------------------

    def begin_load_adapter(self, adapter: Adapter) -> AdapterLoad:
        """Let the ranks load an adapter that `adapters.read` has checked; `end_load_adapter` comes behind it.

        Raises:
            ConfigError: its name is taken.
            BaseException: what made the ranks fail for good.
        """
        if self.ranks.failure is not None:
            raise self.ranks.failure
        return self.adapters.begin_load(adapter, self.executor)

    def end_load_adapter(self, load: AdapterLoad) -> None:
        """Take in that ranks have loaded an adapter: requests may name it.

        Raises:
            ConfigError: a rank could not.
            LongspanError: the ranks were lost meanwhile.
        """
        self.adapters.end_load(load, self.executor)
        self.ranks.tell_adapters(self.adapters.told)

    def load_adapter(self, name: str, directory: str) -> None:
        """Load an adapter, and wait until requests may name it.

        Raises:
            ConfigError: the name is illegal or taken, or the files are not those of an adapter of this model.
            LongspanError: the ranks were lost meanwhile.
        """
        adapter = self.adapters.read(name, directory, name_field="lora_name", field="lora_path")
        load = self.begin_load_adapter(adapter)
        wait([load.loaded])
        self.end_load_adapter(load)

    def unload_adapter(self, name: str) -> None:
        """Let no more requests name an adapter; ranks let it go when those that run have ended.

        Raises:
            ConfigError: there is none of this name.
        """
        self.adapters.retire(name)
        self._drop_adapters()

    def _drop_adapters(self) -> None:
        if self.adapters.drop_unused(self.scheduler.requests.values, self.executor):
            self.ranks.tell_adapters(self.adapters.told)

    # -- steps -------------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """End the wait of the current `step`, or else of the next one. Any thread may call it."""
        self.in_flight.wake()

    def submit_plans(self) -> int:
        """Submit all plans that can start now; return their number.

        Raises:
            BaseException: what made the ranks fail for good.
        """
        if self.ranks.failure is not None:
            raise self.ranks.failure
        self._drop_adapters()
        num_plans = 0
        if self.tiers is not None:
            self.tiers.tell(self.scheduler)
        while True:
            plan = self._next_plan()
            if self.tiers is not None:
                self.tiers.send(self.scheduler, self.executor)
            if plan is None:
                return num_plans
            self.in_flight.add(self.executor.submit(plan))
            num_plans += 1

    def _next_plan(self) -> Plan | None:
        """The next plan of either model, or None when nothing can start now. Drafts first: requests wait for them."""
        if self.drafts is not None:
            if (plan := self.drafts.schedule()) is not None:
                return plan
            self.scheduler.take_drafts(self.drafts.release())
        return self.scheduler.schedule()

    def take_in(self, done: Iterable[Future[PlanResult]]) -> list[Request]:
        """Hand results to the scheduler. A failed plan sets `failure`; results of replaced ranks are ignored.

        Returns:
            The requests that advanced and were not aborted meanwhile, each once, even if two plans advanced it.
        """
        advanced: dict[Request, None] = {}
        results: list[PlanResult] = []
        for future in done:
            if not self.in_flight.remove(future):
                continue  # its ranks were lost, and replaced meanwhile
            error = future.exception()
            if error is None:
                results.append(future.result())
            else:
                self._lost = self._lost or error
        results.sort(key=lambda result: result.plan_id)  # one may be queued behind another
        if self.drafts is not None:
            for result in results:
                if is_draft_plan(result.plan_id):
                    self.drafts.update(result)
            results = [result for result in results if not is_draft_plan(result.plan_id)]
        for result in results:
            self._work.note(result.ranks)
            advanced.update(dict.fromkeys(self.scheduler.update(result)))
        self._num_unchecked += len(results)
        check_every = self.config.check_invariants
        if results and check_every and (self._num_unchecked >= check_every or not self.has_requests):
            self._num_unchecked = 0
            try:
                check_books(self.scheduler)
                if self.drafts is not None:
                    check_books(self.drafts.scheduler)
            except AssertionError as broken:
                self.ranks.fail(broken)  # no token of these ranks can be trusted
                raise
        return list(advanced)

    def recover(self) -> list[Request]:
        """Replace ranks that were lost: end what is left of them, start new ones, and restart the requests that ran.

        Blocks until the new ranks are ready, or `give_up` is called. If it is interrupted, it may be called again.

        Returns:
            The requests that plans finished before the loss have advanced, and, with a `finish_reason`, those that seem
            to cause the losses or that fewer ranks cannot hold.

        Raises:
            BaseException: what made the ranks fail, if they are not replaced; the engine cannot be used any more.
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
            if self.tiers is not None:
                self.tiers.lose_ranks()
            self.scheduler.restart()
            self._recovered += fail_poison(self.scheduler, cause)
            self._work.lose_ranks()
        self.executor = self.ranks.start(self._lose_rank)
        if self.drafts is not None and self.ranks.told.draft is not None:
            self.drafts.begin_again(draft_scheduler(self.ranks.told.draft))
        self.restarts.note_ready(time.monotonic() - self._recovery_began_s, len(self.scheduler.waiting))
        recovered, self._recovered = list(dict.fromkeys(self._recovered)), []
        self._lost = self._recovery_began_s = None
        return recovered

    def _lose_rank(self, config: EngineConfig) -> None:
        """Go on with one rank less, and the options for the ranks that are left."""
        scheduler = Scheduler(self.spec, config, self.ranks.told.num_pages)
        scheduler.take_over(self.scheduler)
        self.config, self.scheduler = config, scheduler  # at once, as other threads read the totals
        self._recovered += fail_unfit(self.scheduler)

    # -- state, which any thread may read ----------------------------------------------------------------------------

    def capacity(self) -> Capacity:
        """Return what the ranks can hold."""
        num_pages = self.ranks.told.num_pages
        unbounded = [i for i, group in enumerate(self.spec.kv_groups) if group.spec.reach is None] or [0]
        pages_per_rank = tuple([min(of_rank[i] for i in unbounded) for of_rank in num_pages])
        return Capacity(self.config.context_parallel_size, self.config.page_size, pages_per_rank)

    def check_fits(self, prompt_len: int, max_tokens: int) -> None:
        """Refuse a request that would not fit even on empty ranks.

        Raises:
            CapacityError: says what would fit.
        """
        self.scheduler.memory.placer.check_fits(prompt_len, max_tokens)

    def stats(self) -> EngineStats:
        """Return what the engine is doing and has done."""
        scheduler, memory, restarts = self.scheduler, self.scheduler.memory, self.restarts
        ranks, num_groups = self.rank_stats(), len(self.spec.kv_groups)
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_pages_used=tuple(sum(group.num_used for group in pools[:num_groups]) for pools in memory.allocators),
            kv_pages_total=tuple(rank.kv_pages_total for rank in ranks),
            state_slots_used=tuple(sum(pool.num_used for pool in pools[num_groups:]) for pools in memory.allocators),
            state_slots_total=tuple(rank.state_slots_total for rank in ranks),
            busy_s=tuple(rank.busy_s for rank in ranks),
            tokens_computed=tuple(rank.tokens_computed for rank in ranks),
            rank_shares=tuple(rank.share for rank in ranks),
            steps_per_strategy=self.strategy_counts,
            bytes_per_strategy=self._work.bytes_per_strategy(),
            num_preemptions=scheduler.num_preemptions,
            prefix_queries_tokens=memory.num_queried_tokens,
            prefix_hit_tokens=memory.num_hit_tokens,
            num_drafted=scheduler.drafting.num_drafted,
            num_accepted_drafts=scheduler.drafting.num_accepted,
            num_rejected_drafts=scheduler.drafting.num_rejected,
            num_restarts=restarts.num_done,
            recovery_s=restarts.total_s,
            last_recovery_s=restarts.last_s,
            tiers={} if memory.tiers is None else tier_stats(memory.tiers),
        )

    def rank_stats(self) -> list[RankStats]:
        """Return what every rank holds and has done."""
        stats: list[RankStats] = []
        done, memory = self._work.per_rank(), self.scheduler.memory
        shares = memory.placer.geometry.rank_shares
        for rank, (pools, share) in enumerate(zip(memory.allocators, shares, strict=True)):
            last = done.get(rank)
            allocators, slots = pools[: len(self.spec.kv_groups)], pools[len(self.spec.kv_groups) :]
            stats.append(
                RankStats(
                    rank=rank,
                    share=share,
                    kv_pages_used=sum(allocator.peak_used for allocator in allocators),
                    kv_pages_total=sum(allocator.num_pages for allocator in allocators),
                    kv_bytes=self.config.tensor_parallel_size
                    * sum(
                        allocator.peak_used * group.page_bytes(self.config.page_size)
                        for allocator, group in zip(allocators, self.spec.kv_groups, strict=True)
                    )
                    + sum(pool.peak_used * self.spec.state_bytes for pool in slots),
                    state_slots_used=sum(pool.peak_used for pool in slots),
                    state_slots_total=sum(pool.num_pages for pool in slots),
                    tokens_computed=last.tokens_computed if last else 0,
                    bytes_sent=last.bytes_sent if last else 0,
                    busy_s=last.busy_s if last else 0.0,
                )
            )
        return stats

    # -- the end -----------------------------------------------------------------------------------------------------

    def give_up(self) -> None:
        """Stop waiting for new ranks, so that `recover` raises. Any thread may call it."""
        self.ranks.give_up()

    def close(self) -> None:
        """End the ranks, when what they computed is on disk if it is to be. May be called twice."""
        tiers, self.tiers = self.tiers, None
        if tiers is not None:
            if self.failure is None:
                tiers.flush(self.scheduler, self.executor)
            tiers.close()
        self.ranks.close()
