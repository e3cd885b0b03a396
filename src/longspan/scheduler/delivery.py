"""What the ranks were told of one request, and by which plan.

Holds the books of one request's plans and table deltas. The plan writer notes what ranks are told; the request forgets
its tables and loses its ranks; the scheduler says from when it waits. Must not know pages' owners, queues or
strategies.
Read next: `longspan.scheduler.plan_writer`; `longspan.plan.types`, `TableDelta`.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from longspan.plan.types import Plan, TableDelta
from longspan.sharding.pages import PageRun, PageTable

if TYPE_CHECKING:
    from longspan.scheduler.request import Request


class Step(NamedTuple):
    """A decode step that a plan has written."""

    plan: Plan
    requests: Sequence["Request"]
    """The requests that it computes, in plan order."""


@dataclass(slots=True)
class Delivery:
    """Record of what ranks know of one request."""

    informed_ranks: set[int] = field(default_factory=set)
    """Ranks that know the page tables as of the last plan."""
    involved_ranks: set[int] = field(default_factory=set)
    """Ranks that ever heard of the request."""
    last_plan_id: int = -1
    """The last plan that computed the request, or the one after which it began to wait for its first."""
    moves_queries: bool = False
    """Whether the last plan brought queries to keys: then attention's work lies where the keys are."""
    last_step: Step | None = None
    """The last plan that computed the request, if it was a decode since which the ranks know the page tables."""

    def tell(
        self,
        request_id: int,
        tables: Sequence[PageTable],
        added: Sequence[Sequence[PageRun]],
        ranks: AbstractSet[int],
    ) -> list[TableDelta]:
        """Bring the ranks of a plan up to date.

        Args:
            request_id: the request.
            tables: its page tables, one per KV group.
            added: per KV group, the pages that were added since the last plan.
            ranks: the ranks to tell.
        """
        replace = not ranks <= self.informed_ranks
        if replace:
            self.informed_ranks |= ranks
            self.involved_ranks |= ranks
            added = [table.runs for table in tables]
        deltas: list[TableDelta] = []
        for group_idx, (table, runs) in enumerate(zip(tables, added, strict=True)):
            if runs or replace:
                freed_before = table.runs[0].page_idx if table.runs else table.num_pages
                deltas.append(TableDelta(request_id, group_idx, replace, tuple(runs), freed_before))
                self.informed_ranks &= ranks  # the others miss this one
        return deltas

    def note_plan(self, plan_id: int, *, moves_queries: bool, step: Step | None) -> None:
        """Take down that a plan computes the request; `step` is that plan if it is a decode."""
        self.last_plan_id, self.moves_queries, self.last_step = plan_id, moves_queries, step

    def wait_from(self, plan_id: int) -> None:
        """Count from the given plan on how long the request waits for its next one."""
        self.last_plan_id = plan_id

    def forget_tables(self) -> None:
        """Take down that the request has given its pages back: no rank knows its next tables."""
        self.informed_ranks = set()
        self.moves_queries = False
        self.last_step = None

    def go_back(self) -> None:
        """Take down that the next step does not go on where the last one ended."""
        self.last_step = None

    def lose_ranks(self) -> None:
        """Take down that the ranks are gone, and new ones have heard of nothing."""
        self.forget_tables()
        self.involved_ranks = set()
