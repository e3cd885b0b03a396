"""Segments, made from query runs and page tables, and the keys of segments that must move.

Holds pure functions. Must not know strategies, bytes, costs or tensors.
Read next: `longspan.plan.query_units`, the queries that move; `longspan.cp.resolve`, which turns segments into rows.

Every rank makes the segments in which it computes the queries or stores the keys, and no others; both ends of a message
find the same keys, as they see the same query runs and page tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from longspan.kv.layout import KVSpec
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
    query_runs: Sequence[QueryRun],
    tables: Mapping[int, PageTable],
    window: int | None,
    chunk: int | None = None,
    rank: int | None = None,
) -> tuple[Segment, ...]:
    """Pairs of query run and key range that attention needs, each key range on one rank.

    Args:
        query_runs: the step's query runs.
        tables: page table per request of one KV group, the step's own pages included.
        window: the group's sliding window in tokens, or None.
        chunk: tokens of the group's chunks, or None.
        rank: the rank that computes the queries or stores the keys; None for the segments of all ranks.
    """
    found: list[Segment] = []
    for run in cut_runs(query_runs, chunk):
        first = 0 if chunk is None else run.position // chunk * chunk
        table, home = tables[run.request_id], run.compute_rank
        for start, end, visibility in split_visible_keys(run.position, run.end, window, first):
            if rank in (None, home):
                key_ranks = table.ranks_with(start, end)
            else:
                key_ranks = [rank] if table.count_on(rank, start, end) else []
            for key_rank in key_ranks:
                found.append(Segment(run.request_id, run.position, run.end, home, key_rank, start, end, visibility))
    return tuple(found)


def keys_of_others(
    query_runs: Sequence[QueryRun], tables: Mapping[int, PageTable], spec: KVSpec, key_rank: int
) -> list[Range]:
    """Key ranges on `key_rank` that queries of any other rank see, as `moved_keys` finds them among all segments.

    Args:
        query_runs: the step's query runs.
        tables: page table per request of one KV group.
        spec: the group's window or chunks.
        key_rank: the rank that stores the keys.
    """
    if spec.reach is None:  # whoever is furthest sees all that others see
        ends: dict[int, int] = {}
        for run in query_runs:
            if run.compute_rank != key_rank and run.position > ends.get(run.request_id, 0):
                ends[run.request_id] = run.position
        return [(number, 0, end) for number, end in ends.items() if tables[number].count_on(key_rank, 0, end)]
    wanted: dict[int, list[tuple[int, int]]] = {}
    for run in cut_runs(query_runs, spec.chunk):
        start, end = spec.first_key(run.position), run.position
        if run.compute_rank != key_rank and tables[run.request_id].count_on(key_rank, start, end):
            wanted.setdefault(run.request_id, []).append((start, end))
    return _union(wanted)


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
    return _union(wanted)


def _union(spans_of: Mapping[int, list[tuple[int, int]]]) -> list[Range]:
    """Disjoint ranges of all spans, those of one request together and ascending."""
    found: list[Range] = []
    for request_id, spans in spans_of.items():
        for start, end in sorted(spans):
            if found and found[-1][0] == request_id and start <= found[-1][2]:
                found[-1] = (request_id, found[-1][1], max(end, found[-1][2]))
            else:
                found.append((request_id, start, end))
    return found


def count_keys(tables: Mapping[int, PageTable], key_rank: int, ranges: Iterable[Range]) -> int:
    """Number of tokens in the ranges that one rank stores."""
    return sum(tables[request_id].count_on(key_rank, start, end) for request_id, start, end in ranges)
