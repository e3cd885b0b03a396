"""Pages of all ranks: gives requests what admission decided, page by page, and takes it back.

Holds the allocators of all ranks and KV groups and the promises to running requests; it alone changes allocations. Must
not know steps, torch or processes.
Read next: `longspan.scheduler.admission`, where requests go; `longspan.scheduler.reservations`, what they are promised.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from longspan.config import EngineConfig
from longspan.kv.prefix import CachingAllocator, PageHolders
from longspan.plan.moves import Move, PagePlace
from longspan.scheduler.admission import Admission, choose_packed, choose_spread
from longspan.scheduler.allocation import Allocation
from longspan.scheduler.page_placer import PagePlacer, pages_for
from longspan.scheduler.prefix_lookup import PrefixLookup
from longspan.scheduler.request import Request
from longspan.scheduler.reservations import RankPools, Reservations, Room
from longspan.scheduler.states import StateMemory
from longspan.scheduler.tiers import Tiers, TierSizes
from longspan.sharding.capacity import snapshot_len
from longspan.sharding.pages import PageRun
from longspan.types import ModelSpec, Placement


class KVMemory:
    """Pages of all ranks."""

    def __init__(self, model: ModelSpec, config: EngineConfig, num_pages: Sequence[Sequence[int]]) -> None:
        """Make empty pools.

        Args:
            model: its KV groups.
            config: of the engine.
            num_pages: pages of every pool, [rank][KV group]; behind a rank's groups slots of states, if the model has
                recurrent layers.
        """
        self.model, self.config = model, config
        self.num_ranks = config.context_parallel_size
        holders = [PageHolders() for _ in num_pages[0]]
        self.allocators = [
            [CachingAllocator(pages, of_group, rank) for pages, of_group in zip(of_rank, holders, strict=True)]
            for rank, of_rank in enumerate(num_pages)
        ]
        """[rank][pool]; see `longspan.scheduler.reservations.Room`."""
        self._pools = RankPools.of(model, config, num_pages)
        self.reservations = Reservations(self._pools)
        """What running requests may still need."""
        self.placer = PagePlacer(model, config, self._pools)
        """Where new pages go."""
        self.states = self._state_memory(holders[-1]) if model.state_groups else None
        """Slots of states, if the model has recurrent layers."""
        self.lookup = PrefixLookup(model, config.page_size, self.allocators, holders, self.states)
        self._specs = [group.spec for group in model.kv_groups]
        self.tiers = self._tiers() if config.has_tiers else None
        """What lies behind the pools, if anything does."""
        self.refused: Request | None = None
        """The request that `admit` refused last, while no room was made and no more of it was cached. The head of the
        queue asks before every step; to look for a long prompt's pages each time would take longer than the step."""
        self.num_queried_tokens = 0
        """Tokens of admitted requests that might have been cached."""
        self.num_hit_tokens = 0

    def _state_memory(self, holders: PageHolders) -> StateMemory:
        size, asked = self.config.page_size, self.config.state_snapshot_tokens
        every = snapshot_len(self.model, size) if asked is None else asked
        pool_idx = len(self.model.kv_groups)
        slots = [allocators[pool_idx] for allocators in self.allocators]
        return StateMemory(
            slots, holders, self.reservations, pool_idx, size, every if self.config.enable_prefix_caching else None
        )

    def _tiers(self) -> Tiers:
        return Tiers(
            self.allocators,
            [group.page_bytes(self.config.page_size) for group in self.model.kv_groups],
            self.config.page_size,
            TierSizes(self.config.kv_host_memory, self.config.disk_bytes),
            self.lookup.first_needed_page,
            [group.spec.reach for group in self.model.kv_groups],
        )

    @property
    def room(self) -> Room:
        """[rank][KV group]: pages that no request holds or has been promised."""
        available = [[allocator.num_available for allocator in allocators] for allocators in self.allocators]
        return self.reservations.room(available)

    def room_on(self, rank: int) -> list[int]:
        """[KV group]: the room of one rank."""
        promised = self.reservations.promised[rank]
        return [a.num_available - pages for a, pages in zip(self.allocators[rank], promised, strict=True)]

    @property
    def is_empty(self) -> bool:
        """Whether no request has pages or promises."""
        return not any(any(promised) for promised in self.reservations.promised) and not any(
            allocator.num_used for allocators in self.allocators for allocator in allocators
        )

    # -- admission ---------------------------------------------------------------------------------------------------

    def admit(self, request: Request, load: Sequence[float]) -> bool:
        """Find what is cached, place the pages of all known tokens, and promise them.

        Args:
            request: one without pages.
            load: work that waits per rank, in tokens to compute.

        Returns:
            False when they do not fit now; nothing has changed then.
        """
        if request is self.refused:
            return False
        admission = self.choose(request, load)
        self.refused = request if admission is None else None
        if admission is None:
            return False
        num_hit_tokens = len(admission.hit) * self.config.page_size
        request.admit(self._allocate(admission, request.page_hashes), num_hit_tokens)
        self.num_queried_tokens += len(request.token_ids) if _may_hit(request, self.config) else 0
        self.num_hit_tokens += num_hit_tokens
        return True

    def choose(self, request: Request, load: Sequence[float]) -> Admission | None:
        """Decide where a request would go now, or None when it does not fit. Arguments as in `admit`."""
        size, num_tokens = self.config.page_size, len(request.token_ids)
        copies_on: list[frozenset[int]] = []
        if _may_hit(request, self.config):
            hashes = request.hash_pages(size)
            copies_on = self.lookup.find(hashes[: _most_hit(request, size)])

        def taken(hit: Sequence[int], home: int | None) -> Room | None:
            return self.lookup.taken(request.page_hashes, hit, home)

        placement, pages = self.placer.placement_of(num_tokens), pages_for(num_tokens, size)
        held: list[int] = []
        if self.tiers is not None and _may_hit(request, self.config):
            held = self.tiers.held_on(request.page_hashes, len(copies_on), _most_hit(request, size))
        if placement is Placement.PACKED:
            slowness = [1 / share for share in self.placer.geometry.relative_shares]
            load = _without(load, held, size)
            return choose_packed(self._pools, size, pages, copies_on, taken, load, self.room_on, slowness)
        room = self.room
        found = choose_spread(self.placer, placement, pages, copies_on, taken, room, held)
        if found is None and held:
            found = choose_spread(self.placer, placement, pages, copies_on, taken, room)
        if found is None and copies_on and self.is_empty:
            # Nobody will make room: do without the hit, whose idle pages may be the room that it needs.
            found = choose_spread(self.placer, placement, pages, [], taken, room)
        return found

    def _allocate(self, admission: Admission, hashes: Sequence[bytes]) -> Allocation:
        """Take references to an admitted request's cached pages, and promise it its new ones."""
        hit, runs, home = admission
        allocation = Allocation(self.config.page_size, len(self._specs), len(self._pools.most_held))
        if self.states is not None and hit:
            place = self.states.find(hashes[len(hit) - 1], home)
            assert place is not None, "a hit ends where a state is kept"
            self.states.begin_from(allocation, place)
        used = [self.lookup.runs(hashes, hit, group_idx) for group_idx in range(len(self._specs))]
        for group_idx, cached in enumerate(used):  # all of them, before copies ask for room
            for run in cached:
                allocator = self.allocators[run.rank][group_idx]
                num_shared = sum([allocator.use(slot) for slot in range(run.slot, run.slot + run.num_pages)])
                self.reservations.share(group_idx, run.rank, num_shared)
        for group_idx, (table, cached) in enumerate(zip(allocation.tables, used, strict=True)):
            for run in cached:
                if home is None or run.rank == home:
                    table.apply([run])
                else:
                    near = table.runs[-1].slot + table.runs[-1].num_pages if table.runs else None
                    slots = self.allocators[home][group_idx].allocate(run.num_pages, near)
                    allocation.copy_to(home, group_idx, run, slots)
        allocation.num_hit_pages = allocation.num_published = len(hit)
        if allocation.copies:  # the copies are not published yet
            allocation.num_published = min(copy.source.page_idx for copy in allocation.copies)
        for rank, pages in groupby(hit):
            allocation.place(home if home is not None else rank, sum(1 for _ in pages))
        for rank, count in runs:
            allocation.place(rank, count)
            self.reservations.promise(allocation.claims, rank, count)
        return allocation

    # -- pages that a tier has ---------------------------------------------------------------------------------------

    def loadable_len(self, request: Request) -> int:
        """Tokens of an admitted request that need not be computed if a tier's pages are loaded."""
        allocation, size = request.allocation, self.config.page_size
        assert allocation is not None
        if self.tiers is None or not _may_hit(request, self.config):
            return request.num_computed
        last = _most_hit(request, size)
        ranks: list[int] = []
        for rank, start, end in allocation.ranks_of(request.num_computed, last * size):
            ranks += [rank] * ((end - start) // size)
        return size * self.tiers.find(request.page_hashes, request.num_computed // size, ranks)

    def take_moves(self) -> list[Move]:
        """Moves to send now, before any plan that is written after this call."""
        moves = [] if self.tiers is None else self.tiers.take_moves()
        if any(place.on_host for move in moves for place in move.stores):
            self.refused = None  # it may be placed where host memory has its pages
        return moves

    def load_s(self, request: Request, end: int) -> float:
        """Seconds that ranks are predicted to take to load what a request needs up to position `end`."""
        assert self.tiers is not None
        places: dict[int, list[PagePlace]] = {}
        for group_idx, rank, first, last in self._pages_to_load(request, end):
            hashes = request.page_hashes[first:last]
            places.setdefault(rank, []).extend(self.tiers.place(rank, group_idx, 0, h) for h in hashes)
        return max(self.tiers.load_s(of_rank) for of_rank in places.values())

    def grow_to_load(self, request: Request, end: int) -> dict[int, list[PagePlace]]:
        """Allocate the pages up to position `end` that later tokens need; return those of every rank."""
        allocation = request.allocation
        assert allocation is not None
        assert self.tiers is not None
        found: dict[int, list[PagePlace]] = {}
        for group_idx, rank, first, last in self._pages_to_load(request, end):
            table, page_idx = allocation.tables[group_idx], first
            for slot, count in self.allocators[rank][group_idx].allocate(last - first, table.slot_after(rank)):
                table.apply([PageRun(page_idx, rank, slot, count)])
                hashes = request.page_hashes[page_idx : page_idx + count]
                places = [self.tiers.place(rank, group_idx, slot + i, h) for i, h in enumerate(hashes)]
                found.setdefault(rank, []).extend(places)
                page_idx += count
            self.reservations.hold(allocation.claims, group_idx, rank, last - first)
        return found

    def _pages_to_load(self, request: Request, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (group, rank, first page, page behind the last) of what tokens from position `end` on need."""
        allocation, size = request.allocation, self.config.page_size
        assert allocation is not None
        for group_idx, table in enumerate(allocation.tables):
            page_idx = max(table.num_pages, self.lookup.first_needed_page(group_idx, end // size))
            for rank, first, last in allocation.ranks_of(page_idx * size, end):
                yield group_idx, rank, first // size, last // size

    def take_loaded(self, request: Request, places: Sequence[tuple[int, PagePlace]], end: int | None) -> None:
        """Let others find pages that were loaded, and let the request go on behind them.

        Args:
            request: for which they were loaded.
            places: (rank, page) of every page that came.
            end: position up to which the request has all that it needs; None if something is missing.
        """
        self.refused = None
        for rank, place in places:
            self.allocators[rank][place.pool_idx].publish(place.page_hash, place.slot)
        if end is None:
            return
        allocation = request.allocation
        assert allocation is not None
        request.note_loaded(end)
        if not allocation.copies:  # else pages before are not there yet
            allocation.num_published = end // self.config.page_size
        self.slide(request)

    # -- pages of a running request ----------------------------------------------------------------------------------

    def extend(self, request: Request) -> bool:
        """Place one more page, for tokens that are generated; False when no rank has room now.

        Where the rank that should have it is full, any rank with room will do.
        """
        allocation = request.allocation
        assert allocation is not None
        first = self.placer.next_rank(allocation, request.prompt_len)
        if self._extend_on(allocation, first):
            return True
        if not self.placer.may_leave_home:
            return False
        room, limiting = self.room, self._pools.limiting_group or 0
        others = [rank for rank in range(self.num_ranks) if rank != first]
        others.sort(key=lambda rank: (-room[rank][limiting], rank))
        return any(self._extend_on(allocation, rank) for rank in others)

    def _extend_on(self, allocation: Allocation, rank: int) -> bool:
        """Place one more page on a rank, if it has room."""
        available = [allocator.num_available for allocator in self.allocators[rank]]
        if not self.reservations.fits_one_more(allocation.claims, rank, available):
            return False
        allocation.place(rank, 1)
        self.reservations.promise(allocation.claims, rank, 1)
        return True

    def grow(self, request: Request, end: int) -> list[list[PageRun]]:
        """Allocate the pages that positions up to `end` need; they have been promised.

        Returns:
            Per KV group the runs added to the page table.
        """
        allocation = request.allocation
        assert allocation is not None
        size = self.config.page_size
        added: list[list[PageRun]] = []
        for group_idx, table in enumerate(allocation.tables):
            new: list[PageRun] = []
            if table.num_pages * size < end:
                for rank, first, last in allocation.ranks_of(table.num_pages * size, -(-end // size) * size):
                    allocator = self.allocators[rank][group_idx]
                    for slot, count in allocator.allocate((last - first) // size, table.slot_after(rank)):
                        new.append(table.append(rank, slot, count))
                    self.reservations.hold(allocation.claims, group_idx, rank, (last - first) // size)
            added.append(new)
        return added

    def publish(self, request: Request) -> None:
        """Let others find the pages that are full and computed, and stay."""
        allocation = request.allocation
        assert allocation is not None
        full = request.num_settled // self.config.page_size
        if allocation.kept_states and self.states is not None:
            self.states.publish(request, request.hash_pages(self.config.page_size))
            self.refused = None
        if full <= allocation.num_published or not self.config.enable_prefix_caching:
            return
        hashes = request.hash_pages(self.config.page_size)
        refused = [] if self.refused is None else self.refused.page_hashes
        for page_idx in range(allocation.num_published, full):
            if page_idx < len(refused) and refused[page_idx] == hashes[page_idx]:
                self.refused = None
            for group_idx, table in enumerate(allocation.tables):
                page = table.page(page_idx)
                if page is not None:
                    self.allocators[page[0]][group_idx].publish(hashes[page_idx], page[1])
                    if self.tiers is not None:
                        self.tiers.note_published(group_idx, page[0], hashes[page_idx], page_idx)
        allocation.num_published = full

    def withdraw(self, request: Request) -> None:
        """Let nobody find this request's pages any more, nor those that it was given: what they hold is in doubt."""
        self.refused = None
        if self.tiers is not None:
            self.tiers.note_withdrawn(request.page_hashes)
        for page_hash in request.page_hashes:
            for allocators in self.allocators:
                for allocator in allocators:
                    allocator.withdraw(page_hash)

    def release_copied(self, request: Request) -> None:
        """Give the sources of a request's copies back: they are no longer needed."""
        allocation = request.allocation
        assert allocation is not None
        if self.states is not None and (allocation.left_states or allocation.state_source is not None):
            self.refused = None
            self.states.release_left(allocation)
        if not allocation.copies:
            return
        self.refused = None
        for copy in allocation.copies:
            self._drop(copy.group_idx, copy.source)
        allocation.copies = []

    def slide(self, request: Request) -> None:
        """Free the pages that no later token sees."""
        allocation = request.allocation
        assert allocation is not None
        for group_idx, spec in enumerate(self._specs):
            if spec.reach is not None:
                first = spec.first_key(request.num_settled) // self.config.page_size
                for source in allocation.leave_copies_before(group_idx, first) if allocation.copies else ():
                    self._drop(group_idx, source)  # the window of loaded pages may begin behind those to copy
                self._release(allocation, group_idx, allocation.tables[group_idx].free_before(first))

    def free(self, request: Request) -> None:
        """Take back everything that a request holds and has been promised."""
        self.refused = None
        self.release_copied(request)
        allocation = request.allocation
        assert allocation is not None
        if self.states is not None:
            self.states.free(allocation)
        for group_idx, table in enumerate(allocation.tables):
            self._release(allocation, group_idx, table.free_before(table.num_pages))
        self.reservations.release(allocation.claims)

    def _release(self, allocation: Allocation, group_idx: int, runs: Sequence[PageRun]) -> None:
        """Give pages back that a request's page table has dropped."""
        if runs and runs[0].page_idx < allocation.num_hit_pages:
            self.refused = None  # no request has been promised a page in its place
        for run in reversed(runs):  # the last page becomes idle first, and is evicted first
            self._drop(group_idx, run)
            new = run.page_idx + run.num_pages - max(run.page_idx, allocation.num_hit_pages)
            if new > 0:
                self.reservations.hold(allocation.claims, group_idx, run.rank, -new)

    def _drop(self, group_idx: int, run: PageRun) -> None:
        """Drop a reference to consecutive pages."""
        num_shared = self.allocators[run.rank][group_idx].release(run.slot, run.num_pages)
        self.reservations.share(group_idx, run.rank, -num_shared)

    def forget_all(self) -> None:
        """Take the pools of all ranks for new ones: nothing is held, promised or cached."""
        self.refused = None
        if self.tiers is not None:
            self.tiers.lose_ranks()
        self.reservations.forget_all()
        for allocators in self.allocators:
            for allocator in allocators:
                allocator.forget_all()

    def take_over(self, other: "KVMemory") -> None:
        """Go on with the counts of a memory of other ranks; its pages are lost with them."""
        self.num_queried_tokens, self.num_hit_tokens = other.num_queried_tokens, other.num_hit_tokens
        if self.tiers is not None and other.tiers is not None:
            self.tiers.take_over(other.tiers)

    def check_integrity(self) -> None:
        """Assert that the allocators are sound, and that every promise can be kept."""
        for allocators, promised in zip(self.allocators, self.reservations.promised, strict=True):
            for allocator, pages in zip(allocators, promised, strict=True):
                allocator.check_integrity()
                assert 0 <= pages <= allocator.num_available, "more pages are promised than there are"
        if self.tiers is not None:
            self.tiers.check_integrity()


def _without(load: Sequence[float], held: Sequence[int], page_size: int) -> Sequence[float]:
    """The load of ranks as a request sees it whose pages lie in the host memory of some: there it has less to compute.

    Args:
        load: work that waits per rank, in tokens.
        held: rank of every page that host memory has, behind those that pools have.
        page_size: tokens per page.
    """
    if not held:
        return load
    return [work - page_size * held.count(rank) for rank, work in enumerate(load)]


def _most_hit(request: Request, page_size: int) -> int:
    """Pages of a request that need not be computed if they are cached: those before its last token, whose logits are in
    no page, and of one that follows another those of tokens that it was given, as the others may be taken back."""
    most = len(request.token_ids) - 1
    return (most if request.num_given is None else min(most, request.num_given)) // page_size


def _may_hit(request: Request, config: EngineConfig) -> bool:
    """Whether cached pages may stand in for computing: not where the logits of all prompt tokens are asked for."""
    return config.enable_prefix_caching and request.params.prompt_logprobs is None
