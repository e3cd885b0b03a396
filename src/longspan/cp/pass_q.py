"""`pass_q` and `tree`: queries go to the owners of the keys, partials come home and are merged there.

Good for decode, and for chunks that are small against their cached prefix. Source: pass-Q (2411.01783); tree attention
(2408.04093); merging partials by log-sum-exp (2305.19370 section 3).

Holds both strategies: `pass_q` is the `tree` in which every rank is a node of its own. Must not know other strategies
but `local`. `longspan.plan.query_units` decides the messages and says why.
Read next: `longspan.cp.eager`, which calls the strategies.

Note [Traffic of one layer]
    N ranks in M nodes of g = N / M, T query rows per rank that all ranks have keys for, whole blocks of B rows:

                  rows that a rank sends as queries, and    in units, with      exchanges
                  as many again as partials                 relays among them   of a rank
        pass_q    (N - 1) T                                 (N - 1) T / B       2 per unit
        tree      inside  (g - 1) T + (M - 1) (g - 1) T     (g - 1) T / B       2 per unit
                  between (M - 1) T                         (M - 1) T / B       4 per unit, 2 if g = 1

    `pass_q` sends (N - g) T of its rows between nodes: g times as many as `tree`.

Note [Order]
    Exchanges of one pair of ranks must be started in one order on both, though each rank runs only the units in which
    it has a part, and no rank knows the others' units. So the order follows from numbers that all ranks share. A unit u
    has up to four exchanges: queries come, leaders pass them on, relayed partials come back, partials go home. With A
    units ahead (`GroupStep.num_ahead`), step t of the order starts the queries of unit t + A, then passes those of
    unit t on, then answers the leaders of unit t - A, then sends home the partials of unit t - 2A; a unit without
    relays sends its partials home in the second place. Before an exchange of step t is started, everything is waited
    for that was started up to the same unit's last exchange. So no two ranks can wait for each other: whatever is
    waited for comes earlier in the order than what is started next. With A = 2 and without relays:

        start Q0 Q1  local  wait Q0  start Q2  compute 0  start P0  wait Q1  start Q3  compute 1  start P1  wait Q2 ..
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from longspan.attention.base import RowSegments
from longspan.attention.partial import PartialAttention
from longspan.comm.base import Pending
from longspan.cp.base import RankStep, check_rows
from longspan.cp.local import Local
from longspan.cp.resolve import resolve
from longspan.cp.wire import PartialMessage
from longspan.plan.message_format import PartialFormat
from longspan.plan.query_units import QueryUnit, moved_rows, num_rows, rank_units
from longspan.plan.types import Range, Segment
from longspan.types import AttentionParams

RowRuns = list[tuple[int, int]]
"""Runs (first row, rows) of a tensor, in the order of a message."""


@dataclass(slots=True)
class _Arrival:
    """Queries that come to this rank in one message."""

    peer: int
    num_rows: int
    segments: RowSegments
    """Segments of these queries over this rank's keys."""


@dataclass(slots=True)
class _Unit:
    """One rank's part of a `QueryUnit`."""

    number: int
    """Place of the unit in the order."""
    has_relays: bool
    """Whether leaders pass queries on in this unit."""
    sends: dict[int, RowRuns] = field(default_factory=dict)
    """Rows of this rank's queries that go to an owner or leader, by its rank; partials of the same rows come back."""
    arrivals: list[_Arrival] = field(default_factory=list)
    """Queries that come from homes."""
    relays: list[tuple[int, list[tuple[int, int, int]]]] = field(default_factory=list)
    """Owners in this node, each with the runs that are passed on: (index in `arrivals`, first row in it, rows)."""
    relayed: list[_Arrival] = field(default_factory=list)
    """Queries that come from leaders of this node."""

    def starts(self, num_ahead: int) -> list[tuple[int, int]]:
        """When its exchanges are started, as (step, place in the step). See Note [Order]."""
        before = (self.number - num_ahead, 0)
        if not self.has_relays:
            return [before, (self.number, 1)]
        return [before, (self.number, 1), (self.number + num_ahead, 2), (self.number + 2 * num_ahead, 3)]


