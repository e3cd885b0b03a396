"""States of recurrent layers on all ranks: gives a request the slots of each step, and keeps states for later requests.

Holds the slots of all ranks; it alone changes an allocation's states. Must not know steps, torch, or how states move.
Read next: `longspan.scheduler.allocation`; `longspan.plan.types`, `StateStep`; `longspan.cp.relay`, which runs it.

Note [Slots]
    A running request has one state, on the rank that computed its latest token. The pool of slots is one more pool of a
    rank, in which a request holds one slot at most, so promises are made and kept as for pages
    (`longspan.scheduler.reservations`): a request is promised a slot on every rank that has a page of it, and takes it
    when its state comes there. The slot that the state has left is free again when the step is done.

    A state can be kept only where one exists: behind a row that a step computes. While a prompt is computed, copies are
    kept every `snapshot_len` tokens and at its last full page, in slots that nobody was promised. They are published
    under the hash of the page that ends there, like pages, and evicted like pages, the one used longest ago first. A
    prefix can be gone on from where it has both its pages and a state at its end.
"""

from collections.abc import Iterator, Sequence

from longspan.kv.prefix import CachingAllocator, PageHolders
from longspan.plan.types import KeptState, StatePlace, StateStep
from longspan.scheduler.allocation import Allocation
from longspan.scheduler.request import Request
from longspan.scheduler.reservations import Reservations


class StateMemory:
    """Slots of all ranks."""

    def __init__(
        self,
        allocators: Sequence[CachingAllocator],
        holders: PageHolders,
        reservations: Reservations,
        pool_idx: int,
        page_size: int,
        snapshot_len: int | None,
    ) -> None:
        """Begin with free slots.

        Args:
            allocators: of every rank's slots.
            holders: record of published states that they share.
            reservations: what requests have been promised.
            pool_idx: index of the slots among a rank's pools.
            page_size: tokens per page.
            snapshot_len: tokens from one kept state of a prompt to the next; None keeps none.
        """
        self._allocators, self._holders = allocators, holders
        self._reservations, self.pool_idx = reservations, pool_idx
        self._page_size, self._snapshot_len = page_size, snapshot_len

    def find(self, page_hash: bytes, home: int | None) -> StatePlace | None:
        """Where the state behind a page is kept: on the rank `home` if it is there."""
        ranks = self._holders.of(page_hash)
        if not ranks:
            return None
        rank = home if home is not None and home in ranks else min(ranks)
        slot = self._allocators[rank].find(page_hash)
        assert slot is not None
        return StatePlace(rank, slot)

    def begin_from(self, allocation: Allocation, place: StatePlace) -> None:
        """Let a request that is admitted go on from a kept state."""
        self._allocators[place.rank].use(place.slot)
        allocation.state_source = place

    def keeps_at(self, request: Request, position: int) -> bool:
        """Whether the state behind so many tokens of a request is worth a copy."""
        if self._snapshot_len is None or not position or position % self._page_size:
            return False
        return (
            position % self._snapshot_len == 0
            or position == (request.prompt_len - 1) // self._page_size * self._page_size
        )

    def step(self, request: Request, start: int, end: int) -> StateStep:
        """Say where the state of a request lies before and behind a step over `[start, end)`, and what is kept."""
        allocation = request.allocation
        assert allocation is not None
        rank, before = allocation.rank_at(end - 1), allocation.state
        source = before or allocation.state_source
        if before is None or before.rank != rank:
            place = StatePlace(rank, self._take(rank))
            self._reservations.hold(allocation.claims, self.pool_idx, rank, 1)
            if before is not None:
                allocation.left_states.append(before)
            allocation.state = place
        assert allocation.state is not None
        kept = tuple(self._keep(request, allocation, start, end))
        allocation.kept_states += kept
        return StateStep(request.request_id, source, allocation.state, kept)

    def _keep(self, request: Request, allocation: Allocation, start: int, end: int) -> Iterator[KeptState]:
        """Take slots for copies of a step's states, as long as there are some that nobody was promised."""
        size = self._page_size
        for position in range((start // size + 1) * size, end + 1, size):
            if not self.keeps_at(request, position):
                continue
            rank, page_idx = allocation.rank_at(position - 1), position // size - 1
            allocator = self._allocators[rank]
            is_known = page_idx < len(request.page_hashes) and allocator.knows(request.page_hashes[page_idx])
            if not is_known and allocator.num_available > self._reservations.promised[rank][self.pool_idx]:
                yield KeptState(position, StatePlace(rank, self._take(rank)))

    def publish(self, request: Request, hashes: Sequence[bytes]) -> None:
        """Let others find the states that were kept by steps that are done."""
        allocation = request.allocation
        assert allocation is not None
        while allocation.kept_states and allocation.kept_states[0].position <= request.num_computed:
            kept = allocation.kept_states.pop(0)
            allocator = self._allocators[kept.place.rank]
            allocator.publish(hashes[kept.position // self._page_size - 1], kept.place.slot)
            allocator.release(kept.place.slot, 1)

    def release_left(self, allocation: Allocation) -> None:
        """Give back the slots that a request's state has left with the step that is done."""
        for place in allocation.left_states:
            self._drop(allocation, place)
        allocation.left_states = []
        if allocation.state_source is not None and allocation.state is not None:
            self._allocators[allocation.state_source.rank].release(allocation.state_source.slot, 1)
            allocation.state_source = None

    def free(self, allocation: Allocation) -> None:
        """Take back all slots of a request."""
        self.release_left(allocation)
        if allocation.state_source is not None:
            self._allocators[allocation.state_source.rank].release(allocation.state_source.slot, 1)
        if allocation.state is not None:
            self._drop(allocation, allocation.state)
        for kept in allocation.kept_states:
            self._allocators[kept.place.rank].release(kept.place.slot, 1)
        allocation.state, allocation.state_source, allocation.kept_states = None, None, []

    def _take(self, rank: int) -> int:
        ((slot, _),) = self._allocators[rank].allocate(1)
        return slot

    def _drop(self, allocation: Allocation, place: StatePlace) -> None:
        self._allocators[place.rank].release(place.slot, 1)
        self._reservations.hold(allocation.claims, self.pool_idx, place.rank, -1)
