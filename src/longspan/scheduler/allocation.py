"""What one request holds on the ranks: page tables, where its pages lie or will lie, and what is copied for it.

Holds integers. `longspan.scheduler.memory` makes allocations and changes them; all others read. Must not know tokens,
free slots or plans.
Read next: `longspan.scheduler.reservations`, what a request has been promised; `longspan.scheduler.memory`.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet

from longspan.plan.types import KeptState, PageCopy, StatePlace
from longspan.scheduler.reservations import Claims
from longspan.sharding.pages import PageRun, PageTable

NO_RANKS: frozenset[int] = frozenset()


class Allocation:
    """The pages of one request, from its admission to its end or its preemption."""

    __slots__ = (
        "claims",
        "copies",
        "kept_states",
        "left_states",
        "num_hit_pages",
        "num_pages",
        "num_published",
        "page_ends",
        "page_ranks",
        "page_size",
        "ranks",
        "state",
        "state_source",
        "tables",
    )

    def __init__(self, page_size: int, num_groups: int, num_pools: int | None = None) -> None:
        """Hold nothing yet.

        Args:
            page_size: tokens per page.
            num_groups: KV groups of the model.
            num_pools: pools of a rank, if there are more than one per KV group.
        """
        self.page_size = page_size
        self.tables = [PageTable(page_size) for _ in range(num_groups)]
        """Per KV group."""
        self.page_ranks: list[tuple[int, int]] = []
        """(rank, pages) runs: the placement of all pages that are allocated or promised, cached ones included."""
        self.page_ends: list[int] = []
        """Per run of `page_ranks`, one past its last page."""
        self.num_pages = 0
        """Pages that are placed."""
        self.ranks = NO_RANKS
        """Ranks that have a page of the request, or will have."""
        self.claims = Claims(num_pools or num_groups)
        """What the request has been promised."""
        self.num_hit_pages = 0
        """Pages that were found in the prefix cache at admission."""
        self.num_published = 0
        """Pages that the prefix cache knows."""
        self.copies: list[PageCopy] = []
        """Cached pages of other ranks to copy in the next step; their sources are kept until it is done."""
        self.state: StatePlace | None = None
        """Where the state of recurrent layers is left by the last step that was planned."""
        self.state_source: StatePlace | None = None
        """Cached state that the first step goes on from; it is kept until that is done."""
        self.left_states: list[StatePlace] = []
        """Where the state was before the step in flight, if elsewhere."""
        self.kept_states: list[KeptState] = []
        """Copies of states that steps in flight make, in the order of positions."""

    def ranks_of(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(rank, start, end) of the placement of positions `[start, end)`, in sequence order."""
        size = self.page_size
        index = bisect_right(self.page_ends, start // size)
        while index < len(self.page_ranks) and start < end:
            last = min(end, self.page_ends[index] * size)
            yield self.page_ranks[index][0], start, last
            start = last
            index += 1

    def ranks_with(self, start: int, end: int) -> AbstractSet[int]:
        """Ranks of the placement of positions `[start, end)`."""
        found: set[int] = set()
        for rank, _, _ in self.ranks_of(start, end):
            found.add(rank)
            if len(found) == len(self.ranks):  # a striped prompt comes to all of them soon
                break
        return found

    def rank_at(self, position: int) -> int:
        """Rank of a position that is placed."""
        return self.page_ranks[bisect_right(self.page_ends, position // self.page_size)][0]

    @property
    def source_ranks(self) -> frozenset[int]:
        """Ranks with something that the next step takes from where it lies: pages to copy, the state."""
        if not self.copies and self.state is None and self.state_source is None:
            return NO_RANKS
        places = [copy.source.rank for copy in self.copies]
        states = [place.rank for place in (self.state or self.state_source,) if place is not None]
        return frozenset((*places, *states))

    def place(self, rank: int, num_pages: int) -> None:
        """Note where the next pages go."""
        self.num_pages += num_pages
        if self.page_ranks and self.page_ranks[-1][0] == rank:
            self.page_ranks[-1] = (rank, self.page_ranks[-1][1] + num_pages)
            self.page_ends[-1] = self.num_pages
        else:
            self.page_ranks.append((rank, num_pages))
            self.page_ends.append(self.num_pages)
            self.ranks |= {rank}

    def copy_to(self, home: int, group_idx: int, run: PageRun, slots: Iterable[tuple[int, int]]) -> None:
        """Append copies of another rank's pages to a page table; the next step makes them.

        Args:
            home: rank of the copies.
            group_idx: KV group of the pages.
            run: the pages.
            slots: (slot, pages) of the copies.
        """
        first = run.page_idx
        for slot, num_pages in slots:
            source = PageRun(first, run.rank, run.slot + first - run.page_idx, num_pages)
            target = PageRun(first, home, slot, num_pages)
            self.copies.append(PageCopy(group_idx, source, target))
            self.tables[group_idx].apply([target])
            first += num_pages

    def leave_copies_before(self, group_idx: int, page_idx: int) -> list[PageRun]:
        """Do without the copies of one KV group's pages before `page_idx`; return the pages that were to be copied."""
        left: list[PageRun] = []
        copies: list[PageCopy] = []
        for copy in self.copies:
            num_left = min(page_idx - copy.source.page_idx, copy.source.num_pages) if copy.group_idx == group_idx else 0
            if num_left <= 0:
                copies.append(copy)
                continue
            left.append(PageRun(copy.source.page_idx, copy.source.rank, copy.source.slot, num_left))
            if num_left < copy.source.num_pages:
                copies.append(
                    PageCopy(group_idx, _without_first(copy.source, num_left), _without_first(copy.target, num_left))
                )
        self.copies = copies
        return left


def _without_first(run: PageRun, num_pages: int) -> PageRun:
    """A run without its first pages."""
    return PageRun(run.page_idx + num_pages, run.rank, run.slot + num_pages, run.num_pages - num_pages)
