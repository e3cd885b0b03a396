"""Relay: states of recurrent layers, handed from rank to rank along a request's tokens.

Holds one step's pieces of requests, and the messages between them. Must not know models: a layer's arithmetic is a
function that it is given.
Read next: `longspan.cp.handover`, the messages between two pieces; `longspan.plan.types`, `StateStep`;
`longspan.kv.state_pool`; `longspan.models.recurrent`, which calls this.

Note [Relay]
    A recurrent layer computes a token from the state behind the token before. Query runs of one request follow each
    other, so the rank of a run waits for the state of the run before, computes its run, and sends the state on, whole
    or head by head (`longspan.cp.handover`, Note [Parts of a state]):

        positions      0..511    512..1023    1024..1535    1536..2047      ranks 0 and 1, one chunk in snake order
        rank           0    -->  1            1        -->  0
        source: none                                        target: a slot of rank 0

    All ranks take the pieces of a layer in one order, that of the plan, so the first piece that is not done never waits
    for one behind it. And none waits for a state while messages of earlier pieces wait here to be sent: of many small
    ones a socket takes no more than its buffer holds, and sends no more while its rank waits for a large one
    (`longspan.comm.sockets`, Note [No deadlock]). So nothing can deadlock. What a rank has of a state between two of
    its pieces is not a slot's: only the state before the step (`source`) and behind it (`target`) lie in slots. A
    source on another rank than the first run's is sent before the model runs, for all layers at once: its rank may have
    no rows, and no layer to wait in.

    Requests that decode on one rank hand nothing on. Their single rows are computed by one call (`_run_together`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from longspan.comm.base import Communicator, Pending
from longspan.cp.handover import Handover, State
from longspan.kv.state_pool import StatePool
from longspan.plan.types import Plan, StatePlace, StateStep


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed rows of a rank that are computed by one call."""

    index: slice | Tensor
    """Where they are; [B] int64 if they do not follow each other."""
    are_of_one: bool
    """Whether they are consecutive tokens of one request; else single tokens of B requests."""


ComputeLayer: TypeAlias = Callable[[Rows, State, bool, Handover | None], Tensor]
"""Arithmetic of a layer: a function that returns the output, [t, out] or [B, out].

Args:
    rows: which rows of the step.
    state: before the rows; the function changes it to the state behind them.
    is_new: whether nothing lies before the rows: the state holds no values yet.
    handover: brings the state and takes it on; the function waits for what it reads (`Handover.arrive`). None where the
        state is there, and stays.
"""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive tokens of a request that this rank computes, up to a state that is handed on or kept."""

    step: StateStep
    position: int
    row: int
    """Packed row of the first token."""
    num_tokens: int
    before: int | None
    """Rank of the piece before, if it is another one; None for the first piece."""
    after: int | None
    """Rank of the piece behind, if it is another one."""
    is_first: bool
    """Whether no piece of the step is before it."""
    is_last: bool
    """Whether no piece of the step is behind it."""
    kept: StatePlace | None
    """Where a copy of the state behind it goes."""


class Relay:
    """States of one step on one rank."""

    def __init__(self, plan: Plan, pool: StatePool, comm: Communicator) -> None:
        """Cut the plan's query runs to pieces, and fetch states that begin on another rank.

        Args:
            plan: the step.
            pool: this rank's slots.
            comm: this rank's communicator.

        Collective: all ranks of the plan make one, before their model runs.
        """
        self._pool, self._comm, self._rank = pool, comm, comm.rank
        self.bytes_sent = 0
        """Bytes that this rank sent in this step; complete when all layers have run."""
        self._steps = {step.request_id: step for step in plan.states}
        assert len(self._steps) == len({run.request_id for run in plan.query_runs}), "a request has no state"
        self._arrived: dict[int, dict[int, State]] = {}  # request to layer to the state that was sent here
        self._fetch(plan)
        pieces = _own_pieces(plan, self._steps, self._rank)
        self._together = [piece for piece in pieces if self._is_alone(piece)]
        self._chained = [piece for piece in pieces if not self._is_alone(piece)]
        self._slots = torch.tensor(
            [piece.step.target.slot for piece in self._together], dtype=torch.long, device=pool.device
        )
        self._rows = Rows(_index([piece.row for piece in self._together], pool.device), are_of_one=False)

    def run_layer(self, layer: int, compute: ComputeLayer) -> Tensor:
        """Compute one recurrent layer.

        Args:
            layer: layer of the model.
            compute: the layer's arithmetic.

        Returns:
            [T, out], for this rank's packed rows.

        Collective: all ranks with rows call it for every recurrent layer in ascending order.
        """
        parts: list[tuple[Rows, Tensor]] = []
        sent: list[Pending] = []
        states: dict[int, State] = {}  # of requests between two pieces
        for piece in self._chained:
            if piece.before is not None:  # see Note [Relay]; whoever receives them computes a piece before this one
                _wait(sent)
            state = self._state_before(piece, layer, states)
            handover = self._handover(piece, layer, state)
            tokens = Rows(slice(piece.row, piece.row + piece.num_tokens), are_of_one=True)
            parts.append((tokens, compute(tokens, state, piece.position == 0, handover)))
            if handover is not None:
                sent += handover.finish()
            if piece.kept is not None:
                _copy_(self._pool.state(layer, piece.kept.slot), state)
        if self._together:
            parts.append((self._rows, self._run_together(layer, compute)))
        _wait(sent)
        if len(parts) == 1:  # all rows, in their order
            return parts[0][1]
        out = parts[0][1].new_empty(sum(len(part) for _, part in parts), parts[0][1].shape[-1])
        for rows, part in parts:
            out[rows.index] = part
        return out

    def _run_together(self, layer: int, compute: ComputeLayer) -> Tensor:
        """Compute the single rows of requests that hand nothing on; return [B, out]."""
        if len(self._together) == 1:  # in its slot: a state is large
            return compute(self._rows, self._pool.state(layer, self._together[0].step.target.slot), False, None)
        state = self._pool.gather(layer, self._slots)
        out = compute(self._rows, state, False, None)
        self._pool.scatter(layer, self._slots, state)
        return out

    def _handover(self, piece: _Piece, layer: int, state: State) -> Handover | None:
        """What brings the state before a piece, or takes it on behind it; None if it is here and stays."""
        if piece.before is None and piece.after is None:
            return None
        return Handover(
            state,
            self._pool.components[layer],
            piece.step.num_parts,
            before=piece.before,
            after=piece.after,
            exchange=self._exchange,
        )

    def _state_before(self, piece: _Piece, layer: int, states: dict[int, State]) -> State:
        """Tensors of the state before a piece, to be changed: the target's slot if that is on this rank. They hold it
        unless a rank is to send it."""
        step = piece.step
        is_target = step.target.rank == self._rank
        if step.request_id not in states:
            states[step.request_id] = (
                self._pool.state(layer, step.target.slot) if is_target else self._pool.empty(layer)
            )
        state = states[step.request_id]
        if piece.is_first and step.request_id in self._arrived:
            _copy_(state, self._arrived[step.request_id][layer])
        elif piece.is_first and step.source is not None and step.source != step.target:
            _copy_(state, self._pool.state(layer, step.source.slot))
        return state

    def _is_alone(self, piece: _Piece) -> bool:
        """Whether a piece is a single row whose state stays in its slot."""
        step = piece.step
        is_whole = piece.is_first and piece.is_last and piece.kept is None
        return (
            is_whole and piece.num_tokens == 1 and step.source == step.target and step.request_id not in self._arrived
        )

    def _fetch(self, plan: Plan) -> None:
        """Send states to the ranks of their requests' first runs, where these are others."""
        sends: list[tuple[int, Tensor]] = []
        recvs: list[tuple[int, Tensor]] = []
        first_rank: dict[int, int] = {}
        for run in plan.query_runs:
            first_rank.setdefault(run.request_id, run.compute_rank)
        for request_id, rank in first_rank.items():
            source = self._steps[request_id].source
            if source is None or source.rank == rank:
                continue
            if source.rank == self._rank:
                for layer in self._pool.components:
                    sends += [(rank, part) for part in self._pool.state(layer, source.slot)]
            elif rank == self._rank:
                arrived = {layer: self._pool.empty(layer) for layer in self._pool.components}
                recvs += [(source.rank, part) for state in arrived.values() for part in state]
                self._arrived[request_id] = arrived
        if sends or recvs:
            self._exchange(sends, recvs).wait()

    def _exchange(self, sends: list[tuple[int, Tensor]], recvs: list[tuple[int, Tensor]]) -> Pending:
        self.bytes_sent += sum(part.nbytes for _, part in sends)
        return self._comm.exchange(sends, recvs)


