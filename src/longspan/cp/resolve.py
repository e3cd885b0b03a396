"""Rows for positions: which rows of which tensor a rank's kernels read and write in one step.

Holds integer bookkeeping, done once per step and KV group, not per layer. Must not know how rows move.
Read next: `longspan.cp.local`, the simplest strategy.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from longspan.attention.base import RowSegment, RowSegments
from longspan.plan.types import QueryRun, Range, Segment
from longspan.sharding.pages import KeyRun, PageTable
from longspan.sharding.visibility import Visibility, visibility


class KeyLayout(Protocol):
    """Places of requests' keys in one tensor."""

    def key_runs(self, request_id: int, start: int, end: int) -> list[KeyRun]:
        """Runs that hold tokens of positions `[start, end)`, clipped to them, in sequence order."""

    def row_runs(self, request_id: int, start: int, end: int) -> list[tuple[int, int]]:
        """Runs (row, tokens) of positions `[start, end)`, as few as consecutive rows admit."""


class PoolLayout:
    """Keys in one rank's own page pool."""

    def __init__(self, tables: Mapping[int, PageTable], rank: int) -> None:
        self._tables, self._rank = tables, rank

    def key_runs(self, request_id: int, start: int, end: int) -> list[KeyRun]:
        return self._tables[request_id].key_runs(self._rank, start, end)

    def row_runs(self, request_id: int, start: int, end: int) -> list[tuple[int, int]]:
        return self._tables[request_id].row_runs(self._rank, start, end)


class BufferLayout:
    """Keys in a message: the sender's runs, one after the other."""

    def __init__(self, runs: Iterable[tuple[int, KeyRun]]) -> None:
        """Lay the runs out.

        Args:
            runs: (request_id, run) in message order; a request's runs ascend in position.
        """
        self.num_rows = 0
        self._runs: dict[int, list[KeyRun]] = {}
        for request_id, run in runs:
            self._runs.setdefault(request_id, []).append(KeyRun(run.position, self.num_rows, run.num_tokens))
            self.num_rows += run.num_tokens

    def key_runs(self, request_id: int, start: int, end: int) -> list[KeyRun]:
        runs = self._runs.get(request_id, [])
        found: list[KeyRun] = []
        for run in runs[max(0, bisect_right(runs, start, key=lambda run: run.position) - 1) :]:
            if run.position >= end:
                break
            first, last = max(start, run.position), min(end, run.position + run.num_tokens)
            if first < last:
                found.append(KeyRun(first, run.row + first - run.position, last - first))
        return found

    def row_runs(self, request_id: int, start: int, end: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for run in self.key_runs(request_id, start, end):
            if found and sum(found[-1]) == run.row:
                found[-1] = (found[-1][0], found[-1][1] + run.num_tokens)
            else:
                found.append((run.row, run.num_tokens))
        return found


class StoreRun(NamedTuple):
    """Consecutive new tokens of a rank, and the pool rows for their keys and values."""

    token: int
    """First packed row of these tokens."""
    row: int
    """Row in the pool of the first token."""
    num_tokens: int


def query_rows(query_runs: Iterable[QueryRun], rank: int) -> dict[Range, int]:
    """First packed row of every query run that a rank computes."""
    rows: dict[Range, int] = {}
    row = 0
    for run in query_runs:
        if run.compute_rank == rank:
            rows[run.request_id, run.position, run.end] = row
            row += run.num_tokens
    return rows


def store_runs(rows: Mapping[Range, int], pool_layout: PoolLayout) -> list[StoreRun]:
    """Return the pool rows in which the new tokens of a rank are stored.

    Args:
        rows: first packed row of every query run, from `query_rows`.
        pool_layout: places in this rank's pool.
    """
    stores: list[StoreRun] = []
    for (request_id, start, end), token in rows.items():
        runs = pool_layout.key_runs(request_id, start, end)
        assert sum(run.num_tokens for run in runs) == end - start, "a token is computed by the rank that stores it"
        stores += [StoreRun(token + run.position - start, run.row, run.num_tokens) for run in runs]
    return stores


def store_rows(stores: Iterable[StoreRun], num_rows: int) -> list[int]:
    """Return the pool row of every packed row, or -1 for a row that is not stored.

    Args:
        stores: pool rows of the rank's new tokens.
        num_rows: packed rows of the rank, fillers of a fixed shape included.
    """
    rows = [-1] * num_rows
    for token, row, count in stores:
        rows[token : token + count] = range(row, row + count)
    return rows


def message_runs(layout: KeyLayout, ranges: Iterable[Range]) -> list[tuple[int, KeyRun]]:
    """Return (request_id, run) of all stored tokens in some ranges, in the order of a message."""
    return [(request_id, run) for request_id, start, end in ranges for run in layout.key_runs(request_id, start, end)]


def cut_blocks(runs: Sequence[tuple[int, KeyRun]], block_len: int) -> list[list[tuple[int, KeyRun]]]:
    """Cut runs into blocks of `block_len` rows; the last one may be shorter."""
    blocks: list[list[tuple[int, KeyRun]]] = []
    room = 0
    for request_id, run in runs:
        position, row, left = run.position, run.row, run.num_tokens
        while left:
            if room == 0:
                blocks.append([])
                room = block_len
            taken = min(left, room)
            blocks[-1].append((request_id, KeyRun(position, row, taken)))
            position, row, left, room = position + taken, row + taken, left - taken, room - taken
    return blocks


def resolve(
    segments: Iterable[Segment], query_rows: Mapping[Range, int], keys: KeyLayout, window: int | None
) -> RowSegments:
    """Turn a step's segments into segments of rows for the kernels.

    Full segments merge wherever rows follow each other, whatever the positions: all stripes that a query run sees
    whole are one kernel call if they lie in consecutive slots.

    Args:
        segments: segments to compute, all with keys in the tensor that `keys` describes.
        query_rows: first row of every query run in the packed query tensor.
        keys: places of the keys.
        window: the group's sliding window in tokens, or None.
    """
    resolved: list[RowSegment] = []
    for s in segments:
        query_row = query_rows[(s.request_id, s.query_start, s.query_end)]
        num_queries = s.query_end - s.query_start
        if s.visibility is Visibility.FULL:
            for row, num_keys in keys.row_runs(s.request_id, s.key_start, s.key_end):
                resolved.append(RowSegment(query_row, num_queries, s.query_start, row, num_keys, None, s.visibility))
            continue
        for run in keys.key_runs(s.request_id, s.key_start, s.key_end):
            seen = visibility(s.query_start, s.query_end, run.position, run.position + run.num_tokens, window)
            if seen is not Visibility.NONE:
                resolved.append(
                    RowSegment(query_row, num_queries, s.query_start, run.row, run.num_tokens, run.position, seen)
                )
    return _merged(resolved)


def _merged(resolved: Iterable[RowSegment]) -> RowSegments:
    """Merge neighbouring segments that continue each other."""
    merged: list[RowSegment] = []
    for s in resolved:
        last = merged[-1] if merged else None
        if (
            last is not None
            and (last.query_row, last.num_queries, last.visibility) == (s.query_row, s.num_queries, s.visibility)
            and last.key_row + last.num_keys == s.key_row
            and (
                s.visibility is Visibility.FULL
                or (
                    last.key_position is not None
                    and s.key_position is not None
                    and last.key_position + last.num_keys == s.key_position
                )
            )
        ):
            merged[-1] = replace(last, num_keys=last.num_keys + s.num_keys)
        else:
            merged.append(s)
    return RowSegments(merged)
