"""Keys that a step's query runs see, counted by the rank that stores them, for all ranks at once.

Holds counts as arrays over ranks, so that makers of plans can compare strategies on many ranks. Must not know
strategies, bytes, costs or rows. Ranks need none of it: they derive their own part (`longspan.plan.segments`).
Read next: `longspan.plan.exchanges`, the rows that each strategy moves.

Note [Intervals]
    Positions are cut where the keys of some run begin or end, and the keys of every interval are counted once per rank.
    Everything else is a difference of two rows of their running sums. Two ranks, pages of 4 tokens, keys 0..3 on rank 0
    and 4..7 on rank 1; runs 8..11 on rank 1 and 12..15 on rank 0 see, of keys before themselves:

        interval       0..7     8..11    12..
        rank 0, 1      4  4     0  4     0  0
        run 8..11      x                          4 keys on rank 0, 4 on rank 1
        run 12..15     x        x                 4 keys on rank 0, 8 on rank 1
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from longspan.kv.layout import KVSpec
from longspan.plan.segments import cut_runs
from longspan.plan.types import QueryRun
from longspan.sharding.pages import PageTable
from longspan.sharding.visibility import Visibility, split_visible_keys

Counts: TypeAlias = NDArray[np.int64]


class Piece(NamedTuple):
    """Keys that a run sees alike."""

    run: int
    """Index of the run."""
    start: int
    """Row of the running sums at the first key; a piece that a run's own rank stores whole has none."""
    end: int
    """Row one past the last key."""
    num_positions: int
    """Positions from the first key to the last."""
    visibility: Visibility


@dataclass(frozen=True)
class StepKeys:
    """Keys that the query runs of a step see in one KV group. P ranks, R runs. See Note [Intervals]."""

    runs: Sequence[QueryRun]
    """The step's query runs, cut where chunks end."""
    ranks: Sequence[int]
    """Ranks with queries or pages, ascending; arrays have a column for each."""
    homes: Counts
    """[R] column of the rank that computes the run."""
    pieces: Sequence[Piece]
    """Pieces of runs with keys that other ranks may store."""
    own: Sequence[Piece | None]
    """[R] the run's piece of keys that its own rank stores, its own tokens; None where it is in `pieces`."""
    firsts: Counts
    """[R] row of the first key that the run sees."""
    lasts: Counts
    """[R] row of the run's own first position: keys of other ranks lie before it."""
    counts: Counts
    """[intervals, P] keys of each interval on each rank."""

    @cached_property
    def num_queries(self) -> Counts:
        """[R] tokens of each run."""
        return np.array([run.num_tokens for run in self.runs], dtype=np.int64)

    @cached_property
    def piece_runs(self) -> Counts:
        """[S] index of the run of each of `pieces`."""
        return np.array([piece.run for piece in self.pieces], dtype=np.int64)

    @cached_property
    def before(self) -> Counts:
        """[intervals + 1, P] running sums of `counts`."""
        sums = np.zeros((len(self.counts) + 1, len(self.ranks)), dtype=np.int64)
        np.cumsum(self.counts, axis=0, out=sums[1:])
        return sums

    @cached_property
    def remote(self) -> Counts:
        """[R, P] keys that each run sees on each other rank; 0 on its own."""
        found = self.before[self.lasts] - self.before[self.firsts]
        found[np.arange(len(self.runs)), self.homes] = 0
        return found

    @cached_property
    def seen_by(self) -> NDArray[np.bool_]:
        """[intervals, P] whether some run of each rank sees the keys of each interval."""
        changes = np.zeros((len(self.counts) + 1, len(self.ranks)), dtype=np.int64)
        np.add.at(changes, (self.firsts, self.homes), 1)
        np.add.at(changes, (self.lasts, self.homes), -1)
        return np.cumsum(changes, axis=0)[:-1] > 0

    @cached_property
    def participants(self) -> tuple[int, ...]:
        """Ranks whose queries see keys of another rank, and these ranks; ascending."""
        meets = self.remote > 0
        involved = set(np.flatnonzero(meets.sum(axis=0)).tolist())
        if not involved:
            return ()
        involved.update(self.homes[np.flatnonzero(meets.sum(axis=1))].tolist())
        return tuple([self.ranks[column] for column in sorted(involved)])

    def by_home(self, values: NDArray[Any], reduce: np.ufunc = np.add) -> NDArray[Any]:
        """Sum values of runs [R, ...] over the runs of each rank (or reduce them otherwise).

        Returns:
            [P, ...], 0 for ranks without runs.
        """
        order, firsts, homes = self._order
        found = np.zeros((len(self.ranks), *values.shape[1:]), dtype=values.dtype)
        found[homes] = values[order] if len(homes) == len(order) else reduce.reduceat(values[order], firsts, axis=0)
        return found

    def by_run(self, values: NDArray[Any], reduce: np.ufunc = np.add) -> NDArray[Any]:
        """Sum values of `pieces` [S, ...] over the pieces of each run (or reduce them otherwise): [R, ...]."""
        found = np.zeros((len(self.runs), *values.shape[1:]), dtype=values.dtype)
        if self._has_one_piece_per_run:
            found[self.piece_runs] = values
        else:
            reduce.at(found, self.piece_runs, values)
        return found

    @cached_property
    def _has_one_piece_per_run(self) -> bool:
        return len({piece.run for piece in self.pieces}) == len(self.pieces)

    @cached_property
    def _order(self) -> tuple[list[int], list[int], list[int]]:
        """Runs in the order of their ranks, the first run of each rank in it, and these ranks' columns."""
        columns = self.homes.tolist()
        order = sorted(range(len(columns)), key=columns.__getitem__)
        firsts = [i for i, run in enumerate(order) if i == 0 or columns[run] != columns[order[i - 1]]]
        return order, firsts, [columns[order[i]] for i in firsts]


