"""Which plan of decodes may be submitted behind one that is in flight.

Holds the rule of Note [Running ahead] in `longspan.scheduler.scheduler`, and which plans in flight nobody follows yet.
Must not know queues, turns or strategies.
Read next: `longspan.scheduler.scheduler`, which asks when no request waits.
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

from longspan.plan.types import Plan
from longspan.scheduler.chunks import Chunks
from longspan.scheduler.request import Request
from longspan.scheduler.sampling import can_sample_ahead
from longspan.types import Phase


class RunAhead:
    """Plans in flight, as far as others may follow them."""

    def __init__(
        self,
        page_size: int,
        chunks: Chunks,
        extend: Callable[[Request], bool],
        wants_drafts: Callable[[Sequence[Request]], bool],
    ) -> None:
        """Begin without plans.

        Args:
            page_size: tokens per page.
            chunks: says which ranks a step involves.
            extend: places one more page of a request; False when no rank has room.
            wants_drafts: whether the next step of some requests should have drafts, which follow known tokens alone.
        """
        self._page_size, self._chunks, self._extend, self._wants_drafts = page_size, chunks, extend, wants_drafts
        self._leaders: dict[int, tuple[Plan, Sequence[Request]]] = {}  # whose tokens are known, and nobody follows
        self._behind: dict[int, tuple[Plan, Sequence[Request]]] = {}  # the plan behind each, by the leader's number

    def note_plan(self, plan: Plan, requests: Sequence[Request], behind: Plan | None) -> None:
        """Take down that a plan is submitted, behind another one or not."""
        if behind is not None:
            self._leaders.pop(behind.plan_id, None)
            self._behind[behind.plan_id] = (plan, requests)
        elif plan.phase is Phase.DECODE:
            self._leaders[plan.plan_id] = (plan, requests)

    def note_end(self, plan_id: int) -> None:
        """Take down that a plan has come back: the tokens of the one behind it are known."""
        self._leaders.pop(plan_id, None)
        behind = self._behind.pop(plan_id, None)
        if behind is not None:
            self._leaders[behind[0].plan_id] = behind

    def clear(self) -> None:
        """Forget all plans."""
        self._leaders.clear()
        self._behind.clear()

    def find(self, cancelled: AbstractSet[int]) -> tuple[Plan, list[tuple[Request, int]]] | None:
        """The oldest plan that another one may follow now, and that one's requests with their ends.

        Args:
            cancelled: numbers of requests that end when their plan comes back.
        """
        for plan_id, (plan, requests) in sorted(self._leaders.items()):
            if all(request.delivery.last_plan_id == plan.plan_id for request in requests):
                chosen = self._chosen(plan, requests, cancelled)
                if chosen:
                    return plan, chosen
                del self._leaders[plan_id]  # not asked again with every plan: most reasons last
        return None

    def _chosen(
        self, plan: Plan, requests: Sequence[Request], cancelled: AbstractSet[int]
    ) -> list[tuple[Request, int]]:
        """The requests that a plan behind this one takes a token further; none if that would leave one behind."""
        if self._wants_drafts(requests):
            return []
        chosen: list[tuple[Request, int]] = []
        needs_all_ranks, of_plan = False, set(plan.ranks)
        for request in requests:
            start, end = request.num_planned, request.num_planned + 1
            if request.finish_reason is not None or request.request_id in cancelled:
                continue
            if start + 1 - request.prompt_len >= request.params.max_tokens:
                continue  # ends with the token that is being sampled
            if request.pauses_at is not None and start + 1 >= request.pauses_at:
                continue  # pauses with it
            if start != len(request.token_ids) or not can_sample_ahead(request) or request.crosses(end):
                return []
            allocation = request.allocation
            assert allocation is not None
            if end > allocation.num_pages * self._page_size and not self._extend(request):
                return []
            ranks = self._chunks.ranks(request, end)
            if not ranks <= of_plan:
                return []
            # The token is known where it is sampled, and nowhere else before it has come back.
            if len(allocation.page_ranks) > 1 and allocation.rank_at(start - 1) != allocation.rank_at(start):
                return []
            needs_all_ranks |= len(ranks) == len(plan.ranks)
            chosen.append((request, end))
        return chosen if needs_all_ranks else []
