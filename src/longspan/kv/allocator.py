"""Page allocator of one rank and KV group: free and referenced slots.

Holds integers. Must not know tensors, requests or other ranks.
Read next: `longspan.kv.pool`, the memory behind the slots.

Kernels are fastest on runs of consecutive slots (on a CPU a run is one view and one call), so the allocator hands out
runs: it first extends the run that the request already has (`near`), and starts a new run in the middle of the widest
gap, so that the request before the gap can go on growing.
"""

from longspan.errors import LongspanError


class OutOfPagesError(LongspanError):
    """More pages were asked for than are free."""


class PageAllocator:
    """Reference-counted slots of one pool."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._gaps: list[tuple[int, int]] = [(0, num_pages)] if num_pages else []  # free [start, end), ascending
        self.num_free = num_pages
        self.peak_used = 0
        """Most pages that were in use at once."""

    @property
    def num_used(self) -> int:
        """Pages with at least one reference."""
        return self.num_pages - self.num_free

    @property
    def free_runs(self) -> list[tuple[int, int]]:
        """Runs [first, end) of free slots, ascending."""
        return [*self._gaps]

    def allocate(self, num_pages: int, near: int | None = None) -> list[tuple[int, int]]:
        """Take pages, each with one reference.

        Args:
            num_pages: number of pages.
            near: slot that the first page should have if it is free (one past the request's last slot), or None.

        Returns:
            Runs `(slot, num_pages)`, as few as the gaps admit.

        Raises:
            OutOfPagesError: fewer pages are free; none was taken.
        """
        if num_pages > self.num_free:
            raise OutOfPagesError(f"{num_pages} pages asked, {self.num_free} of {self.num_pages} free")
        runs: list[tuple[int, int]] = []
        while num_pages:
            index, slot = self._find_place(num_pages, near)
            taken = min(num_pages, self._gaps[index][1] - slot)
            self._take(index, slot, taken)
            runs.append((slot, taken))
            num_pages -= taken
            near = slot + taken
        self.peak_used = max(self.peak_used, self.num_used)
        return runs

    def _find_place(self, num_pages: int, near: int | None) -> tuple[int, int]:
        """Gap by its index, and the free slot in it, from which to take up to `num_pages` pages."""
        gaps = self._gaps
        if near is not None:
            for index, (start, end) in enumerate(gaps):
                if start <= near < end:
                    return index, near
        index = max(range(len(gaps)), key=lambda index: gaps[index][1] - gaps[index][0])
        start, end = gaps[index]
        if start > 0 and end - start > num_pages:
            start += (end - start - num_pages) // 2
        return index, start

    def _take(self, index: int, slot: int, num_pages: int) -> None:
        """Take pages from slot `slot` on, which are free in gap `index`."""
        (start, end), stop = self._gaps[index], slot + num_pages
        assert start <= slot <= stop <= end
        assert not any(self._references[slot:stop]), f"one of slots {slot} to {stop - 1} is in use"
        self._gaps[index : index + 1] = [gap for gap in ((start, slot), (stop, end)) if gap[0] < gap[1]]
        self._references[slot:stop] = [1] * num_pages
        self.num_free -= num_pages

    def retain(self, slot: int, num_pages: int) -> None:
        """Add a reference to each of some pages in use."""
        for i in range(slot, slot + num_pages):
            assert self._references[i] > 0, f"slot {i} is free"
            self._references[i] += 1

    def references(self, slot: int) -> int:
        """Number of references to a page; 0 for a free one."""
        return self._references[slot]

    def release(self, slot: int, num_pages: int) -> None:
        """Drop a reference to each of some pages; pages without one become free."""
        first_free: int | None = None
        for i in range(slot, slot + num_pages):
            assert self._references[i] > 0, f"slot {i} is free already"
            self._references[i] -= 1
            if self._references[i] == 0:
                first_free = i if first_free is None else first_free
            elif first_free is not None:
                self._give(first_free, i)
                first_free = None
        if first_free is not None:
            self._give(first_free, slot + num_pages)

    def _give(self, start: int, end: int) -> None:
        self.num_free += end - start
        before = [gap for gap in self._gaps if gap[1] < start]
        after = [gap for gap in self._gaps if gap[0] > end]
        touching = self._gaps[len(before) : len(self._gaps) - len(after)]
        if touching:
            start, end = min(start, touching[0][0]), max(end, touching[-1][1])
        self._gaps = [*before, (start, end), *after]

    def check_integrity(self) -> None:
        """Assert that gaps and reference counts agree."""
        free = [count == 0 for count in self._references]
        assert sum(free) == self.num_free == sum(end - start for start, end in self._gaps)
        assert all(all(free[start:end]) and start < end for start, end in self._gaps)
        assert all(a[1] < b[0] for a, b in zip(self._gaps, self._gaps[1:], strict=False)), "gaps touch or overlap"
