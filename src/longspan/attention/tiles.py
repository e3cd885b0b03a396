"""Tables of the GPU attention kernel, made from segments: which tile of queries meets which tiles of keys.

Holds integer bookkeeping in NumPy, done once per step and KV group. Must not know torch, devices or kernels.
Read next: `longspan.triton_kernels.attention`, Note [Tables], which says what the numbers mean.

Note [Order of key tiles]
    All tiles of queries of one run share the run's key tiles. A query tile looks at key tiles [a, d), and this order
    makes those that need no mask one range [b, c) of them:

        rest of FULL runs | whole tiles of FULL runs | CAUSAL and BAND runs by position
        masked              not masked                 whole and seen by all of the tile: not masked; then masked

    Queries 64..127 against FULL keys 0..69 and CAUSAL keys 70..127, with tiles of 32 queries and of 64 keys:

        key tiles     0: keys 64..69    1: keys 0..63    2: keys 70..127
        query tiles   64..95 and 96..127, both with a 0, b 1, c 2, d 3: only tile 1 is whole and seen by all
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from longspan.attention.base import RowSegment
from longspan.sharding.visibility import Visibility

Table = NDArray[np.int32]

ALL, CAUSAL, BAND = 0, 1, 2
"""Visibility of a key tile."""


class TileTables(NamedTuple):
    """Tables of one launch. See Note [Tables] in `longspan.triton_kernels.attention`."""

    query_tiles: Table
    """[m, 7] int32: rows, position and key tiles of each tile of queries."""
    key_tiles: Table
    """[n, 4] int32: rows, position and visibility of each tile of keys."""
    queries_per_tile: int
    """Most queries of a tile."""
    most_key_tiles: int
    """Most key tiles that a tile of queries looks at."""


class _Run(NamedTuple):
    """Consecutive keys."""

    row: int
    num_keys: int
    position: int
    visibility: int


class _QueryRun(NamedTuple):
    """Consecutive queries that have the same segments."""

    row: int
    num_queries: int
    position: int
    segments: Sequence[RowSegment]


def tile_tables(
    segments: Iterable[RowSegment], num_rows: int, *, queries_per_tile: int, keys_per_tile: int, window: int | None
) -> TileTables:
    """Cut queries and keys into tiles.

    Args:
        segments: segments of one call; those of the same query row have disjoint keys.
        num_rows: query rows of the call. Rows that no segment covers get tiles without keys.
        queries_per_tile: most queries of a tile; a run of fewer is a tile.
        keys_per_tile: most keys of a tile.
        window: width of the layers' window in tokens, or None.
    """
    runs: list[_Run] = []
    spans: list[tuple[_QueryRun, int, int, int, int]] = []  # queries; runs: first, first whole FULL, first other, end
    for queries in _query_runs(segments, num_rows):
        first = len(runs)
        full = [s for s in queries.segments if s.visibility is Visibility.FULL]
        for s in full:
            if rest := s.num_keys % keys_per_tile:
                runs.append(_Run(s.key_row + s.num_keys - rest, rest, 0, ALL))
        whole = len(runs)
        for s in full:
            if s.num_keys >= keys_per_tile:
                runs.append(_Run(s.key_row, s.num_keys - s.num_keys % keys_per_tile, 0, ALL))
        others = len(runs)
        if len(full) < len(queries.segments):
            runs += sorted(
                (
                    _Run(s.key_row, s.num_keys, s.key_position, CAUSAL if s.visibility is Visibility.CAUSAL else BAND)
                    for s in queries.segments
                    if s.visibility is not Visibility.FULL and s.key_position is not None
                ),
                key=lambda run: run.position,
            )
        spans.append((queries, first, whole, others, len(runs)))
    key_tiles, starts = _cut(runs, keys_per_tile)
    tiles: list[Table] = []
    plain: list[tuple[int, ...]] = []  # one tile, no masked key: the usual decode
    for queries, first, whole, others, end in spans:
        a, b, c, d = starts[first], starts[whole], starts[others], starts[end]
        if c == d and queries.num_queries <= queries_per_tile:
            plain.append((queries.row, queries.num_queries, queries.position, a, b, c, d))
        else:
            tiles.append(_query_tiles(queries, key_tiles, (a, b, c, d), queries_per_tile, keys_per_tile, window))
    if plain:
        tiles.append(np.array(plain, dtype=np.int32))
    query_tiles = np.concatenate(tiles) if tiles else np.zeros((0, 7), dtype=np.int32)
    most = int((query_tiles[:, 6] - query_tiles[:, 3]).max(initial=0))
    longest = min(queries_per_tile, int(query_tiles[:, 1].max(initial=1)))
    # Long tiles first: the tiles that start last should end soon.
    order = np.argsort(query_tiles[:, 3] - query_tiles[:, 6], kind="stable")
    return TileTables(np.ascontiguousarray(query_tiles[order]), key_tiles, longest, most)


def _query_runs(segments: Iterable[RowSegment], num_rows: int) -> list[_QueryRun]:
    """Return all rows as runs, ascending, each with the segments that cover all of it."""
    by_rows: dict[tuple[int, int], list[RowSegment]] = {}
    for s in segments:
        if s.num_queries and s.num_keys and s.visibility is not Visibility.NONE:
            by_rows.setdefault((s.query_row, s.num_queries), []).append(s)
    runs: list[_QueryRun] = []
    row = 0
    for start, count in sorted(by_rows):
        if start < row:
            return _cut_query_runs(by_rows, num_rows)
        if start > row:
            runs.append(_QueryRun(row, start - row, 0, ()))
        found = by_rows[start, count]
        runs.append(_QueryRun(start, count, found[0].query_position, found))
        row = start + count
    if row < num_rows:
        runs.append(_QueryRun(row, num_rows - row, 0, ()))
    return runs


def _cut_query_runs(by_rows: dict[tuple[int, int], list[RowSegment]], num_rows: int) -> list[_QueryRun]:
    """Return all rows as runs where the segments' rows overlap: cut wherever a segment begins or ends."""
    borders = sorted({0, num_rows, *(start for start, _ in by_rows), *(start + count for start, count in by_rows)})
    runs: list[_QueryRun] = []
    for start, end in pairwise(borders):
        found = [s for (row, count), some in by_rows.items() if row <= start and end <= row + count for s in some]
        position = found[0].query_position + start - found[0].query_row if found else 0
        runs.append(_QueryRun(start, end - start, position, found))
    return runs


