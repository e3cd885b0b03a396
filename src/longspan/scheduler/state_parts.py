"""Number of parts in which states of recurrent layers are handed from rank to rank: chosen per request and step.

Holds the notes on what was chosen. Must not know how states move, nor torch.
Read next: `longspan.costmodel.recurrence`, which predicts; `longspan.cp.handover`, Note [Parts of a state].
"""

from collections.abc import Sequence

import msgspec
from msgspec import structs

from longspan.costmodel.parameters import Costs
from longspan.costmodel.recurrence import choose_parts, predict_recurrence
from longspan.kv.state_layout import StateGroup
from longspan.plan.types import Plan, QueryRun


class PartsNote(msgspec.Struct):
    """Number of parts that was used, and the first run of requests that used it."""

    num_parts: int
    is_forced: bool
    num_tokens: int
    """Tokens of the request in the first step."""
    num_ranks: int
    """Ranks that they lie on."""
    predicted_s: float | None
    """Seconds of all recurrent layers for the request in the first step; None where nothing was measured."""
    whole_s: float | None
    """The same with a state that is handed on whole."""
    num_steps: int = 1
    """(request, step) pairs that used it."""


class StateParts:
    """Choices made so far."""

    def __init__(self, groups: Sequence[StateGroup], forced: int | None) -> None:
        """Args: `forced` is the number that the user asks for, at most that of heads, or None."""
        self._groups, self._forced = groups, forced
        self._found: dict[int, PartsNote] = {}

    @property
    def all(self) -> list[PartsNote]:
        """All choices, in the order of their first steps."""
        return list(self._found.values())

    def take_over(self, other: "StateParts") -> None:
        """Go on with the notes of another one."""
        self._found = other._found

    def choose(self, plan: Plan, costs: Costs) -> Plan:
        """Return the plan with a number of parts for every state that is handed on."""
        runs: dict[int, list[QueryRun]] = {}
        for run in plan.query_runs:
            runs.setdefault(run.request_id, []).append(run)
        states = tuple(
            [structs.replace(step, num_parts=self._num_parts(runs[step.request_id], costs)) for step in plan.states]
        )
        return plan if states == plan.states else structs.replace(plan, states=states)

    def _num_parts(self, runs: Sequence[QueryRun], costs: Costs) -> int:
        ranks = {run.compute_rank for run in runs}
        if len(ranks) == 1:
            return 1
        num_parts = self._forced or choose_parts(self._groups, runs, costs)
        note = self._found.get(num_parts)
        if note is not None:
            note.num_steps += 1
            return num_parts
        self._found[num_parts] = PartsNote(
            num_parts,
            self._forced is not None,
            sum(run.num_tokens for run in runs),
            len(ranks),
            predict_recurrence(self._groups, runs, costs, num_parts) if costs.are_measured else None,
            predict_recurrence(self._groups, runs, costs) if costs.are_measured else None,
        )
        return num_parts