def is_local(query_runs: Iterable[QueryRun], tables: Mapping[int, PageTable], spec: KVSpec) -> bool:
    """Whether no query run sees a key of another rank. Arguments: `step_keys`."""
    for run in query_runs:
        table = tables[run.request_id]
        if not table.is_on(run.compute_rank):
            found = table.tokens_per_rank(spec.first_key(run.position), run.position)
            if len(found) > (run.compute_rank in found):
                return False
    return True


def step_keys(query_runs: Sequence[QueryRun], tables: Mapping[int, PageTable], spec: KVSpec) -> StepKeys:
    """Count the keys that query runs see.

    Args:
        query_runs: a step's query runs; every token lies on the rank that computes it.
        tables: page table per request of one KV group, the step's own pages included.
        spec: the group's window or chunks.
    """
    runs = cut_runs(query_runs, spec.chunk)
    seen: list[list[tuple[int, int, Visibility]]] = []
    cuts: dict[int, set[int]] = {}  # per request, positions where intervals begin or end
    for run in runs:
        first = 0 if spec.chunk is None else run.position // spec.chunk * spec.chunk
        parts = split_visible_keys(run.position, run.end, spec.window, first)
        seen.append(parts)
        here = cuts.setdefault(run.request_id, set())
        here.add(parts[0][0])
        here.add(run.position)
        for start, end, _ in parts:
            if start < run.position:
                here.add(start)
                here.add(end)
    ranks = sorted({run.compute_rank for run in runs}.union(*[tables[request_id].ranks for request_id in cuts]))
    column = {rank: i for i, rank in enumerate(ranks)}
    row_of, counts = _count_intervals(runs, cuts, tables, column)
    pieces: list[Piece] = []
    own: list[Piece | None] = []
    firsts: list[int] = []
    lasts: list[int] = []
    for i, (run, parts) in enumerate(zip(runs, seen, strict=True)):
        rows = row_of[run.request_id]
        firsts.append(rows[parts[0][0]])
        lasts.append(rows[run.position])
        own.append(None)
        for start, end, visibility in parts:
            if start < run.position:
                pieces.append(Piece(i, rows[start], rows[end], end - start, visibility))
            else:
                own[i] = Piece(i, 0, 0, end - start, visibility)
    homes = np.array([column[run.compute_rank] for run in runs], dtype=np.int64)
    return StepKeys(runs, ranks, homes, pieces, own, np.array(firsts), np.array(lasts), counts)


def _count_intervals(
    runs: Sequence[QueryRun],
    cuts: Mapping[int, set[int]],
    tables: Mapping[int, PageTable],
    column: Mapping[int, int],
) -> tuple[dict[int, dict[int, int]], Counts]:
    """Count the keys between neighbouring cuts.

    Args:
        runs: the step's query runs.
        cuts: per request, positions where intervals begin or end.
        tables: page table per request.
        column: column of each rank.

    Returns:
        Per request, the interval that begins at each cut; and keys [intervals, P]. None lie behind a request's last
        cut.
    """
    ends: dict[tuple[int, int], tuple[int, int]] = {
        (run.request_id, run.position): (run.end, column[run.compute_rank]) for run in runs
    }
    row_of: dict[int, dict[int, int]] = {}
    counts = np.zeros((sum(map(len, cuts.values())), len(column)), dtype=np.int64)
    row = 0
    for request_id, positions in cuts.items():
        table, ordered = tables[request_id], sorted(positions)
        row_of[request_id] = {position: row + i for i, position in enumerate(ordered)}
        for start, end in pairwise(ordered):
            run_end, home = ends.get((request_id, start), (start, 0))
            if end <= run_end:  # tokens of a run lie where they are computed
                counts[row, home] = end - start
            else:
                for rank, count in table.tokens_per_rank(start, end).items():
                    counts[row, column[rank]] = count
            row += 1
        row += 1
    return row_of, counts
