"""Whose turn it is to lead the next step, of requests whose ranks are free or soon will be.

Holds the order of turns, and every rank's last plan with a prompt. Must not know budgets, pages or what else is in a
step.
Read next: `longspan.scheduler.scheduler`, which asks.
"""

from collections.abc import Set as AbstractSet
from typing import NamedTuple

from longspan.plan.types import Plan
from longspan.scheduler.request import Request
from longspan.types import Phase

PATIENCE = 2
"""Plans per rank and running request that a prompt waits for its next chunk before it goes first."""


class Turn(NamedTuple):
    """A request whose next step can start once its ranks are idle. Turns are ordered: the least goes first."""

    turn: int
    is_decode: bool
    """Of equal turns prefill is first,"""
    last_plan_id: int
    """then the request that waited longest,"""
    num_others: int
    """then the one that needs most ranks,"""
    request_id: int
    """then the oldest."""
    request: Request
    ranks: AbstractSet[int]
    """Ranks that the step may involve."""


class Turns:
    """Gives every request its turn."""

    def __init__(self, num_ranks: int) -> None:
        """Begin with ranks that have computed no prompt yet."""
        self._num_ranks = num_ranks
        self._last_prefill: dict[int, int] = {}  # rank to number of its last plan with a prompt

    def note_plan(self, plan: Plan) -> None:
        """Take down that a plan with a prompt takes prefill's turn on all its ranks, those without tokens of it too."""
        if plan.phase is Phase.PREFILL:
            self._last_prefill.update(dict.fromkeys(plan.ranks, plan.plan_id))

    def forget_ranks(self) -> None:
        """Take down that all ranks are new."""
        self._last_prefill.clear()

    def of(self, request: Request, ranks: AbstractSet[int], next_plan_id: int, num_running: int) -> Turn:
        """The turn of a request.

        Args:
            request: one that runs, and is not in flight.
            ranks: ranks that its next step may involve.
            next_plan_id: number of the next plan.
            num_running: requests that run.
        """
        is_decode, last_plan_id = request.phase is Phase.DECODE, request.delivery.last_plan_id
        turn = last_plan_id
        if not is_decode and not self.is_too_long(turn, next_plan_id, num_running):
            # Prefill waits as a queue: a rank that ran another prompt's chunk since has given prefill its turn. But not
            # for ever: a request that needs a rank that all others need, and none that is idle, would never be first.
            prefills = [self._last_prefill[rank] for rank in ranks if rank in self._last_prefill]
            if len(prefills) == len(ranks):
                turn = max(turn, min(prefills))
        return Turn(turn, is_decode, last_plan_id, self._num_ranks - len(ranks), request.request_id, request, ranks)

    def is_too_long(self, last_plan_id: int | None, next_plan_id: int, num_running: int) -> bool:
        """Whether a prompt that no plan has computed since `last_plan_id` has waited too long; None waits for none."""
        if last_plan_id is None:
            return False
        return next_plan_id - last_plan_id > PATIENCE * self._num_ranks * (1 + num_running)
