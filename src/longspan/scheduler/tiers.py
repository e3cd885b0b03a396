"""Tiers behind the ranks' pools: which pages they have, which are to be stored, and moves that are under way.

Holds hashes, and counts of what was moved. Must not know requests, files, clocks, or how a rank moves pages.
Read next: `longspan.plan.moves`, what is ordered; `longspan.scheduler.loading`, requests that wait for pages.

Note [Tiers]
    A full page that a step has computed is published (`longspan.kv.prefix`) and, where a tier lacks it, queued to be
    stored. Its rank is told so a few pages at a time, as long as its pool still has the page: a page that is evicted
    before its turn is not stored. So a slow disk holds nobody up, and costs bounded memory.

    host    memory of one rank, which alone loads from it; what it has is known exactly (`HostPages`)
    disk    files, which every rank loads; known as a set of hashes that may be out of date: others remove files, or
            write some. A page that cannot be loaded is forgotten, and computed.
"""

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, NamedTuple

from longspan.kv.page_directory import PageKey
from longspan.kv.prefix import CachingAllocator
from longspan.plan.moves import Move, Moved, PagePlace
from longspan.scheduler.host_pages import HostPages

TierName = Literal["host", "disk"]

STORE_BYTES = 8 * 2**20
"""Bytes of pages that one move stores, about: they are copied between two plans of their rank."""
MOST_STORING_BYTES = 8 * STORE_BYTES
"""Bytes of pages that a rank may have been told to store and has not answered, about."""
FIRST_BYTES_PER_S = {"host": 4e9, "disk": 1e9}
"""Rates of loading that are assumed before the first load."""
MEMORY = 0.5
"""Weight of earlier loads in the rate, when a new one is learnt."""


class TierSizes(NamedTuple):
    """Bytes that tiers may hold."""

    host: int | None
    """Of each rank; None if there is no such tier."""
    disk: int | None
    """Of all files; None if there is no such tier."""


@dataclass(slots=True)
class TierCounts:
    """Totals of one tier since the start."""

    stored_pages: int = 0
    stored_bytes: int = 0
    store_s: float = 0.0
    """Seconds that ranks took to store, summed over ranks."""
    loaded_pages: int = 0
    loaded_bytes: int = 0
    load_s: float = 0.0
    """Seconds that ranks took to load, summed over ranks."""
    num_loads: int = 0
    """Requests that got pages from the tier."""
    hit_tokens: int = 0
    """Tokens of these requests that were loaded."""
    failed_pages: int = 0
    """Pages that could not be stored, or loaded."""
    damaged_pages: int = 0
    """Pages whose files were damaged."""
    dropped_pages: int = 0
    """Pages that left their pool before they were stored."""


@dataclass(slots=True)
class _Rank:
    """One rank's side."""

    host: HostPages
    queue: dict[PageKey, None] = field(default_factory=dict)
    """Pages to be stored."""
    storing_bytes: int = 0
    """Bytes that it was told to store and has not answered."""


