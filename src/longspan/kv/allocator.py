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
            start, end = self._find_gap(num_pages, near)
            taken = min(num_pages, end - start)
            self._take(start, taken)
            runs.append((start, taken))
            num_pages -= taken
            near = start + taken
        self.peak_used = max(self.peak_used, self.num_used)
        return runs

    def _find_gap(self, num_pages: int, near: int | None) -> tuple[int, int]:
        """Free slots `[start, end)` from which to take up to `num_pages` pages."""
        for start, end in self._gaps:
            if near is not None and start <= near < end:
                return near, end
        start, end = max(self._gaps, key=lambda gap: gap[1] - gap[0])
        if start > 0 and end - start > num_pages:
            start += (end - start - num_pages) // 2
        return start, end

    def _take(self, slot: int, num_pages: int) -> None:
        index = next(i for i, (start, end) in enumerate(self._gaps) if start <= slot < end)
        start, end = self._gaps[index]
        assert slot + num_pages <= end
        self._gaps[index : index + 1] = [gap for gap in ((start, slot), (slot + num_pages, end)) if gap[0] < gap[1]]
        for i in range(slot, slot + num_pages):
            assert self._references[i] == 0, f"slot {i} is in use"
            self._references[i] = 1
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
