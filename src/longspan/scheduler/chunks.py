"""How far a request goes in one step, and on which ranks: token budgets, balance over ranks, and predicted time.

Holds the cutting of prompts. Must not know which requests share a step, or plans.
Read next: `longspan.costmodel.step_time`, which predicts; `longspan.scheduler.scheduler`, which asks.
"""

import operator
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from longspan.config import EngineConfig
from longspan.costmodel.step_time import StepTime
from longspan.plan.types import QueryRun
from longspan.scheduler.allocation import Allocation
from longspan.scheduler.request import Request
from longspan.sharding.geometry import StepGeometry
from longspan.types import Phase

MAX_SCORED_TOKENS = 512
"""Most prompt tokens per rank and step of a request with `prompt_logprobs`: each needs a row of logits as wide as the
vocabulary."""


ENDING_FACTOR = 4
"""Longest time of a step with prompts that end in it, as a multiple of `max_step_ms`, while no request waits for its
next token."""


class Chunks:
    """Cuts the prompts of one scheduler."""

    def __init__(self, config: EngineConfig, geometry: StepGeometry, step_time: StepTime) -> None:
        """Keep what chunks are cut by.

        Args:
            config: of the engine.
            geometry: how prompts are striped.
            step_time: what a step takes.
        """
        self._config, self._geometry, self._step_time = config, geometry, step_time
        self._full_budget = (config.max_num_batched_tokens,) * config.context_parallel_size

    def use_geometry(self, geometry: StepGeometry) -> None:
        """Cut prompts that are striped in another way from now on."""
        self._geometry = geometry

    def busiest(self, flops: Sequence[float]) -> float:
        """Flops that the fastest rank would do in the time of a step with these, one number per rank."""
        return max(work / share for work, share in zip(flops, self._geometry.relative_shares, strict=True))

    def flops_of(self, runs: Sequence[QueryRun]) -> float:
        """Flops of the busiest rank in a step that computes these runs, as `busiest` counts them."""
        work = [0.0] * self._config.context_parallel_size
        for run in runs:
            work[run.compute_rank] += self._step_time.chunk_flops(run.position, run.end)
        return self.busiest(work)

    def ranks(self, request: Request, end: int) -> AbstractSet[int]:
        """Ranks that a step up to `end` may involve: those with a key that it may see, or a page to copy."""
        allocation = request.allocation
        assert allocation is not None
        start = self._step_time.first_key(request.num_planned)
        if start == 0 and end >= len(request.token_ids):
            ranks: AbstractSet[int] = allocation.ranks
        else:
            ranks = allocation.ranks_with(start, end)
        sources = allocation.source_ranks
        return ranks if sources <= ranks else ranks | sources

    def next_ranks(self, request: Request, allocation: Allocation) -> AbstractSet[int]:
        """Ranks that a request's next step may involve, if it has the whole token budget."""
        if len(allocation.page_ranks) == 1:
            sources = allocation.source_ranks
            if not sources or sources <= allocation.ranks:
                return allocation.ranks
        end = len(request.token_ids) if request.phase is Phase.DECODE else self.end(request, self._full_budget)
        return self.ranks(request, end)

    def end(self, request: Request, budget: Sequence[int]) -> int:
        """How far a request's next step goes: until some rank's token budget is spent."""
        allocation = request.allocation
        assert allocation is not None
        if request.phase is Phase.DECODE:
            return request.num_computed + (1 if budget[allocation.rank_at(request.num_computed)] else 0)
        left = list(budget)
        is_striped = len(allocation.page_ranks) > 1
        if is_striped:
            left = [min(tokens, most) for tokens, most in zip(left, self._geometry.tokens_per_rank, strict=True)]
        if request.params.prompt_logprobs is not None:
            left = [min(tokens, MAX_SCORED_TOKENS) for tokens in left]
        end = request.num_computed
        for rank, start, stop in allocation.ranks_of(end, len(request.token_ids)):
            taken = min(stop - start, left[rank])
            left[rank] -= taken
            end += taken
            if start + taken < stop:
                break
        if is_striped and any(map(operator.lt, budget, self._geometry.tokens_per_rank)):  # decodes took some of it
            return self._balanced_end(request.num_computed, allocation, end)
        return end

    def _balanced_end(self, start: int, allocation: Allocation, end: int) -> int:
        """Round a chunk's end down to where snake order has come round, or at least to where a stripe ends, so that
        the ranks share the work of this chunk and the next."""
        size, num_ranks, geometry = allocation.page_size, len(allocation.ranks), self._geometry
        stripe = geometry.stripe_len if num_ranks > 1 else size
        whole = geometry.pass_len if num_ranks == geometry.num_ranks > 1 else num_ranks * stripe
        origin = allocation.num_hit_pages * size
        for unit in (2 * whole, whole, stripe, size):
            rounded = origin + (end - origin) // unit * unit
            if rounded > start:
                return rounded
        return end

    def work(self, request: Request, end: int) -> dict[int, float]:
        """Flops per rank of a step that takes a request to `end`."""
        allocation = request.allocation
        assert allocation is not None
        return self._work(request.num_computed, allocation, end, self._key_shares(request, allocation))

    def _work(self, start: int, allocation: Allocation, end: int, key_shares: Mapping[int, float]) -> dict[int, float]:
        """A rank has the flops of the tokens that it computes, but where queries move those of its share of keys."""
        work: dict[int, float] = {}
        for rank, first, last in allocation.ranks_of(start, end):
            dense_flops = (last - first) * self._step_time.token_flops
            flops = dense_flops if key_shares else self._step_time.chunk_flops(first, last)
            work[rank] = work.get(rank, 0.0) + flops
        if key_shares:
            attention_flops = self._step_time.attention_flops(start, end)
            for rank, share in key_shares.items():
                work[rank] = work.get(rank, 0.0) + share * attention_flops
        return work

    def _key_shares(self, request: Request, allocation: Allocation) -> dict[int, float]:
        """Share of the next step's keys per rank if its queries are expected to move, as those of the last step did.

        A short chunk behind a long context has few owners, often one: they do not compute its attention alone.
        """
        if not request.delivery.moves_queries:
            return {}
        first = self._step_time.first_key(request.num_computed)
        held: dict[int, int] = {}
        for rank, start, end in allocation.ranks_of(first, request.num_computed + 1):
            held[rank] = held.get(rank, 0) + end - start
        return {rank: num_keys / (request.num_computed + 1 - first) for rank, num_keys in held.items()}

    def end_in_time(self, request: Request, end: int, done: Sequence[float], *, is_lead: bool, is_awaited: bool) -> int:
        """The end of a chunk with which the step is predicted to take no longer than `max_step_ms` on any rank.

        A lead goes on by a page anyway, others not at all where even that would be too much. While no request waits for
        its next token, a prompt that ends with the chunk may make the step `ENDING_FACTOR` times as long: every step
        reads all weights, so that short prompts in one long step are done sooner than in many short ones.

        Args:
            request: one whose prompt is computed.
            end: how far it may go.
            done: flops of each rank that the step has already.
            is_lead: whether the step is made for this request.
            is_awaited: whether some request waits for its next token.
        """
        allocation = request.allocation
        assert allocation is not None
        start, size = request.num_computed, allocation.page_size
        key_shares = self._key_shares(request, allocation)
        # Of the fastest rank; ranks are as fast as their shares say.
        step_flops = self._step_time.flops_within((self._config.max_step_ms or 0) * 1e-3)
        shares = self._geometry.relative_shares

        def fits(end: int, factor: int = 1) -> bool:
            work = self._work(start, allocation, end, key_shares)
            return all(done[rank] + flops <= factor * step_flops * shares[rank] for rank, flops in work.items())

        if not is_awaited and end == len(request.token_ids) and fits(end, ENDING_FACTOR):
            return end
        if end == start or fits(end):
            return end
        low, high = start, end  # low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        one_page = min(end, (start // size + 1) * size)
        if low <= one_page:
            return one_page if is_lead or low == one_page else start
        return self._balanced_end(start, allocation, low)
