"""Where the pages of a prompt lie that some rank still has.

Holds the search over the prefix caches of all ranks and KV groups; changes none of them. Must not know requests, or
what is done with a hit.
Read next: `longspan.kv.prefix`, what is searched; `longspan.scheduler.admission`, which decides.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from longspan.kv.prefix import CachingAllocator, PageHolders
from longspan.scheduler.reservations import Room
from longspan.scheduler.states import StateMemory
from longspan.sharding.pages import PageRun
from longspan.types import ModelSpec


class PrefixLookup:
    """Finds the longest prefix that later tokens can go on from."""

    def __init__(
        self,
        model: ModelSpec,
        page_size: int,
        allocators: Sequence[Sequence[CachingAllocator]],
        holders: Sequence[PageHolders],
        states: StateMemory | None = None,
    ) -> None:
        """Search the caches of some ranks.

        Args:
            model: its KV groups.
            page_size: tokens per page.
            allocators: [rank][pool].
            holders: per pool, the record of published pages that the ranks' allocators share.
            states: states that are kept, if the model has recurrent layers: a prefix is of use where it has one.
        """
        self._page_size, self._allocators, self._holders = page_size, allocators, holders
        self._states = states
        self._specs = [group.spec for group in model.kv_groups]
        self._full_groups = [i for i, spec in enumerate(self._specs) if spec.reach is None]
        reaches = [(spec.reach, i) for i, spec in enumerate(self._specs) if spec.reach is not None]
        self._groups_by_reach = [group_idx for _, group_idx in sorted(reaches, reverse=True)]  # widest first
        self._all_ranks = frozenset(range(len(allocators)))

    def first_needed_page(self, group_idx: int, num_pages: int) -> int:
        """The first of `num_pages` cached pages that later tokens still see; at least the last page counts as seen."""
        if self._specs[group_idx].reach is None:
            return 0
        size = self._page_size
        return max(0, min(num_pages - 1, self._specs[group_idx].first_key(num_pages * size) // size))

    def find(self, hashes: Sequence[bytes]) -> list[frozenset[int]]:
        """Per page, the ranks where later tokens find all that they need of it; as many pages as are of use.

        Linear in the pages, with little work for each: prompts of 60,000 pages are looked up between two steps.

        Args:
            hashes: of the pages, from a prompt's first one on.
        """
        # Level 0: ranks with the page in all groups without a window. Level k: also in the k widest windows, since a
        # page that a narrow window reaches is reached by all wider ones.
        levels = [self._ranks_with(hashes, self._full_groups)]
        hashes = hashes[: len(levels[0])]
        for group_idx in self._groups_by_reach:
            with_window = self._ranks_with(hashes, [group_idx])
            levels.append([a & b for a, b in zip(levels[-1], with_window, strict=False)])
        last_gap = [list(accumulate((i if not r else -1 for i, r in enumerate(ranks)), max)) for ranks in levels]
        for length in range(len(hashes), 0, -1):
            if self._states is not None and self._states.find(hashes[length - 1], None) is None:
                continue
            firsts = [0, *(self.first_needed_page(g, length) for g in self._groups_by_reach), length]
            spans = [(ranks, gap, a, b) for ranks, gap, (a, b) in zip(levels, last_gap, pairwise(firsts), strict=True)]
            if all(a == b or gap[b - 1] < a for _, gap, a, b in spans):
                return [ranks for ranks_of, _, a, b in spans for ranks in ranks_of[a:b]]
        return []

    def taken(self, hashes: Sequence[bytes], hit: Sequence[int], home: int | None) -> Room | None:
        """What using cached pages takes from the room of ranks.

        Args:
            hashes: of the pages.
            hit: rank per page, from a prompt's first page on.
            home: where pages that lie elsewhere are copied to, or None to use them where they lie.

        Returns:
            Pages, [rank][pool]; None where a page is missing.
        """
        taken = [[0] * len(allocators) for allocators in self._allocators]
        if self._states is not None and hit:
            place = self._states.find(hashes[len(hit) - 1], home)
            if place is None:
                return None  # a shorter prefix than was found has no state at its end
            pool_idx = self._states.pool_idx
            taken[place.rank][pool_idx] += self._allocators[place.rank][pool_idx].is_idle(place.slot)
        for group_idx, spec in enumerate(self._specs):
            for page_idx in range(self.first_needed_page(group_idx, len(hit)), len(hit)):
                rank = hit[page_idx]
                allocator = self._allocators[rank][group_idx]
                slot = allocator.find(hashes[page_idx])
                if slot is None:
                    return None  # a shorter prefix than was found ends in another window
                taken[rank][group_idx] += spec.reach is not None or allocator.is_idle(slot)
                if home is not None:
                    taken[home][group_idx] += rank != home
        return taken

    def runs(self, hashes: Sequence[bytes], hit: Sequence[int], group_idx: int) -> list[PageRun]:
        """The cached pages of one KV group as runs of a page table, those that windows no longer reach left out.

        Args:
            hashes: of the pages.
            hit: rank per page, from a prompt's first page on.
            group_idx: the group.
        """
        runs: list[PageRun] = []
        first = last = self.first_needed_page(group_idx, len(hit))  # of the run that grows
        run_slot = 0
        for page_idx in range(first, len(hit)):
            rank = hit[page_idx]
            slot = self._allocators[rank][group_idx].find(hashes[page_idx])
            assert slot is not None
            if page_idx > first and (rank != hit[first] or slot != run_slot + page_idx - first):
                runs.append(PageRun(first, hit[first], run_slot, page_idx - first))
                first = page_idx
            if page_idx == first:
                run_slot = slot
            last = page_idx + 1
        if last > first:
            runs.append(PageRun(first, hit[first], run_slot, last - first))
        return runs

    def _ranks_with(self, hashes: Sequence[bytes], groups: Sequence[int]) -> list[frozenset[int]]:
        """Per page, the ranks that have it in all of some groups; up to the first page that none has, if groups are
        without windows."""
        found = [self._all_ranks] * len(hashes)
        for group_idx in groups:
            holders, stops = self._holders[group_idx], self._specs[group_idx].reach is None
            for i, page_hash in enumerate(hashes[: len(found)]):
                ranks = holders.of(page_hash)
                found[i] = ranks if found[i] is self._all_ranks else found[i] & ranks
                if stops and not found[i]:
                    del found[i:]
                    break
        return found
