"""The scheduler: decides once, for all ranks, what the next step computes.

Holds the queues. Must not know torch, processes, text or clocks: the same calls give the same plans.
Read next: `longspan.policy.choose`, which picks strategies; `longspan.engine.engine`, which drives this.

Note: lanes
    A plan names its ranks, and plans on disjoint ranks run at the same time. `schedule` therefore returns plans until
    no request's ranks are all idle. A request that must wait for a busy rank claims its other ranks, so that a stream
    of requests on single ranks cannot starve one that needs several.
"""

import secrets
from collections import deque
from collections.abc import Sequence

from longspan.config import EngineConfig
from longspan.errors import ConfigError
from longspan.plan.types import (
    Literals,
    Plan,
    PlanResult,
    QueryRun,
    SampleRow,
    ScoreRun,
    TableDelta,
)
from longspan.policy.choose import plan_group
from longspan.scheduler.memory import KVMemory
from longspan.scheduler.request import Constraint, Request
from longspan.types import FinishReason, ModelSpec, Phase, SamplingParams

MAX_SCORED_TOKENS = 512
"""Most prompt tokens per rank and step of a request with `prompt_logprobs`: each needs a row of logits as wide as the
vocabulary."""


class Scheduler:
    """Continuous batching: first come first served at admission, then prefill and decode take turns.

    So no request starves, and a token waits for one chunk of prefill per rank at most, however long a prompt is and
    however many wait.
    """

    def __init__(self, model: ModelSpec, config: EngineConfig, num_pages: Sequence[int]) -> None:
        """Args: `num_pages` per KV group, the same on every rank."""
        self.model, self.config = model, config
        self.memory = KVMemory(model, config, num_pages)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._by_id: dict[int, Request] = {}
        self._busy: set[int] = set()
        self._in_flight: dict[int, tuple[Plan, list[Request]]] = {}
        self._unreported: dict[int, set[int]] = {rank: set() for rank in range(config.context_parallel_size)}
        self._last_prefill = [-1] * config.context_parallel_size  # per rank, plan id of the last prefill
        self._next_plan_id = 0
        self._next_request_id = 0
        self._can_slide_away = all(group.spec.window is not None for group in model.kv_groups)

    # -- requests ----------------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        constraint: Constraint | None = None,
        is_checked: bool = False,
    ) -> Request:
        """Queue a request.

        Args:
            prompt_token_ids: the prompt.
            params: how to continue it.
            constraint: which tokens are allowed next, or None.
            is_checked: `check_request` has admitted it already.

        Raises:
            ConfigError: the prompt is empty, too long for the model, or holds a token that it does not know.
            CapacityError: it would not fit even on empty ranks.
        """
        prompt = list(prompt_token_ids)
        if not is_checked:
            self.check_request(prompt, params)
        request = Request(
            request_id=self._next_request_id,
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            token_ids=prompt,
            prompt_len=len(prompt),
            eos_token_ids=() if params.ignore_eos else self.model.eos_token_ids,
            constraint=constraint,
        )
        self._next_request_id += 1
        self._by_id[request.request_id] = request
        self.waiting.append(request)
        return request

    def check_request(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Refuse a request that can never run. Reads only what never changes: any thread may call it.

        Raises:
            ConfigError: the prompt is empty, too long for the model, or holds a token that it does not know.
            CapacityError: it would not fit even on empty ranks.
        """
        if not prompt:
            raise ConfigError("prompt: got no tokens, legal is at least one")
        for token_id in (min(prompt), max(prompt), *params.stop_token_ids):
            if not 0 <= token_id < self.model.vocab_size:
                raise ConfigError(f"token id: got {token_id}, legal is 0 to {self.model.vocab_size - 1}")
        limit = self.model.max_position
        if limit is not None and len(prompt) + params.max_tokens > limit:
            total = len(prompt) + params.max_tokens
            raise ConfigError(
                f"prompt + max_tokens: got {len(prompt)} + {params.max_tokens} = {total} tokens, legal is at most "
                f"{limit} (max_position_embeddings of the model)"
            )
        self.memory.check_fits(len(prompt), params.max_tokens)

    @property
    def has_requests(self) -> bool:
        """Whether any request has not ended."""
        return bool(self.waiting or self.running)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request that is not in flight, whatever its state, and free its pages."""
        assert not request.in_flight
        request.finish_reason = reason
        self._by_id.pop(request.request_id, None)
        if request in self.waiting:
            self.waiting.remove(request)
            return
        self.running.remove(request)
        self.memory.free(request)
        for rank in request.involved_ranks:
            self._unreported[rank].add(request.request_id)

    # -- plans -------------------------------------------------------------------------------------------------------

    def schedule(self) -> Plan | None:
        """The next plan to submit, or None when nothing can start now."""
        while self.waiting and len(self.running) < self.config.max_num_seqs and self.memory.admit(self.waiting[0]):
            self.waiting[0].last_plan_id = self._next_plan_id - 1  # waits from now on; -1 would overtake all others
            self.running.append(self.waiting.popleft())
        num_ranks = self.config.context_parallel_size
        taken = set(self._busy)
        # Of equal turns prefill first, then whoever waited longest, then whoever needs most ranks.
        ready = sorted(
            (request for request in self.running if not request.in_flight),
            key=lambda r: (
                self._turn(r, num_ranks),
                r.phase is Phase.DECODE,
                r.last_plan_id,
                -len(self._ranks(r, num_ranks)),
            ),
        )
        for lead in ready:
            ranks = self._ranks(lead, num_ranks)
            if ranks & taken:
                taken |= ranks
                continue
            return self._make_plan(lead.phase, ranks, [lead, *(r for r in ready if r is not lead)])
        return None

    def _turn(self, request: Request, num_ranks: int) -> int:
        """Since which plan a request waits for its turn; the lowest is next.

        Prefill waits as a queue: a rank that ran another prompt's chunk since has given prefill its turn.
        """
        if request.phase is Phase.DECODE:
            return request.last_plan_id
        return max(request.last_plan_id, min(self._last_prefill[rank] for rank in self._ranks(request, num_ranks)))

    def _ranks(self, request: Request, num_ranks: int) -> set[int]:
        """Ranks that a request's next step may involve."""
        budget = [self.config.max_num_batched_tokens] * num_ranks
        start, end = request.num_computed, self._chunk_end(request, budget)
        if self._can_slide_away:
            start = max(0, start - max(group.spec.window or 0 for group in self.model.kv_groups) + 1)
        else:
            start = 0
        return {rank for rank, _, _ in request.ranks_of(start, end, self.config.page_size)}

    def _chunk_end(self, request: Request, budget: Sequence[int]) -> int:
        """How far a request's next step goes: until some rank's token budget is spent."""
        if request.phase is Phase.DECODE:
            (owner, _, _), *_ = request.ranks_of(request.num_computed, request.num_computed + 1, self.config.page_size)
            return request.num_computed + (1 if budget[owner] else 0)
        left = list(budget)
        if len({rank for rank, _ in request.page_ranks}) > 1:
            left = [min(tokens, self.memory.striped_tokens_per_rank) for tokens in left]
        if request.params.prompt_logprobs is not None:
            left = [min(tokens, MAX_SCORED_TOKENS) for tokens in left]
        end = request.num_computed
        for rank, start, stop in request.ranks_of(end, request.prompt_len, self.config.page_size):
            taken = min(stop - start, left[rank])
            left[rank] -= taken
            end += taken
            if start + taken < stop:
                break
        return end

    def _make_plan(self, phase: Phase, ranks: set[int], candidates: Sequence[Request]) -> Plan:
        """Fill a plan with all candidates of one phase that fit its ranks and their budgets."""
        plan_id = self._next_plan_id
        self._next_plan_id += 1
        budget = [self.config.max_num_batched_tokens] * self.config.context_parallel_size
        chosen: list[Request] = []
        query_runs: list[QueryRun] = []
        deltas: list[TableDelta] = []
        samples: list[SampleRow] = []
        scores: list[ScoreRun] = []
        for request in candidates:
            if request.phase is not phase or not self._ranks(request, len(budget)) <= ranks:
                continue
            start, end = request.num_computed, self._chunk_end(request, budget)
            if start == end:
                continue
            deltas += self._deltas(request, end, ranks)
            for rank, first, last in request.tables[0].owners(start, end):
                query_runs.append(
                    QueryRun(
                        request.request_id, first, last - first, rank, Literals(tuple(request.token_ids[first:last]))
                    )
                )
                budget[rank] -= last - first
            samples += self._samples(request, end)
            scores += self._scores(request, start, end)
            request.in_flight, request.last_plan_id = True, plan_id
            chosen.append(request)
        forced = self.config.forced_strategy if phase is Phase.PREFILL else self.config.forced_decode_strategy
        groups = tuple(
            plan_group(query_runs, {r.request_id: r.tables[i] for r in chosen}, group, forced=forced)
            for i, group in enumerate(self.model.kv_groups)
        )
        released: set[int] = set()
        for rank in ranks:
            released |= self._unreported[rank]
            self._unreported[rank].clear()
        plan = Plan(
            plan_id=plan_id,
            phase=phase,
            ranks=tuple(sorted(ranks)),
            query_runs=tuple(query_runs),
            table_deltas=tuple(deltas),
            groups=groups,
            samples=tuple(samples),
            scores=tuple(scores),
            released=tuple(sorted(released)),
        )
        if phase is Phase.PREFILL:
            for rank in ranks:
                self._last_prefill[rank] = plan_id
        self._busy |= ranks
        self._in_flight[plan_id] = (plan, chosen)
        return plan

    def _deltas(self, request: Request, end: int, ranks: set[int]) -> list[TableDelta]:
        """Allocate what a step needs, and say what the ranks must learn of the page tables."""
        size = self.config.page_size
        added = self.memory.grow(request, end)
        replace = not ranks <= request.informed_ranks
        if replace:
            request.informed_ranks |= ranks
            request.involved_ranks |= ranks
            added = [list(table.runs) for table in request.tables]
        deltas: list[TableDelta] = []
        for group_idx, (table, runs) in enumerate(zip(request.tables, added, strict=True)):
            if runs or replace:
                freed_before = table.runs[0].page_idx if table.runs else table.num_pages
                deltas.append(TableDelta(request.request_id, group_idx, replace, tuple(runs), freed_before))
                request.informed_ranks &= ranks  # the others miss this one
        assert all(table.num_pages * size >= end for table in request.tables)
        return deltas

    def _samples(self, request: Request, end: int) -> list[SampleRow]:
        """The row to sample from, if this step computes the request's last known token."""
        if end < len(request.token_ids):
            return []
        params = request.params
        return [
            SampleRow(
                request_id=request.request_id,
                position=end - 1,
                temperature=float(params.temperature),
                top_p=float(params.top_p),
                top_k=params.top_k,
                min_p=float(params.min_p),
                seed=request.seed,
                num_logprobs=params.logprobs,
                banned_token_ids=request.banned_token_ids(),
            )
        ]

    def _scores(self, request: Request, start: int, end: int) -> list[ScoreRun]:
        """Prompt rows whose next token is a prompt token, if prompt_logprobs were asked for."""
        num_logprobs = request.params.prompt_logprobs
        end = min(end, request.prompt_len - 1)
        if num_logprobs is None or start >= end:
            return []
        return [
            ScoreRun(request.request_id, first, tuple(request.token_ids[first + 1 : last + 1]), num_logprobs)
            for _, first, last in request.tables[0].owners(start, end)
        ]

    # -- results -----------------------------------------------------------------------------------------------------

    def update(self, result: PlanResult) -> list[Request]:
        """Take in what a plan's ranks answered.

        Returns:
            The requests that the plan advanced. Those with a `finish_reason` have ended; `finish` has been called.
        """
        plan, requests = self._in_flight.pop(result.plan_id)
        self._busy -= set(plan.ranks)
        computed = {run.request_id: run.end for run in plan.query_runs}
        for request in requests:
            request.in_flight = False
            request.num_computed = max(request.num_computed, computed[request.request_id])
        for rank_result in result.ranks:
            for sampled in rank_result.sampled:
                self._by_id[sampled.request_id].add_token(sampled.token_id, sampled.logprobs)
        scored = sorted((run for r in result.ranks for run in r.scored), key=lambda run: (run.request_id, run.position))
        for run in scored:
            self._by_id[run.request_id].prompt_logprobs.extend(run.logprobs)
        for request in requests:
            if request.finish_reason is not None:
                self.finish(request, request.finish_reason)
            else:
                self.memory.slide(request)
        return requests
