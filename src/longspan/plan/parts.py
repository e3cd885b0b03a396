"""The parts of a plan: what all its ranks get, and what one of them gets beside it.

Holds pure functions that cut a plan and put it together again. Must not know how parts are sent.
Read next: `longspan.plan.types`, the plan; `longspan.group.plans`, which sends parts.

Note [What a rank gets]
    Requests on several ranks concern every rank of a plan: it derives from their query runs and page tables what it
    sends and receives. It needs neither the tokens that others compute nor how they are sampled; and of a request that
    lies on one rank the others get nothing at all. So a plan that `join` puts together on a rank lacks those requests,
    and others' runs have None for tokens. Query runs and rows to read are sent as `RequestRuns`, each the consecutive
    runs of one request:

        positions 0..3 of request 7 on rank 0, 4..11 on rank 1     RequestRuns(0, 7, 0, 0, (0, 1), (4, 8))
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import msgspec

from longspan.plan.types import (
    GraphStep,
    GroupStep,
    PageCopy,
    Plan,
    QueryRun,
    SampleRow,
    ScoreRun,
    StateStep,
    TableDelta,
    Tokens,
)
from longspan.types import Phase

T = TypeVar("T", "RequestRuns", TableDelta, StateStep)


class RequestRuns(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Consecutive query runs of one request, without tokens."""

    place: int
    """Place of the first of them among the plan's query runs."""
    request_id: int
    position: int
    """Position of the first token."""
    rope_len: int
    ranks: tuple[int, ...]
    """Rank that computes each run."""
    lengths: tuple[int, ...]
    """Tokens of each run."""
    adapter_id: int | None = None


