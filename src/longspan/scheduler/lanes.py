"""Which request leads the next plan, of those whose ranks are idle.

Holds requests that are ready, by the ranks that their next steps may involve, and the order of turns. Must not know
pages, budgets, or what else is in a step.
Read next: `longspan.scheduler.turns`, whose turn it is; `longspan.scheduler.scheduler`, which asks.

Note [Touched lanes]
    With many ranks most requests lie on one rank each, and a plan comes back from one of them at a time. So requests on
    one rank are kept by rank, in a *lane*, with their turns in order; a lane is looked at again only when a request has
    joined or left it, and the least turns of idle lanes are in a heap. Requests on several ranks are few: they are gone
    through for every plan. The order is the same as if all turns were made and sorted each time.
"""

import heapq
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet

from longspan.scheduler.request import Request
from longspan.scheduler.turns import Turn, Turns


class Lanes:
    """Requests that are ready: they have their next page, and no plan in flight computes them."""

    def __init__(self, turns: Turns, num_ranks: int) -> None:
        """Begin without requests.

        Args:
            turns: gives requests their turns.
            num_ranks: ranks of the engine.
        """
        self._turns = turns
        self._ranks_of: dict[int, AbstractSet[int]] = {}  # request to the ranks of its next step
        self._wide: dict[int, Request] = {}  # requests on several ranks
        self._lanes: list[dict[int, Request]] = [{} for _ in range(num_ranks)]
        self._order: list[list[Turn]] = [[] for _ in range(num_ranks)]  # turns of each lane, if it is not `_touched`
        self._oldest: list[int | None] = [None] * num_ranks  # last plan of the prompt in a lane that waited longest
        self._oldest_of_all: int | None = None  # at most that of any lane
        self._impatient: set[int] = set()  # lanes where a prompt has lost its patience: their order may change
        self._version = [0] * num_ranks  # grows when a lane is touched
        self._touched: set[int] = set()
        self._heap: list[tuple[Turn, int, int]] = []  # (least turn, rank, version)

    def __len__(self) -> int:
        return len(self._ranks_of)

    def put(self, ready: Iterable[tuple[Request, AbstractSet[int]]]) -> None:
        """Add requests that are ready, each with the ranks that its next step may involve."""
        version, touched = self._version, self._touched
        for request, ranks in ready:
            request_id = request.request_id
            self._ranks_of[request_id] = ranks
            if len(ranks) > 1:
                self._wide[request_id] = request
                continue
            (rank,) = ranks
            self._lanes[rank][request_id] = request
            version[rank] += 1
            touched.add(rank)

    def discard(self, requests: Iterable[Request]) -> None:
        """Take requests out, those that are there."""
        version, touched = self._version, self._touched
        for request in requests:
            request_id = request.request_id
            ranks = self._ranks_of.pop(request_id, None)
            if ranks is None:
                continue
            if len(ranks) > 1:
                del self._wide[request_id]
                continue
            (rank,) = ranks
            del self._lanes[rank][request_id]
            version[rank] += 1
            touched.add(rank)

    def note_prefill(self, ranks: AbstractSet[int]) -> None:
        """Take down that a plan with a prompt takes prefill's turn on these ranks: others' turns change."""
        for rank in ranks:
            if self._lanes[rank]:
                self._touch(rank)

    def clear(self) -> None:
        """Take all requests out."""
        for rank, lane in enumerate(self._lanes):
            lane.clear()
            self._touch(rank)
        self._impatient.clear()
        self._ranks_of.clear()
        self._wide.clear()
        self._heap.clear()
        for order in self._order:
            order.clear()

    def lead(self, busy: AbstractSet[int], next_plan_id: int, num_running: int) -> Turn | None:
        """The request that leads the next plan: the first one whose ranks are idle, and claimed by none before it.

        Args:
            busy: ranks with a plan in flight.
            next_plan_id: number of the next plan.
            num_running: requests that run.
        """
        self._sort_touched(busy, next_plan_id, num_running)
        wide = self._wide_turns(next_plan_id, num_running)
        claimed: set[int] = set()
        passed: list[tuple[Turn, int, int]] = []  # idle lanes that somebody has claimed
        found: Turn | None = None
        index = 0
        while found is None:
            lane = self._first_idle(busy)
            if index < len(wide) and (lane is None or wide[index] < lane[0]):
                turn = wide[index]
                index += 1
                if turn.ranks.isdisjoint(busy) and turn.ranks.isdisjoint(claimed):
                    found = turn
                else:
                    claimed |= turn.ranks
            elif lane is None:
                break
            elif lane[1] in claimed:
                passed.append(heapq.heappop(self._heap))
            else:
                found = lane[0]
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found

    def members(self, lead: Turn, next_plan_id: int, num_running: int) -> list[Turn]:
        """Requests whose next steps involve no other ranks than the lead's, in the order of their turns.

        Args:
            lead: what `lead` found for the same plan.
            next_plan_id: number of the next plan.
            num_running: requests that run.
        """
        ranks = lead.ranks
        if len(ranks) == 1:
            (rank,) = ranks
            return self._order[rank]
        found = [turn for rank in ranks for turn in self._order[rank]]
        for turn in self._wide_turns(next_plan_id, num_running):
            if turn.ranks <= ranks:
                found.append(lead if turn.request is lead.request else turn)
        return sorted(found)

    def __iter__(self) -> Iterator[Request]:
        for lane in self._lanes:
            yield from lane.values()
        yield from self._wide.values()

    def _wide_turns(self, next_plan_id: int, num_running: int) -> list[Turn]:
        """Turns of the requests on several ranks, in order."""
        return sorted(
            [
                self._turns.of(request, self._ranks_of[request_id], next_plan_id, num_running)
                for request_id, request in self._wide.items()
            ]
        )

    # -- order -------------------------------------------------------------------------------------------------------

    def _touch(self, rank: int) -> None:
        self._version[rank] += 1
        self._touched.add(rank)

    def _sort_touched(self, busy: AbstractSet[int], next_plan_id: int, num_running: int) -> None:
        """Put the turns of touched lanes in order, those of busy ranks later."""
        if self._impatient or self._turns.is_too_long(self._oldest_of_all, next_plan_id, num_running):
            self._oldest_of_all = min((oldest for oldest in self._oldest if oldest is not None), default=None)
            for rank, oldest in enumerate(self._oldest):
                if rank in self._impatient or self._turns.is_too_long(oldest, next_plan_id, num_running):
                    self._touch(rank)
        for rank in [rank for rank in self._touched if rank not in busy]:
            self._touched.discard(rank)
            self._impatient.discard(rank)
            lane = self._lanes[rank]
            order = [
                self._turns.of(request, self._ranks_of[request_id], next_plan_id, num_running)
                for request_id, request in lane.items()
            ]
            order.sort()
            self._order[rank] = order
            if order:
                heapq.heappush(self._heap, (order[0], rank, self._version[rank]))
            waiting = [turn.last_plan_id for turn in order if not turn.is_decode]
            self._oldest[rank] = oldest = min(waiting) if waiting else None
            if oldest is not None:
                self._oldest_of_all = oldest if self._oldest_of_all is None else min(self._oldest_of_all, oldest)
                if self._turns.is_too_long(oldest, next_plan_id, num_running):
                    self._impatient.add(rank)

    def _first_idle(self, busy: AbstractSet[int]) -> tuple[Turn, int, int] | None:
        """The least entry of an idle lane; what is out of date before it is dropped."""
        heap = self._heap
        while heap:
            _, rank, version = heap[0]
            if version == self._version[rank]:
                if rank not in busy:
                    return heap[0]
                self._touched.add(rank)  # its turns come back when it is idle
            heapq.heappop(heap)
        return None