class PassQ:
    """Strategy that runs the query units of a step."""

    def __init__(self, step: RankStep) -> None:
        self._step, self._local, self._format = step, Local(step), PartialFormat.of(step.group)
        own_rows = step.local_query_rows()
        seen: dict[Range, list[Segment]] = {}  # other ranks' runs: segments over keys on this rank
        for s in step.segments:
            if s.query_rank != step.rank:
                seen.setdefault((s.request_id, s.query_start, s.query_end), []).append(s)
        units = rank_units(step.rank, step.segments, step.query_runs, step.tables, step.group.spec, step.step)
        self._units = [self._own_part(unit, own_rows, seen) for unit in units]
        check_rows(step, *moved_rows(units, step.rank))
        self._num_ahead = step.step.num_ahead
        self._starts = sorted(
            (start, i) for i, unit in enumerate(self._units) for start in unit.starts(self._num_ahead)
        )

    def _own_part(
        self, unit: QueryUnit, own_rows: Mapping[Range, int], seen: Mapping[Range, Sequence[Segment]]
    ) -> _Unit:
        """This rank's part of a unit."""
        rank, part = self._step.rank, _Unit(unit.number, unit.has_relays)
        places: dict[Range, tuple[int, int]] = {}  # runs that came from homes: index in `arrivals`, first row
        for (home, to), runs in unit.queries.items():
            if home == rank:
                part.sends[to] = [(own_rows[run], run[2] - run[1]) for run in runs]
            elif to == rank:
                rows = _first_rows(runs)
                places |= {run: (len(part.arrivals), row) for run, row in rows.items()}
                part.arrivals.append(self._arrival(home, runs, rows, seen))
        for (leader, owner), runs in unit.relayed.items():
            if leader == rank:
                part.relays.append((owner, [(*places[run], run[2] - run[1]) for run in runs]))
            elif owner == rank:
                part.relayed.append(self._arrival(leader, runs, _first_rows(runs), seen))
        return part

    def _arrival(
        self, peer: int, runs: Sequence[Range], rows: Mapping[Range, int], seen: Mapping[Range, Sequence[Segment]]
    ) -> _Arrival:
        step = self._step
        segments = [s for run in runs for s in seen.get(run, ())]
        return _Arrival(peer, num_rows(runs), resolve(segments, rows, step.pool_layout, step.group.spec.window))

    def run_layer(self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> PartialAttention:
        q = q.contiguous()  # once: what several peers get is not copied again
        own: list[PartialAttention] = []
        going = [self._run(unit, q, k, v, params, own) for unit in self._units]
        last = [unit.starts(self._num_ahead)[-1] for unit in self._units]
        under_way: deque[tuple[tuple[int, int], int, Pending]] = deque()

        def take_in(until: tuple[int, int] | None) -> None:
            """Wait for what was started up to `until`, or for all."""
            while under_way and (until is None or under_way[0][0] <= until):
                start, i, pending = under_way.popleft()
                pending.wait()
                if start == last[i]:
                    next(going[i], None)  # merges what has come home

        for (step, place), i in self._starts:
            if step >= 0:
                if not own:
                    own.append(self._local.run_layer(q, k, v, params))
                take_in((step - self._num_ahead, max(0, place - 1)))
            under_way.append(((step, place), i, next(going[i])))
        if not own:
            own.append(self._local.run_layer(q, k, v, params))
        take_in(None)
        return own[0]

    def _run(
        self, unit: _Unit, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams, own: list[PartialAttention]
    ) -> Iterator[Pending]:
        """Run one unit in one layer: yield every exchange that is started, and resume when it has ended.

        Args:
            own: this rank's own partial, ready before the first unit resumes; partials that come home join it.
        """
        exchange, message = self._step.comm.exchange, self._message

        def queries(arrivals: Sequence[_Arrival]) -> list[Tensor]:
            shape = (self._step.group.num_query_heads, self._step.group.spec.q_width)
            return [torch.empty(a.num_rows, *shape, dtype=q.dtype, device=q.device) for a in arrivals]

        def partials(tensors: Sequence[Tensor], arrivals: Sequence[_Arrival]) -> list[PartialAttention]:
            attend = self._step.backend.partial_attention
            return [attend(tensor, k, v, a.segments, params) for tensor, a in zip(tensors, arrivals, strict=True)]

        def messages(arrivals: Sequence[_Arrival], found: Sequence[PartialAttention]) -> list[tuple[int, Tensor]]:
            return [(a.peer, message(a.num_rows, k).pack(part)) for a, part in zip(arrivals, found, strict=True)]

        arrived = queries(unit.arrivals)
        yield exchange(
            [(to, _gathered(q, rows)) for to, rows in unit.sends.items()],
            [(a.peer, tensor) for a, tensor in zip(unit.arrivals, arrived, strict=True)],
        )
        if unit.has_relays:
            relayed = queries(unit.relayed)
            yield exchange(
                [(owner, torch.cat([arrived[i][row : row + n] for i, row, n in runs])) for owner, runs in unit.relays],
                [(a.peer, tensor) for a, tensor in zip(unit.relayed, relayed, strict=True)],
            )
            answers = [message(sum(n for _, _, n in runs), k) for _, runs in unit.relays]
            pending = exchange(
                messages(unit.relayed, partials(relayed, unit.relayed)),  # first: leaders wait for them
                [(owner, answer.data) for (owner, _), answer in zip(unit.relays, answers, strict=True)],
            )
            found = partials(arrived, unit.arrivals)
            yield pending
            for (_, runs), answer in zip(unit.relays, answers, strict=True):
                answer.merge_into_(found, runs)
        else:
            found = partials(arrived, unit.arrivals)
        homecoming = [message(sum(n for _, n in rows), k) for rows in unit.sends.values()]
        yield exchange(
            messages(unit.arrivals, found),
            [(to, answer.data) for to, answer in zip(unit.sends, homecoming, strict=True)],
        )
        for rows, answer in zip(unit.sends.values(), homecoming, strict=True):
            answer.merge_into_(own, [(0, row, n) for row, n in rows])

    def _message(self, num_rows: int, like: Tensor) -> PartialMessage:
        """Make an empty message of partials."""
        return PartialMessage(self._format, num_rows, like.device)


def _gathered(rows: Tensor, runs: RowRuns) -> Tensor:
    """Gather runs of rows [T, H, D]; a view if they follow each other already."""
    first, last = runs[0][0], runs[-1][0] + runs[-1][1]
    if all(a + n == b for (a, n), (b, _) in pairwise(runs)):
        return rows[first:last]
    return torch.cat([rows[row : row + count] for row, count in runs])


def _first_rows(runs: Iterable[Range]) -> dict[Range, int]:
    """First row of every run in a message."""
    rows: dict[Range, int] = {}
    row = 0
    for run in runs:
        rows[run] = row
        row += run[2] - run[1]
    return rows
