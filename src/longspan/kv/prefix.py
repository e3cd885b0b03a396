"""Prefix cache of one rank and KV group: pages that outlive their request, found again by the hash of their tokens.

Holds integers and hashes. Must not know tensors, requests, page tables or other ranks.
Read next: `longspan.scheduler.prefix_lookup`, which looks prefixes up on all ranks.

A page's hash covers its own tokens and all tokens before it, so equal hashes mean equal KV. Only full pages have a
hash. The hash unit is a page whatever the rank count, and a page may have a copy on every rank.

    page_size 4    tokens  a b c d | e f g h | i j
    hashes                 H(abcd)   H(H(abcd), efgh)   none: the page is not full

A published page is in use (it has references) or **idle** (no request uses it; it may be found again, or evicted). Idle
pages are available like free ones, but taken last: the page that became idle first is evicted first. A request gives
its pages back from the last to the first, so that the leaves of a common prefix are evicted before its root.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from longspan.kv.allocator import OutOfPagesError, PageAllocator

EVICT_PAGES = 64
"""Most pages that an eviction frees beyond need, so that a growing request gets a run of slots, not single slots."""


def extend_hashes(hashes: list[bytes], token_ids: Sequence[int], page_size: int, root: bytes = b"") -> None:
    """Append to `hashes`, in place, the hashes of the full pages of `token_ids` that it lacks.

    Hashes are stable between processes and releases. `root` is what KV depends on beside tokens, at most 64 bytes.
    """
    first, last = len(hashes), len(token_ids) // page_size
    if first == last:
        return
    values = array("I", token_ids[first * page_size : last * page_size])
    for i in range(last - first):
        before = hashes[-1] if hashes else root
        page = values[i * page_size : (i + 1) * page_size].tobytes()
        hashes.append(blake2b(page, key=before, digest_size=16).digest())


class PageHolders:
    """Ranks that have each published page of one KV group: what a lookup asks, however many ranks there are."""

    def __init__(self) -> None:
        self._ranks: dict[bytes, frozenset[int]] = {}
        self._sets: dict[frozenset[int], frozenset[int]] = {}  # one set for equal ranks: pages are many, sets are few

    def of(self, page_hash: bytes) -> frozenset[int]:
        """Ranks that have a page."""
        return self._ranks.get(page_hash, frozenset())

    @property
    def num_sets(self) -> int:
        """Number of sets of ranks that are kept."""
        return len(self._sets)

    def add(self, page_hash: bytes, rank: int) -> None:
        """Take down that a rank has a page."""
        self._note(page_hash, self.of(page_hash) | {rank})

    def remove(self, page_hash: bytes, rank: int) -> None:
        """Take down that a rank has a page no more."""
        ranks = self._ranks.pop(page_hash) - {rank}
        if ranks:
            self._note(page_hash, ranks)

    def _note(self, page_hash: bytes, ranks: frozenset[int]) -> None:
        self._ranks[page_hash] = self._sets.setdefault(ranks, ranks)
        if len(self._sets) > 2 * len(self._ranks) + 64:  # sets that no page has any more
            self._sets = {used: used for used in self._ranks.values()}


class CachingAllocator:
    """Page allocator that remembers published pages until it needs their slots."""

    def __init__(self, num_pages: int, holders: PageHolders | None = None, rank: int = 0) -> None:
        """Start with all pages free.

        Args:
            num_pages: pages of the pool.
            holders: record of published pages that all ranks share; None: nobody looks pages up.
            rank: the pool's rank.
        """
        self._holders, self._rank = holders or PageHolders(), rank
        self._slots = PageAllocator(num_pages)
        self._slot_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._idle: dict[int, None] = {}  # in the order they became idle; the allocator counts one reference
        self.num_pages = num_pages
        self.peak_used = 0
        """Most pages that were in use at once."""
        self.num_evicted = 0

    @property
    def num_used(self) -> int:
        """Pages in use; idle ones do not count."""
        return self._slots.num_used - len(self._idle)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out, idle ones included."""
        return self._slots.num_free + len(self._idle)

    @property
    def free_runs(self) -> list[tuple[int, int]]:
        """Runs [first, end) of slots without a page, in use or idle, ascending."""
        return self._slots.free_runs

    def allocate(self, num_pages: int, near: int | None = None) -> list[tuple[int, int]]:
        """Allocate as `PageAllocator.allocate` does; evict idle pages when free ones do not suffice."""
        if num_pages > self.num_available:
            raise OutOfPagesError(f"{num_pages} pages asked, {self.num_available} of {self.num_pages} available")
        if num_pages > self._slots.num_free:
            self._evict(num_pages - self._slots.num_free + min(EVICT_PAGES, self.num_pages // 16))
        runs = self._slots.allocate(num_pages, near)
        self.peak_used = max(self.peak_used, self.num_used)
        return runs

    def _evict(self, num_pages: int) -> None:
        """Free the pages that have been idle longest."""
        for slot in list(self._idle)[:num_pages]:
            del self._idle[slot]
            page_hash = self._hash_of.pop(slot)
            del self._slot_of[page_hash]
            self._holders.remove(page_hash, self._rank)
            self._slots.release(slot, 1)
            self.num_evicted += 1

    def publish(self, page_hash: bytes, slot: int) -> None:
        """Let later requests find a page in use, unless an equal page is published already."""
        assert slot not in self._idle, f"slot {slot} is not in use"
        if page_hash not in self._slot_of and slot not in self._hash_of:
            self._slot_of[page_hash] = slot
            self._hash_of[slot] = page_hash
            self._holders.add(page_hash, self._rank)

    def withdraw(self, page_hash: bytes) -> None:
        """Let no later request find a page; requests that use the page keep it."""
        slot = self._slot_of.pop(page_hash, None)
        if slot is None:
            return
        del self._hash_of[slot]
        self._holders.remove(page_hash, self._rank)
        if slot in self._idle:
            del self._idle[slot]
            self._slots.release(slot, 1)

    def find(self, page_hash: bytes) -> int | None:
        """Slot of a published page, or None."""
        return self._slot_of.get(page_hash)

    def knows(self, page_hash: bytes) -> bool:
        """Whether `find` would find a page."""
        return page_hash in self._slot_of

    def references(self, slot: int) -> int:
        """Number of references to a page; an idle page has one."""
        return self._slots.references(slot)

    def is_idle(self, slot: int) -> bool:
        """Whether a published page is idle, so that using it leaves one page less available."""
        return slot in self._idle

    def use(self, slot: int) -> bool:
        """Add a reference to a published page; return whether the page was in use already."""
        assert slot in self._hash_of, f"slot {slot} is not published"
        if slot in self._idle:
            del self._idle[slot]
            used = self._slots.num_used - len(self._idle)
            if used > self.peak_used:
                self.peak_used = used
            return False
        self._slots.retain(slot, 1)
        return True

    def release(self, slot: int, num_pages: int) -> int:
        """Drop a reference to each of some pages in use; published pages without one become idle, the last page first.

        Returns:
            Number of these pages that are still in use.
        """
        num_shared = sum(self._slots.references(i) > 1 for i in range(slot, slot + num_pages))
        end = slot + num_pages
        for i in range(end - 1, slot - 1, -1):
            assert i not in self._idle, f"slot {i} is not in use"
            if i in self._hash_of and self._slots.references(i) == 1:
                if i + 1 < end:
                    self._slots.release(i + 1, end - i - 1)
                self._idle[i] = None
                end = i
        if slot < end:
            self._slots.release(slot, end - slot)
        return num_shared

    def forget_all(self) -> None:
        """Start again with a new pool: all pages are free, and none is published. Peaks and counts stay."""
        for page_hash in self._slot_of:
            self._holders.remove(page_hash, self._rank)
        self._slots = PageAllocator(self.num_pages)
        self._slot_of, self._hash_of, self._idle = {}, {}, {}

    def check_integrity(self) -> None:
        """Assert that slots, hashes and idle pages agree."""
        self._slots.check_integrity()
        assert len(self._slot_of) == len(self._hash_of)
        assert all(self._slot_of[page_hash] == slot for slot, page_hash in self._hash_of.items())
        assert all(self._rank in self._holders.of(page_hash) for page_hash in self._slot_of)
        assert all(slot in self._hash_of and self._slots.references(slot) == 1 for slot in self._idle)
        assert all(self._slots.references(slot) > 0 for slot in self._hash_of)
