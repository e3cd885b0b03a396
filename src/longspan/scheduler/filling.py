"""What a step computes: which of the ready requests, and how far each of them goes.

Holds the budgets of a step. Must not know queues, pages or the plan's parts.
Read next: Note [What a step mixes] in `longspan.scheduler.scheduler`; `longspan.scheduler.chunks`, which cuts prompts.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from longspan.config import EngineConfig
from longspan.plan.types import Plan
from longspan.scheduler.chunks import Chunks
from longspan.scheduler.request import Request
from longspan.scheduler.turns import Turn
from longspan.types import Phase


class ChosenStep(NamedTuple):
    """A step that is decided, and not written yet."""

    ranks: AbstractSet[int]
    """Ranks that run it."""
    chosen: Sequence[tuple[Request, int]]
    """(request, end): every request that it computes, and how far."""
    movers: Phase | None
    """Phase of requests with keys on several ranks; None if there is none."""
    flops: float = 0.0
    """Of the busiest rank (`Chunks.busiest`), where steps are timed."""
    behind: Plan | None = None
    """The plan that samples its tokens; None if they are known."""


def fill_step(
    lead: Turn, ready: Sequence[Turn], config: EngineConfig, chunks: Chunks, running: Sequence[Request]
) -> ChosenStep:
    """Fill a step with all requests that fit its ranks, their budgets, and what moves.

    Args:
        lead: has a place for certain; the step's ranks are its ranks.
        ready: every request that may take part, in the order of their turns.
        config: of the engine.
        chunks: cuts prompts.
        running: all requests with pages, those that may not take part too.
    """
    repeated = _again(lead, ready, config.page_size)
    if repeated is not None:
        return repeated
    ranks, size, most = lead.ranks, config.context_parallel_size, config.max_num_batched_tokens
    # However many decode, a lead that prefills gets on by a page, or by half of a smaller budget.
    reserved = min(config.page_size, (most + 1) // 2) if not lead.is_decode else 0
    budget = [most - reserved] * size
    # Decodes alone are never cut by time, and nothing is learnt from them.
    is_timed = config.max_step_ms is not None and any(not other.is_decode and other.ranks <= ranks for other in ready)
    flops = [0.0] * size
    # Also one that is computed again after it was preempted, whose user waits for its next token.
    is_awaited = is_timed and any(request.num_generated for request in running)
    movers = lead.request.phase if len(ranks) > 1 else None  # the phase of all requests that move something
    chosen: list[tuple[Request, int]] = []
    # Decodes first, they are small; the lead before all others of its phase.
    for other in sorted(ready, key=lambda other: (not other.is_decode, other is not lead)):
        request, allocation = other.request, other.request.allocation
        assert allocation is not None
        if not other.ranks <= ranks or (allocation.copies and other is not lead):
            continue
        if len(other.ranks) > 1:
            if movers not in (None, request.phase):
                continue
            movers = request.phase
        if other is lead:
            budget = [tokens + reserved for tokens in budget]
        end = chunks.end(request, budget)
        if is_timed and not other.is_decode:
            end = chunks.end_in_time(request, end, flops, is_lead=other is lead, is_awaited=is_awaited)
        if end == request.num_computed:
            continue
        for rank, work in chunks.work(request, end).items() if is_timed else ():
            flops[rank] += work
        for rank, start, stop in allocation.ranks_of(request.num_computed, end):
            budget[rank] -= stop - start
        chosen.append((request, end))
    return ChosenStep(ranks, chosen, movers, chunks.busiest(flops) if is_timed else 0.0)


def _again(lead: Turn, ready: Sequence[Turn], page_size: int) -> ChosenStep | None:
    """The step that takes the decodes of the last one a token further, if they are all that is ready.

    They fitted together before, and their tokens go where those before them went. They stay in the order of that plan.
    """
    step, ranks = lead.request.delivery.last_step, lead.ranks
    if step is None or len(step.requests) != len(ready):
        return None
    stays = len(ranks) == 1
    for turn in ready:
        request = turn.request
        if request.delivery.last_step is not step or not (stays or request.num_computed % page_size):
            return None
    chosen = [(request, request.num_computed + 1) for request in step.requests]  # the ready ones: there are as many
    return ChosenStep(ranks, chosen, None if stays else Phase.DECODE)
