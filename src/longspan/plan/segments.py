"""From query runs and page tables to segments, and from segments to what must move.

Holds pure functions. Must not know bytes, costs or tensors: which strategy is best is `longspan.policy`'s business.
Read next: `longspan.policy.choose`; `longspan.cp.resolve`, which turns segments into rows on a rank.

Makers of plans call these to write a plan's exchanges down; ranks call `moved_queries` and `moved_keys` again to know
*which* rows the exchange is about. Both sides see the same segments, so they agree by construction.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from longspan.plan.types import DirectExchange, QueryRun, RingExchange, Segment
from longspan.sharding.pages import PageTable
from longspan.sharding.visibility import split_visible_keys
from longspan.types import Strategy

Range: TypeAlias = tuple[int, int, int]
"""(request_id, start, end) of positions."""


def make_segments(
    query_runs: Sequence[QueryRun], tables: Mapping[int, PageTable], window: int | None
) -> tuple[Segment, ...]:
    """All pairs of query run and key range that attention needs, each key range on one rank.

    Args:
        query_runs: what the step computes.
        tables: page table per request, of one KV group, this step's own pages included.
        window: the group's sliding window in tokens, or None.
    """
    return tuple(
        Segment(run.request_id, run.position, run.end, run.compute_rank, key_rank, start, end, visibility)
        for run in query_runs
        for start, end, visibility in split_visible_keys(run.position, run.end, window)
        for key_rank in sorted(tables[run.request_id].count_tokens(start, end))
    )


def moved_queries(segments: Iterable[Segment], query_rank: int, key_rank: int) -> list[Range]:
    """Query runs of one rank that meet keys of another, in plan order."""
    found: dict[Range, None] = {}
    for s in segments:
        if s.query_rank == query_rank and s.key_rank == key_rank:
            found[(s.request_id, s.query_start, s.query_end)] = None
    return list(found)


def moved_keys(segments: Iterable[Segment], key_rank: int, query_rank: int | None = None) -> list[Range]:
    """Key ranges of one rank that queries of another (None: of any other) see.

    Under a sliding window the runs of a striped chunk see ranges with gaps between them; what lies in a gap stays.

    Returns:
        Disjoint ranges, those of one request together and ascending.
    """
    wanted: dict[int, list[tuple[int, int]]] = {}
    for s in segments:
        is_mover = s.query_rank != key_rank if query_rank is None else s.query_rank == query_rank
        if s.key_rank == key_rank and is_mover:
            wanted.setdefault(s.request_id, []).append((s.key_start, s.key_end))
    found: list[Range] = []
    for request_id, spans in wanted.items():
        for start, end in sorted(spans):
            if found and found[-1][0] == request_id and start <= found[-1][2]:
                found[-1] = (request_id, found[-1][1], max(end, found[-1][2]))
            else:
                found.append((request_id, start, end))
    return found


def count_keys(tables: Mapping[int, PageTable], key_rank: int, ranges: Iterable[Range]) -> int:
    """How many tokens of the ranges one rank stores."""
    return sum(tables[request_id].count_tokens(start, end).get(key_rank, 0) for request_id, start, end in ranges)


def remote_ranks(segments: Iterable[Segment]) -> tuple[int, ...]:
    """Ranks with a segment whose queries and keys lie on different ranks, ascending."""
    return tuple(sorted({rank for s in segments if s.query_rank != s.key_rank for rank in (s.query_rank, s.key_rank)}))


def make_exchanges(
    strategy: Strategy, segments: Sequence[Segment], tables: Mapping[int, PageTable], block_len: int
) -> tuple[DirectExchange | RingExchange, ...]:
    """What the participants send each other in every layer under a strategy.

    Args:
        strategy: the movement strategy.
        segments: of one KV group.
        tables: page table per request of that group.
        block_len: rows per ring block.

    Returns:
        Exchanges in the order the ranks run them; none when nothing is remote.
    """
    ranks = remote_ranks(segments)
    if not ranks:
        return ()
    if strategy is Strategy.PASS_KV:
        counts = tuple(count_keys(tables, rank, moved_keys(segments, rank)) for rank in ranks)
        return (RingExchange(ranks, counts, block_len),)
    if strategy is Strategy.GATHER_KV:
        rows = [[count_keys(tables, a, moved_keys(segments, a, b)) if a != b else 0 for b in ranks] for a in ranks]
        return (DirectExchange("kv", ranks, tuple(map(tuple, rows))),)
    if strategy is Strategy.PASS_Q:
        rows = [
            [sum(end - start for _, start, end in moved_queries(segments, a, b)) if a != b else 0 for b in ranks]
            for a in ranks
        ]
        back = tuple(zip(*rows, strict=True))
        return (DirectExchange("query", ranks, tuple(map(tuple, rows))), DirectExchange("partial", ranks, back))
    raise AssertionError(f"{strategy} cannot serve queries and keys on different ranks")