class SharedPart(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What all ranks of a plan get. Fields are those of `Plan`."""

    plan_id: int
    phase: Phase
    ranks: tuple[int, ...]
    num_tokens: tuple[int, ...]
    runs: tuple[RequestRuns, ...]
    """Of requests on several ranks."""
    table_deltas: tuple[TableDelta, ...]
    """Of requests on several ranks."""
    groups: tuple[GroupStep, ...]
    page_copies: tuple[PageCopy, ...]
    released: tuple[int, ...]
    last_layer: GroupStep | None
    read_runs: tuple[RequestRuns, ...]
    """Of requests on several ranks."""
    states: tuple[StateStep, ...] = ()
    """Of requests on several ranks."""
    has_drafts: bool = False
    graph: GraphStep | None = None


class OwnPart(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What one rank gets beside it."""

    tokens: tuple[Tokens, ...]
    """Input tokens of the rank's query runs, in plan order."""
    samples: tuple[SampleRow, ...]
    scores: tuple[ScoreRun, ...]
    runs: tuple[RequestRuns, ...]
    """Of requests on this rank alone."""
    table_deltas: tuple[TableDelta, ...]
    """Of requests on this rank alone."""
    read_runs: tuple[RequestRuns, ...]
    """Of requests on this rank alone."""
    states: tuple[StateStep, ...] = ()
    """Of requests on this rank alone."""


def split(plan: Plan) -> tuple[SharedPart, dict[int, OwnPart]]:
    """Cut a plan into the part of all ranks and the parts of each."""
    packed = set(plan.packed)
    rank_of: dict[int, int] = {}  # packed request to its rank
    tokens: dict[int, list[Tokens]] = {rank: [] for rank in plan.ranks}
    runs_of: dict[int, list[QueryRun]] = {}
    for run in plan.query_runs:
        assert run.tokens is not None, "the driver knows or names all tokens"
        tokens[run.compute_rank].append(run.tokens)
        runs_of.setdefault(run.request_id, []).append(run)
        if run.request_id in packed:
            rank_of[run.request_id] = run.compute_rank
        else:
            assert not rank_of or len(plan.ranks) == 1, "runs of packed requests come last"
    shared_runs, own_runs = _by_rank(_gathered(plan.query_runs), rank_of)
    shared_reads, own_reads = _by_rank(_gathered(plan.read_runs), rank_of)
    shared_deltas, own_deltas = _by_rank(plan.table_deltas, rank_of)
    shared_states, own_states = _by_rank(plan.states, rank_of)
    samples: dict[int, list[SampleRow]] = {}
    for row in plan.samples:
        samples.setdefault(_rank_at(runs_of[row.request_id], row.position), []).append(row)
    scores: dict[int, list[ScoreRun]] = {}
    for score in plan.scores:
        scores.setdefault(_rank_at(runs_of[score.request_id], score.position), []).append(score)
    shared = SharedPart(
        plan.plan_id,
        plan.phase,
        plan.ranks,
        plan.num_tokens,
        tuple(shared_runs),
        tuple(shared_deltas),
        plan.groups,
        plan.page_copies,
        plan.released,
        plan.last_layer,
        tuple(shared_reads),
        tuple(shared_states),
        plan.has_drafts,
        plan.graph,
    )
    own = {
        rank: OwnPart(
            tuple(tokens[rank]),
            tuple(samples.get(rank, ())),
            tuple(scores.get(rank, ())),
            tuple(own_runs.get(rank, ())),
            tuple(own_deltas.get(rank, ())),
            tuple(own_reads.get(rank, ())),
            tuple(own_states.get(rank, ())),
        )
        for rank in plan.ranks
    }
    return shared, own


def join(shared: SharedPart, own: OwnPart, rank: int) -> Plan:
    """Put a plan together as one rank knows it. See Note [What a rank gets]."""
    tokens = iter(own.tokens)
    runs = [
        msgspec.structs.replace(run, tokens=next(tokens)) if run.compute_rank == rank else run
        for run in _spread([*shared.runs, *own.runs])
    ]
    return Plan(
        plan_id=shared.plan_id,
        phase=shared.phase,
        ranks=shared.ranks,
        num_tokens=shared.num_tokens,
        query_runs=tuple(runs),
        table_deltas=(*shared.table_deltas, *own.table_deltas),
        groups=shared.groups,
        samples=own.samples,
        scores=own.scores,
        page_copies=shared.page_copies,
        states=(*shared.states, *own.states),
        released=shared.released,
        last_layer=shared.last_layer,
        read_runs=tuple(_spread([*shared.read_runs, *own.read_runs])),
        has_drafts=shared.has_drafts,
        graph=shared.graph,
    )


def _by_rank(parts: Iterable[T], rank_of: Mapping[int, int]) -> tuple[list[T], dict[int, list[T]]]:
    """Parts of requests on several ranks, and those of requests on one, by rank."""
    shared: list[T] = []
    own: dict[int, list[T]] = {}
    for part in parts:
        rank = rank_of.get(part.request_id)
        (shared if rank is None else own.setdefault(rank, [])).append(part)
    return shared, own


def _gathered(runs: Sequence[QueryRun]) -> list[RequestRuns]:
    """Query runs as runs of requests."""
    found: list[RequestRuns] = []
    first = 0
    for i in range(1, len(runs) + 1):
        before = runs[i - 1]
        if i < len(runs):
            run = runs[i]
            if (run.request_id, run.position, run.rope_len) == (before.request_id, before.end, before.rope_len):
                continue
        same = runs[first:i]
        ranks, lengths = tuple([run.compute_rank for run in same]), tuple([run.num_tokens for run in same])
        run = same[0]
        found.append(RequestRuns(first, run.request_id, run.position, run.rope_len, ranks, lengths, run.adapter_id))
        first = i
    return found


def _spread(parts: list[RequestRuns]) -> list[QueryRun]:
    """Query runs of runs of requests, in plan order, without tokens."""
    found: list[QueryRun] = []
    for part in sorted(parts, key=lambda part: part.place):
        position = part.position
        for rank, length in zip(part.ranks, part.lengths, strict=True):
            found.append(QueryRun(part.request_id, position, length, rank, None, part.rope_len, part.adapter_id))
            position += length
    return found


def _rank_at(runs: Sequence[QueryRun], position: int) -> int:
    """Rank that computes a position of a request."""
    return next(run.compute_rank for run in reversed(runs) if run.position <= position < run.end)