class Tiers:
    """What lies behind the pools of all ranks."""

    def __init__(
        self,
        allocators: Sequence[Sequence[CachingAllocator]],
        page_bytes: Sequence[int],
        page_size: int,
        sizes: TierSizes,
        first_needed: Callable[[int, int], int],
        reaches: Sequence[int | None],
    ) -> None:
        """Know of no page yet.

        Args:
            allocators: [rank][pool].
            page_bytes: bytes of a page per pool.
            page_size: tokens per page.
            sizes: of the tiers; one of them is there at least.
            first_needed: function from (KV group, number of pages) to the first of the pages that later tokens see.
            reaches: per KV group, most keys that a query sees; None for all.
        """
        self._allocators, self._page_bytes, self._page_size = allocators, page_bytes, page_size
        self._sizes, self._first_needed = sizes, first_needed
        self._full = [i for i, reach in enumerate(reaches) if reach is None]
        self._windowed = [i for i, reach in enumerate(reaches) if reach is not None]
        self._on_disk: list[set[bytes]] = [set() for _ in page_bytes]
        self._ranks = [_Rank(HostPages(sizes.host or 0, page_bytes)) for _ in allocators]
        self._storing: dict[PageKey, int] = {}  # under way, or queued: the rank
        self._sent: dict[int, Move] = {}
        self._unsent: list[Move] = []
        self._used: list[list[PageKey]] = []
        self._doubted: list[PageKey] = []
        self._loads_in_doubt: dict[int, set[int]] = {}  # move to those of its loads that nobody may use
        self._bytes_per_s = dict(FIRST_BYTES_PER_S)
        self.next_move_id = 0
        self.counts: dict[TierName, TierCounts] = {}
        """Per tier that is there."""
        if sizes.host is not None:
            self.counts["host"] = TierCounts()
        if sizes.disk is not None:
            self.counts["disk"] = TierCounts()

    # -- what tiers have ---------------------------------------------------------------------------------------------

    def num_pages(self, tier: TierName) -> int:
        """Pages that a tier is thought to have."""
        return sum(map(len, self._on_disk)) if tier == "disk" else sum(len(rank.host) for rank in self._ranks)

    def num_bytes(self, tier: TierName) -> int:
        """Bytes of these pages."""
        if tier == "host":
            return sum(rank.host.num_bytes for rank in self._ranks)
        return sum(len(known) * size for known, size in zip(self._on_disk, self._page_bytes, strict=True))

    def note_found(self, keys: Iterable[PageKey]) -> None:
        """Take down that a look at the disk has found pages."""
        doubted = set(self._doubted)
        for key in keys:
            if key.pool_idx < len(self._on_disk) and key not in doubted:
                self._on_disk[key.pool_idx].add(key.page_hash)

    def note_gone(self, keys: Iterable[PageKey]) -> None:
        """Take down that pages were removed from the disk."""
        for pool_idx, page_hash in keys:
            self._on_disk[pool_idx].discard(page_hash)

    def note_used(self, hashes: Sequence[bytes]) -> None:
        """Take down that pages of one request, from its first one on, were used now."""
        for page_hash in reversed(hashes):  # the first page is used last
            for pool_idx in range(len(self._page_bytes)):
                for rank in self._ranks if self._sizes.host is not None else ():
                    rank.host.touch(PageKey(pool_idx, page_hash))
        pools = list(enumerate(self._on_disk)) if self._sizes.disk is not None else []
        keys = [PageKey(i, h) for h in hashes for i, known in pools if h in known or PageKey(i, h) in self._storing]
        if keys:
            self._used.append(keys)

    def take_used(self) -> list[list[PageKey]]:
        """Pages on disk that requests have used since the last call, the first page first, once they are stored: the
        last one comes last, about."""
        ready = [keys for keys in self._used if keys[-1] not in self._storing]
        self._used = [keys for keys in self._used if keys[-1] in self._storing]
        return ready

    def tier_of(self, pool_idx: int, page_hash: bytes, rank: int) -> TierName | None:
        """Where a rank would load a page from; None if nowhere."""
        if self._sizes.host is not None and PageKey(pool_idx, page_hash) in self._ranks[rank].host:
            return "host"
        return "disk" if page_hash in self._on_disk[pool_idx] else None

    def find(self, hashes: Sequence[bytes], first: int, ranks: Sequence[int]) -> int:
        """How many pages of a prompt there would be if the tiers' were loaded behind those that a pool has.

        Args:
            hashes: of the prompt's pages.
            first: pages that are there.
            ranks: of the pages behind them, as many as are of use.

        Returns:
            `first` if the tiers have nothing of use.
        """
        end = first
        for rank in ranks:
            if any(self.tier_of(group_idx, hashes[end], rank) is None for group_idx in self._full):
                break
            end += 1
        gaps = [
            list(
                accumulate(
                    (i if self.tier_of(g, hashes[i], ranks[i - first]) is None else -1 for i in range(first, end)), max
                )
            )
            for g in self._windowed
        ]
        for length in range(end, first, -1):
            firsts = [max(first, self._first_needed(g, length)) for g in self._windowed]
            if all(gap[length - 1 - first] < start for gap, start in zip(gaps, firsts, strict=True)):
                return length
        return first

    def held_on(self, hashes: Sequence[bytes], first: int, last: int) -> list[int]:
        """Ranks whose host memory has the pages behind `first`, as far as there is one for each."""
        found: list[int] = []
        if self._sizes.host is None or not self._full:
            return found
        for page_hash in hashes[first:last]:
            keys = [PageKey(group_idx, page_hash) for group_idx in self._full]
            order = [*found[-1:], *range(len(self._ranks))]  # stay on a rank as long as it has the pages
            rank = next((r for r in order if all(key in self._ranks[r].host for key in keys)), None)
            if rank is None:
                break
            found.append(rank)
        return found

    def load_s(self, places: Sequence[PagePlace]) -> float:
        """Seconds that a rank is predicted to take to load pages."""
        return sum(self._page_bytes[p.pool_idx] / self._bytes_per_s[_tier(p)] for p in places)

    def place(self, rank: int, pool_idx: int, slot: int, page_hash: bytes) -> PagePlace:
        """A page that a rank is to load, with the tier that it comes from."""
        tier = self.tier_of(pool_idx, page_hash, rank)
        return PagePlace(pool_idx, slot, page_hash, on_host=tier == "host", on_disk=tier == "disk")

    # -- what is to be stored ----------------------------------------------------------------------------------------

    def note_published(self, pool_idx: int, rank: int, page_hash: bytes, page_idx: int) -> None:
        """Queue a page that a pool has, if a tier lacks it; `page_idx` is its place in its request."""
        key = PageKey(pool_idx, page_hash)
        if key not in self._storing and any(self._lacks(key, rank, page_idx)):
            self._ranks[rank].queue[key] = None
            self._storing[key] = rank

    def _lacks(self, key: PageKey, rank: int, page_idx: int = 0) -> tuple[bool, bool]:
        """Whether host memory and disk are there, and without a page."""
        host = self._ranks[rank].host
        to_host = self._sizes.host is not None and key not in host and host.fits(key.pool_idx)
        # If one request had more than the disk holds, its first pages would have to go for its last.
        most = 0 if self._sizes.disk is None else self._sizes.disk // sum(self._page_bytes)
        return to_host, page_idx < most and key.page_hash not in self._on_disk[key.pool_idx]

    def note_withdrawn(self, hashes: Sequence[bytes]) -> None:
        """Take down that what pages hold is in doubt: they are not to be found any more, nor to be loaded."""
        withdrawn = set(hashes)
        for move in (*self._sent.values(), *self._unsent):
            in_doubt = {i for i, place in enumerate(move.loads) if place.page_hash in withdrawn}
            if in_doubt:
                self._loads_in_doubt.setdefault(move.move_id, set()).update(in_doubt)
        for pool_idx, on_disk in enumerate(self._on_disk):
            for page_hash in hashes:
                key = PageKey(pool_idx, page_hash)
                if (rank := self._storing.get(key)) is not None and key in self._ranks[rank].queue:
                    del self._ranks[rank].queue[key], self._storing[key]
                if page_hash in on_disk or key in self._storing:
                    self._doubted.append(key)
                on_disk.discard(page_hash)
                for i, of_rank in enumerate(self._ranks):
                    if of_rank.host.drop(key):
                        self._unsent.append(Move(self._next_id(), i, drops=(key,)))

    def take_doubted(self) -> list[PageKey]:
        """Pages that are to be removed from the disk, of those that are not being stored."""
        ready = [key for key in self._doubted if key not in self._storing]
        self._doubted = [key for key in self._doubted if key in self._storing]
        return ready

    # -- moves -------------------------------------------------------------------------------------------------------

    def order_load(self, rank: int, places: Sequence[PagePlace]) -> list[int]:
        """Order a rank to load pages; return the numbers of the moves, one per tier."""
        move_ids: list[int] = []
        for on_host in (True, False):
            if of_tier := tuple([place for place in places if place.on_host == on_host]):
                move_ids.append(self._next_id())
                self._unsent.append(Move(move_ids[-1], rank, loads=of_tier))
        return move_ids

    def take_moves(self) -> list[Move]:
        """Moves to send now, before any plan that is written after this call."""
        moves, self._unsent = self._unsent, []
        for i, rank in enumerate(self._ranks):
            while rank.queue and rank.storing_bytes < MOST_STORING_BYTES:
                move = self._next_stores(i)
                if move.stores or move.drops:
                    moves.append(move)
                    rank.storing_bytes += self._bytes_of(move.stores)
        self._sent.update({move.move_id: move for move in moves})
        return moves

    def _next_stores(self, rank: int) -> Move:
        """What a rank stores next, of the pages that its pools still have."""
        stores: list[tuple[PageKey, int, bool, bool]] = []  # page, its slot, to host memory, to the disk
        was_kept: dict[PageKey, bool] = {}  # pages that come or go: whether the rank has them in host memory now
        queue, host, num_bytes = self._ranks[rank].queue, self._ranks[rank].host, 0
        while queue and num_bytes < STORE_BYTES:
            key = next(iter(queue))
            del queue[key]
            slot = self._allocators[rank][key.pool_idx].find(key.page_hash)
            to_host, to_disk = self._lacks(key, rank)
            if slot is None or not (to_host or to_disk):
                del self._storing[key]
                for counts in self.counts.values():
                    counts.dropped_pages += slot is None
                continue
            if to_host:
                was_kept.setdefault(key, False)
                for gone in host.put(key):  # a page of this very move, where host memory is small
                    was_kept.setdefault(gone, True)
            stores.append((key, slot, to_host, to_disk))
            num_bytes += self._page_bytes[key.pool_idx]
        places: list[PagePlace] = []
        for key, slot, to_host, to_disk in stores:
            stays = to_host and key in host and not was_kept[key]
            if stays or to_disk:
                places.append(PagePlace(key.pool_idx, slot, key.page_hash, stays, to_disk))
            else:
                del self._storing[key]
        drops = tuple(key for key, was in was_kept.items() if was and key not in host)
        return Move(self._next_id(), rank, stores=tuple(places), drops=drops)

    def take(self, moved: Moved) -> tuple[Move, AbstractSet[int]]:
        """Take in a rank's answer; return the move that it answers, and which of its loads are of no use."""
        move = self._sent.pop(moved.move_id)
        if move.loads:
            self._take_loads(move, moved)
        elif move.stores:
            self._take_stores(move, moved)
        return move, self._loads_in_doubt.pop(moved.move_id, set()).union(moved.failed)

    def _take_loads(self, move: Move, moved: Moved) -> None:
        """Forget the pages that could not be loaded, or they would be loaded again, and for ever."""
        tier = _tier(move.loads[0])
        counts = self.counts[tier]
        for i in moved.failed:
            place = move.loads[i]
            key = PageKey(place.pool_idx, place.page_hash)
            if tier == "disk":
                self._on_disk[place.pool_idx].discard(place.page_hash)
            elif self._ranks[move.rank].host.drop(key):
                self._unsent.append(Move(self._next_id(), move.rank, drops=(key,)))
        counts.failed_pages += len(moved.failed)
        counts.damaged_pages += moved.num_damaged
        counts.loaded_pages += len(move.loads) - len(moved.failed)
        counts.loaded_bytes += moved.num_bytes
        counts.load_s += moved.move_s
        if moved.num_bytes and moved.move_s > 0:
            rate = moved.num_bytes / moved.move_s
            self._bytes_per_s[tier] = MEMORY * self._bytes_per_s[tier] + (1 - MEMORY) * rate

    def _take_stores(self, move: Move, moved: Moved) -> None:
        failed = set(moved.failed)
        self._ranks[move.rank].storing_bytes -= self._bytes_of(move.stores)
        for i, place in enumerate(move.stores):
            key = PageKey(place.pool_idx, place.page_hash)
            del self._storing[key]
            if place.on_disk and i not in failed and key not in self._doubted:
                self._on_disk[place.pool_idx].add(place.page_hash)
        for tier, counts in self.counts.items():
            of_tier = [place for place in move.stores if (place.on_host if tier == "host" else place.on_disk)]
            lost = len(failed) if tier == "disk" else 0
            counts.failed_pages += lost
            counts.stored_pages += len(of_tier) - lost
            counts.stored_bytes += moved.num_bytes if tier == "disk" else self._bytes_of(of_tier)
            counts.store_s += moved.move_s if tier == "disk" else moved.copy_s

    def note_hit(self, places: Iterable[PagePlace], num_tokens: int) -> None:
        """Take down that a request goes on behind pages that were loaded, in place of so many tokens."""
        by_tier = {tier: sum(_tier(place) == tier for place in places) for tier in self.counts}
        for tier, count in by_tier.items():
            self.counts[tier].num_loads += count > 0
            self.counts[tier].hit_tokens += round(num_tokens * count / sum(by_tier.values()))

    def lose_ranks(self) -> None:
        """Take down that the ranks are gone, with their memory and all that they were told; the disk is still there."""
        for rank in self._ranks:
            rank.host.clear()
            rank.queue.clear()
            rank.storing_bytes = 0
        self._storing.clear()
        self._loads_in_doubt.clear()
        self._sent.clear()
        self._unsent.clear()

    def take_over(self, other: "Tiers") -> None:
        """Go on with what tiers of other ranks know, which have lost them."""
        self._on_disk, self._used, self._doubted = other._on_disk, other._used, other._doubted
        self._bytes_per_s, self.next_move_id = other._bytes_per_s, other.next_move_id
        self.counts = other.counts

    def _next_id(self) -> int:
        self.next_move_id += 1
        return self.next_move_id - 1

    def _bytes_of(self, places: Iterable[PagePlace]) -> int:
        return sum(self._page_bytes[place.pool_idx] for place in places)

    def check_integrity(self) -> None:
        """Assert that what is queued and what is under way make up what is being stored."""
        stores = [(move.rank, place) for move in self._sent.values() for place in move.stores]
        keys = [PageKey(place.pool_idx, place.page_hash) for _, place in stores]
        keys += [key for rank in self._ranks for key in rank.queue]
        assert len(set(keys)) == len(keys) == len(self._storing), "a page is stored twice"
        for i, rank in enumerate(self._ranks):
            assert rank.storing_bytes == self._bytes_of(place for r, place in stores if r == i)
            assert rank.host.num_bytes <= (self._sizes.host or 0)


def _tier(place: PagePlace) -> TierName:
    """Where a page is loaded from."""
    return "host" if place.on_host else "disk"
