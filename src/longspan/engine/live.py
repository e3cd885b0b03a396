"""Snapshot of an engine for people who watch it: which request holds which pages, and how far each one is.

Holds frozen data, and how it is taken, by the engine's thread between two steps. What is copied there is copied by
reference or in slices: cells, colours and estimates are made elsewhere. Must not know how it is shown.
Read next: `longspan.server.live`, which shows it; `longspan.engine.stats`, the numbers without places.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from longspan.costmodel.explain import StrategyChoice
from longspan.engine.engine import Engine
from longspan.engine.stats import EngineStats
from longspan.scheduler.request import Request
from longspan.sharding.pages import PageRun

MAX_WAITING = 100
"""Most waiting requests that a snapshot describes."""

MAX_STRIPES = 64
"""Most runs of a placement that a snapshot describes per request."""


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """State of one request that has not ended."""

    request_id: int
    prompt_len: int
    num_computed: int
    """Tokens whose KV is stored."""
    num_cached: int
    """Prompt tokens whose KV was found in the prefix cache."""
    num_generated: int
    max_tokens: int
    num_preemptions: int
    since_start_s: float | None
    """Seconds since the request's first plan was submitted; None before."""
    pages: Sequence[PageRun]
    """Places of its pages in the KV group of the snapshot."""
    stripes: Sequence[tuple[int, int]]
    """First (rank, pages) runs of its placement, in sequence order, those that have no slot yet included."""
    num_stripes: int
    """Runs of its placement in all."""


@dataclass(frozen=True, slots=True)
class LiveSnapshot:
    """State of an engine between two steps."""

    stats: EngineStats
    running: Sequence[LiveRequest]
    waiting: Sequence[LiveRequest]
    """The first ones of those that wait; `stats` has their number."""
    group_idx: int
    """KV group whose pages are described: one that keeps all tokens, if there is one."""
    num_pages: Sequence[int]
    """Pages of that group per rank."""
    num_used: Sequence[int]
    """Pages of that group in use per rank; idle ones of the prefix cache do not count."""
    free_slots: Sequence[Sequence[tuple[int, int]]]
    """[rank]: free slots of that group as runs [first, end), ascending."""
    choices: Sequence[StrategyChoice]
    """Strategies chosen so far, and why."""


def take_snapshot(engine: Engine, since_start_s: Callable[[int], float | None]) -> LiveSnapshot:
    """Take a snapshot. Only the thread that drives the engine may call it.

    Args:
        engine: the engine.
        since_start_s: seconds since the first plan of a request, by its id; None before.
    """
    scheduler, groups = engine.scheduler, engine.spec.kv_groups
    group_idx = next((i for i, group in enumerate(groups) if group.spec.reach is None), 0)
    pools = [of_rank[group_idx] for of_rank in scheduler.memory.allocators]

    def described(request: Request) -> LiveRequest:
        held = request.allocation
        return LiveRequest(
            request_id=request.request_id,
            prompt_len=request.prompt_len,
            num_computed=request.num_computed,
            num_cached=request.num_cached,
            num_generated=request.num_generated,
            max_tokens=request.params.max_tokens,
            num_preemptions=request.num_preemptions,
            since_start_s=since_start_s(request.request_id),
            pages=() if held is None else tuple(held.tables[group_idx].runs),
            stripes=() if held is None else tuple(held.page_ranks[:MAX_STRIPES]),
            num_stripes=0 if held is None else len(held.page_ranks),
        )

    return LiveSnapshot(
        stats=engine.stats(),
        running=[described(request) for request in scheduler.running],
        waiting=[described(request) for request in islice(scheduler.waiting, MAX_WAITING)],
        group_idx=group_idx,
        num_pages=[pool.num_pages for pool in pools],
        num_used=[pool.num_used for pool in pools],
        free_slots=[pool.free_runs for pool in pools],
        choices=engine.choices.all,
    )