def _cut(runs: Sequence[_Run], keys_per_tile: int) -> tuple[Table, list[int]]:
    """Cut runs of keys into tiles [n, 4]; also return the index of each run's first tile, and the number of tiles."""
    if not runs:
        return np.zeros((0, 4), dtype=np.int32), [0]
    columns = np.array(runs, dtype=np.int64)  # [runs, 4]
    counts = -(-columns[:, 1] // keys_per_tile)
    starts = np.concatenate(([0], np.cumsum(counts)))
    tiles = np.repeat(columns, counts, axis=0)
    before = (np.arange(len(tiles)) - np.repeat(starts[:-1], counts)) * keys_per_tile  # keys of the run before the tile
    tiles[:, 0] += before
    tiles[:, 1] = np.minimum(tiles[:, 1] - before, keys_per_tile)
    tiles[:, 2] += before
    return tiles.astype(np.int32), starts.tolist()


def _query_tiles(
    queries: _QueryRun,
    key_tiles: Table,
    bounds: tuple[int, int, int, int],
    queries_per_tile: int,
    keys_per_tile: int,
    window: int | None,
) -> Table:
    """Make the tiles [m, 7] of one run of queries.

    Args:
        queries: the run.
        key_tiles: [n, 4] key tiles of all runs; this run's are sorted in place.
        bounds: this run's key tiles as in Note [Order of key tiles]: first, first whole FULL one, first other, end.
        queries_per_tile: most queries of a tile.
        keys_per_tile: most keys of a tile.
        window: width of the layers' window in tokens, or None.
    """
    start, whole, others, end = bounds
    offsets = np.arange(0, queries.num_queries, queries_per_tile)
    counts = np.minimum(queries.num_queries - offsets, queries_per_tile)
    first = queries.position + offsets  # positions of the first and the last query of every tile
    last = first + counts - 1
    placed = key_tiles[others:end].astype(np.int64)
    if (np.diff(placed[:, 2]) < 0).any():  # runs at the same positions
        placed = placed[np.argsort(placed[:, 2], kind="stable")]
        key_tiles[others:end] = placed
    begins = placed[:, 2]
    stops = np.maximum.accumulate(begins + placed[:, 1])  # keys up to and including this tile are older than this
    d = others + np.searchsorted(begins, last, side="right")  # tiles behind it are newer than every query
    a, b = np.full_like(d, start), np.full_like(d, whole)
    is_band = bool((placed[:, 3] == BAND).any())
    if is_band:
        assert window is not None, "a BAND segment needs the width of the band"
        if start == others:  # skip tiles that have left every query's window; CAUSAL tiles have no window
            causal = np.flatnonzero(placed[:, 3] == CAUSAL)
            a = start + np.searchsorted(stops, first - window + 1, side="right")
            a = np.minimum(a, start + causal[0]) if len(causal) else a
    if is_band and (start < others or (placed[:, 3] != BAND).any()):
        c = np.full_like(d, others)  # FULL runs only; a window's tiles are few
    else:
        if is_band:
            b = others + np.searchsorted(begins, last - (window or 0), side="right")
        # A tile is free of masks if it is whole, and its last key is not newer than the first query.
        short = np.flatnonzero(placed[:, 1] < keys_per_tile)
        c = others + np.searchsorted(stops, first + 1, side="right")
        if len(short):
            nearest = np.searchsorted(short, b - others if is_band else np.zeros_like(b), side="left")
            c = np.minimum(c, others + np.append(short, len(placed))[nearest])
    d = np.maximum(d, a)
    b = np.clip(b, a, d)
    c = np.clip(c, b, d)
    return np.stack([queries.row + offsets, counts, first, a, b, c, d], axis=1).astype(np.int32)