def _own_pieces(plan: Plan, steps: dict[int, StateStep], rank: int) -> list[_Piece]:
    """Cut a rank's query runs at states that are kept; pieces are in plan order."""
    last_of: dict[int, int] = {}  # request to the rank of its latest run
    ends: list[tuple[int | None, int | None]] = []  # per run, ranks before and behind it
    for i, run in enumerate(plan.query_runs):
        follower = plan.query_runs[i + 1] if i + 1 < len(plan.query_runs) else None
        goes_on = follower is not None and follower.request_id == run.request_id
        assert not goes_on or follower is None or follower.position == run.end, "runs of a request follow each other"
        ends.append((last_of.get(run.request_id), follower.compute_rank if follower is not None and goes_on else None))
        last_of[run.request_id] = run.compute_rank
    pieces: list[_Piece] = []
    row = 0
    for run, (before, after) in zip(plan.query_runs, ends, strict=True):
        if run.compute_rank != rank:
            continue
        step = steps[run.request_id]
        assert after is not None or step.target.rank == rank, "a state ends where the last run does"
        kept = {state.position: state.place for state in step.kept if run.position < state.position <= run.end}
        start = run.position
        for end in sorted({*kept, run.end}):
            is_first, is_last = start == run.position, end == run.end
            pieces.append(
                _Piece(
                    step=step,
                    position=start,
                    row=row + start - run.position,
                    num_tokens=end - start,
                    before=before if is_first and before != rank else None,
                    after=after if is_last and after != rank else None,
                    is_first=is_first and before is None,
                    is_last=is_last and after is None,
                    kept=kept.get(end),
                )
            )
            start = end
        row += run.num_tokens
    return pieces


def _wait(sent: list[Pending]) -> None:
    """Wait until messages are on their way, and forget them."""
    for pending in sent:
        pending.wait()
    sent.clear()


def _index(rows: Sequence[int], device: torch.device) -> slice | Tensor:
    """Index of some ascending rows; a slice, which copies nothing, if they follow each other."""
    if rows and rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, dtype=torch.long, device=device)


def _copy_(target: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for to, part in zip(target, source, strict=True):
        to.copy_(part)
