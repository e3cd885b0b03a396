"""Segments, made from query runs and page tables, and the keys of segments that must move.

Holds pure functions. Must not know strategies, bytes, costs or tensors.
Read next: `longspan.plan.query_units`, the queries that move; `longspan.plan.group_step`, which builds a group's step;
`longspan.cp.resolve`, which turns segments into rows on a rank.

Makers of plans call these functions to state a plan's exchanges; ranks call `moved_keys` again to know *which* rows an
exchange moves. Both sides see the same segments, so they agree by construction.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from longspan.plan.types import QueryRun, Range, Segment
from longspan.sharding.pages import PageTable
from longspan.sharding.visibility import split_visible_keys


def cut_runs(query_runs: Sequence[QueryRun], chunk: int | None) -> Sequence[QueryRun]:
    """Cut query runs where chunks end, so that all queries of a run see keys from the same position on.

    Chunks of 4 tokens cut a run of positions 2..9:

        2 3 | 4 5 6 7 | 8 9        which see keys from 0, 4 and 8 on

    Args:
        query_runs: a step's query runs.
        chunk: tokens of a chunk, or None for a KV group without chunks.

    Returns:
        Runs that name the tokens of the run that they are a part of; `query_runs` itself if none is cut.
    """
    if chunk is None or all(run.position // chunk == (run.end - 1) // chunk for run in query_runs):
        return query_runs
    parts: list[QueryRun] = []
    for run in query_runs:
        starts = [run.position, *range((run.position // chunk + 1) * chunk, run.end, chunk), run.end]
        parts += [QueryRun(run.request_id, a, b - a, run.compute_rank, run.tokens) for a, b in pairwise(starts)]
    return parts


def make_segments(
    query_runs: Sequence[QueryRun], tables: Mapping[int, PageTable], window: int | None, chunk: int | None = None
) -> tuple[Segment, ...]:
    """All pairs of query run and key range that attention needs, each key range on one rank.

    Args:
        query_runs: the step's query runs.
        tables: page table per request of one KV group, the step's own pages included.
        window: the group's sliding window in tokens, or None.
        chunk: tokens of the group's chunks, or None.
    """
    return tuple(
        Segment(run.request_id, run.position, run.end, run.compute_rank, key_rank, start, end, visibility)
        for run in cut_runs(query_runs, chunk)
        for start, end, visibility in split_visible_keys(
            run.position, run.end, window, 0 if chunk is None else run.position // chunk * chunk
        )
        for key_rank in tables[run.request_id].ranks_with(start, end)
    )


def moved_keys(segments: Iterable[Segment], key_rank: int, query_rank: int | None = None) -> list[Range]:
    """Key ranges on `key_rank` that queries of `query_rank` (None: of any other rank) see.

    Under a sliding window the runs of a striped chunk see ranges with gaps between them; keys in a gap do not move.

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
    """Number of tokens in the ranges that one rank stores."""
    return sum(tables[request_id].count_on(key_rank, start, end) for request_id, start, end in ranges)


def remote_ranks(segments: Iterable[Segment]) -> tuple[int, ...]:
    """Ranks with a segment whose queries and keys lie on different ranks, ascending."""
    return tuple(sorted({rank for s in segments if s.query_rank != s.key_rank for rank in (s.query_rank, s.key_rank)}))
