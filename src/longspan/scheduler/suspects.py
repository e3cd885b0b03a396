"""Suspects: requests that may be the reason why ranks are lost again and again.

Holds the rule by which a request runs alone. Must not know plans or ranks.
Read next: Note [Lost ranks] in `longspan.scheduler.scheduler`; `longspan.engine.recovery`, which gives up on one.
"""

from collections.abc import Collection, Sequence

from longspan.scheduler.request import Request

SUSPECT_CRASHES = 2
"""Losses of the ranks, one after another, after which a request that was in flight each time runs alone."""


class Suspects:
    """Says whom to run alone; asked before every plan, it looks at requests only after a loss."""

    def __init__(self) -> None:
        """Begin with ranks that were never lost."""
        self._may_be_some = False

    def note_loss(self) -> None:
        """Take down that the ranks were lost, these or those of another scheduler before."""
        self._may_be_some = True

    def find(self, requests: Collection[Request], running: Sequence[Request]) -> Request | None:
        """The oldest running request that runs alone, if there is any.

        Args:
            requests: all that have not ended.
            running: those that have pages, the oldest first.
        """
        if not self._may_be_some:
            return None
        self._may_be_some = any(request.num_crashes >= SUSPECT_CRASHES for request in requests)
        return next((request for request in running if request.num_crashes >= SUSPECT_CRASHES), None)
