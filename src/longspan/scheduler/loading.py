"""Requests that wait for pages of a tier while others run.

Holds what each of them waits for. Must not know queues, plans, or how pages are loaded.
Read next: `longspan.scheduler.tiers`; Note [Waiting for pages].

Note [Waiting for pages]
    A request is admitted as any other: its pages are placed, and those of its known tokens promised. If a tier has
    pages behind those that a pool has, and loading them is predicted to take less time than computing them, they get
    slots at once, each rank is told to load its own, and the request waits: it runs, but takes part in no plan. When
    every rank has answered, the request goes on behind the loaded pages.

    If one of them could not be loaded, the request gives all its pages back and is admitted again: the pages that did
    come are in the prefix cache then, and the one that is missing is forgotten by the tier.

    A request that is finished meanwhile ends at once, but its pages stay taken until the ranks have answered, as they
    may still be written.
"""

from collections.abc import Set as AbstractSet
from typing import NamedTuple

from longspan.costmodel.step_time import StepTime
from longspan.plan.moves import Move, PagePlace
from longspan.scheduler.memory import KVMemory
from longspan.scheduler.request import Request


class _Load:
    """What one request waits for."""

    def __init__(self, request: Request, end: int, move_ids: set[int]) -> None:
        self.request, self.end, self.move_ids = request, end, move_ids
        self.came: list[tuple[int, PagePlace]] = []  # (rank, page)
        self.has_failed = False


class Ended(NamedTuple):
    """A wait that has ended."""

    request: Request
    has_all: bool
    """Whether all pages came."""
    is_wanted: bool
    """Whether the request still runs."""


class Loading:
    """Requests that wait."""

    def __init__(self, memory: KVMemory, step_time: StepTime) -> None:
        """Begin without requests.

        Args:
            memory: has the pages and the tiers.
            step_time: predicts how long computing takes.
        """
        self._memory, self._step_time = memory, step_time
        self._by_move: dict[int, _Load] = {}
        self._by_request: dict[int, _Load] = {}
        self._left: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._by_request)

    @property
    def left(self) -> list[Request]:
        """Requests that have ended, whose pages are taken until their loads end."""
        return list(self._left.values())

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._by_request

    def begin(self, request: Request) -> bool:
        """Let a request that was just admitted wait for a tier's pages, if there are any that are sooner loaded than
        computed; return whether it waits."""
        memory, tiers, start = self._memory, self._memory.tiers, request.num_computed
        end = start if tiers is None else memory.loadable_len(request)
        if tiers is None or end == start or not self._is_sooner(request, end):
            return False
        by_rank = memory.grow_to_load(request, end)
        move_ids = {move_id for rank, places in sorted(by_rank.items()) for move_id in tiers.order_load(rank, places)}
        load = _Load(request, end, move_ids)
        self._by_move.update(dict.fromkeys(load.move_ids, load))
        self._by_request[request.request_id] = load
        request.note_planned(end)
        return True

    def _is_sooner(self, request: Request, end: int) -> bool:
        """Whether pages up to `end` are predicted to be loaded in less time than it takes to compute them."""
        memory, allocation, start = self._memory, request.allocation, request.num_computed
        assert allocation is not None
        shares = memory.placer.geometry.relative_shares
        speed = sum(shares[rank] for rank in allocation.ranks_with(start, end))
        compute_s = self._step_time.chunk_flops(start, end) / (self._step_time.flops_per_s * speed)
        return memory.load_s(request, end) < compute_s

    def leave(self, request: Request) -> None:
        """Take down that a request has ended: its pages are given back when its load ends."""
        self._left[request.request_id] = request

    def take(self, move: Move, failed: AbstractSet[int]) -> Ended | None:
        """Take in that a move has ended, and which of its loads are of no use; return the wait that ends with it."""
        load = self._by_move.pop(move.move_id, None)
        if load is None:
            return None
        load.has_failed |= bool(failed)
        load.came += [(move.rank, place) for i, place in enumerate(move.loads) if i not in failed]
        load.move_ids.discard(move.move_id)
        if load.move_ids:
            return None
        request = load.request
        del self._by_request[request.request_id]
        if self._left.pop(request.request_id, None) is not None:
            self._memory.free(request)
            return Ended(request, not load.has_failed, is_wanted=False)
        start = request.num_computed
        self._memory.take_loaded(request, load.came, None if load.has_failed else load.end)
        if self._memory.tiers is not None and not load.has_failed:
            self._memory.tiers.note_hit([place for _, place in load.came], request.num_computed - start)
        return Ended(request, not load.has_failed, is_wanted=True)

    def clear(self) -> None:
        """Forget all: the ranks are gone, and their pages."""
        self._by_move.clear()
        self._by_request.clear()
        self._left.clear()
