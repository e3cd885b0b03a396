"""Blocks of keys that are converted before queries meet them, such as latents that are expanded to heads.

Holds the division of a call's segments. Must not know how keys are converted, pages or models.
Read next: `longspan.attention.latent`, `longspan.attention.stored`, which convert.

Note [Runs of keys that are converted]
    A call's keys are cut where a segment begins or ends, and into runs of at most so many keys that their converted
    form stays small. A run is converted if enough queries see a key of it, else it is left as it is stored. Queries
    0..255 see keys 0..1279, queries 256..511 keys 0..1023 (converted from 300 queries on, runs of 512):

        keys         0..511       512..1023    1024..1279
        queries      512          512          256
        becomes      converted    converted    left
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from longspan.attention.base import RowSegment, RowSegments
from longspan.sharding.visibility import Visibility, visibility


@dataclass(frozen=True, slots=True)
class KeyBlock:
    """Keys that are converted together."""

    runs: Sequence[tuple[int, int]]
    """Rows [start, end) of the call's keys, in the order of the converted ones."""
    first_row: int
    """First query row that sees one of them."""
    last_row: int
    """One past the last such row."""
    segments: RowSegments
    """Segments over the converted keys, with query rows from `first_row` on."""


@dataclass(frozen=True, slots=True)
class Work:
    """Segments of one call, divided. See Note [Runs of keys that are converted]."""

    left: Sequence[RowSegment]
    """Segments of keys that are met as they are stored."""
    blocks: Sequence[KeyBlock]


def divide(segments: Sequence[RowSegment], window: int | None, min_queries: float, most_keys: int) -> Work:
    """Divide segments into those of keys that few queries see, and blocks of keys that many see.

    Args:
        segments: a call's segments.
        window: sliding window in tokens, or None.
        min_queries: queries per key from which keys are converted.
        most_keys: most keys of a block.
    """
    few: dict[int, list[tuple[int, int]]] = {}  # index of a segment: rows [start, end) of its keys
    blocks: list[_OpenBlock] = []
    for start, end, active in _runs(segments, most_keys):
        middle = (start + end) // 2
        if sum(_num_seeing(segments[i], middle, window) for i in active) < min_queries:
            for i in active:
                _extend(few.setdefault(i, []), start, end)
            continue
        if not blocks or blocks[-1].num_keys + end - start > most_keys:
            blocks.append(_OpenBlock())
        blocks[-1].add(start, end, active)
    if not blocks:
        return Work(segments, ())
    left = RowSegments(
        part for i, runs in few.items() for start, end in runs for part in _clip(segments[i], start, end, start, window)
    )
    closed = (block.close(segments, window) for block in blocks)
    return Work(left, tuple(block for block in closed if block.segments))


class _OpenBlock:
    """Block that still takes keys, in the order of their rows."""

    def __init__(self) -> None:
        self.num_keys = 0
        self._runs: list[tuple[int, int]] = []
        self._seen: dict[int, list[tuple[int, int]]] = {}  # index of a segment: rows [start, end) of its keys

    def add(self, start: int, end: int, active: Sequence[int]) -> None:
        """Add rows [start, end) of keys, which the segments of some indices see."""
        _extend(self._runs, start, end)
        for i in active:
            _extend(self._seen.setdefault(i, []), start, end)
        self.num_keys += end - start

    def close(self, segments: Sequence[RowSegment], window: int | None) -> KeyBlock:
        """Make the block's segments."""
        starts = [start for start, _ in self._runs]
        lengths = accumulate((end - start for start, end in self._runs), initial=0)
        shifts = [row - start for row, start in zip(lengths, starts, strict=False)]
        parts: list[RowSegment] = []
        for i, runs in self._seen.items():
            for start, end in runs:
                row = start + shifts[bisect_right(starts, start) - 1]
                parts += _clip(segments[i], start, end, row, window)
        first_row = min((s.query_row for s in parts), default=0)
        last_row = max((s.query_row + s.num_queries for s in parts), default=0)
        moved = RowSegments(replace(s, query_row=s.query_row - first_row) for s in parts)
        return KeyBlock(tuple(self._runs), first_row, last_row, moved)


def _runs(segments: Sequence[RowSegment], most_keys: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Cut keys where a segment begins or ends, and after `most_keys`: rows [start, end) and the segments there."""
    starting: dict[int, list[int]] = {}
    ending: dict[int, list[int]] = {}
    for i, s in enumerate(segments):
        if s.num_queries and s.num_keys and s.visibility is not Visibility.NONE:
            starting.setdefault(s.key_row, []).append(i)
            ending.setdefault(s.key_row + s.num_keys, []).append(i)
    active: dict[int, None] = {}  # a set that keeps its order
    for first, last in pairwise(sorted({*starting, *ending})):
        for i in ending.get(first, ()):
            del active[i]
        active |= dict.fromkeys(starting.get(first, ()))
        if active:
            for start in range(first, last, most_keys):
                yield start, min(last, start + most_keys), tuple(active)


def _num_seeing(segment: RowSegment, key_row: int, window: int | None) -> int:
    """Number of a segment's queries that see one of its keys."""
    if segment.key_position is None or segment.visibility is Visibility.FULL:
        return segment.num_queries
    after = segment.key_position + key_row - segment.key_row - segment.query_position  # the first query's index
    end = segment.num_queries
    if segment.visibility is Visibility.BAND and window is not None:
        end = min(end, after + window)
    return max(0, end - max(0, after))


def _clip(segment: RowSegment, start: int, end: int, key_row: int, window: int | None) -> Iterator[RowSegment]:
    """The part of a segment over its keys of rows [start, end), which lie from `key_row` on; none if it sees none."""
    position, seen = segment.key_position, segment.visibility
    if position is not None:
        position += start - segment.key_row
        first, last = segment.query_position, segment.query_position + segment.num_queries
        if seen is not Visibility.FULL:
            band = window if seen is Visibility.BAND else None
            seen = visibility(first, last, position, position + end - start, band)
    if seen is not Visibility.NONE:
        yield replace(segment, key_row=key_row, num_keys=end - start, key_position=position, visibility=seen)


def _extend(runs: list[tuple[int, int]], start: int, end: int) -> None:
    """Add [start, end) to ascending runs, as a part of the last one if it continues that."""
    if runs and runs[-1][1] == start:
        runs[-1] = (runs[-1][0], end)
    else:
        runs.append((start, end))
