"""Pages and page tables: where the KV of one request lies.

Holds the integer bookkeeping of one request. Must not know which pages are free (`longspan.kvcache.allocator`), which
rank is chosen next (`longspan.sharding.placement`), or tensors.
Read next: `longspan.sharding.placement`.

A **page** is `page_size` consecutive tokens of one request. It is stored in a **slot**, the index of a page in one
rank's pool, and named `(rank, slot)`. The **page table** lists a request's pages in sequence order. It is global (it
spans ranks) and explicit (any page may lie anywhere), one table per KV group. Pages that fell out of a sliding window
leave holes. **Rows** are tokens of a pool: page slot `s` holds rows `[s * page_size, (s + 1) * page_size)`.

    page_size 4, positions    0..3  4..7  8..11 12..15 16..
    page table                (0,0) (0,1) (1,0) (1,1)  (0,2)
    rank 0, rows              0..3  4..7               8..      one run of consecutive rows: one kernel call
"""

from bisect import bisect_right
from collections.abc import Iterator

import msgspec


class PageRun(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive pages of a page table that lie in consecutive slots of one rank."""

    page_idx: int
    """Index of the first page in the page table."""
    rank: int
    slot: int
    """Slot of the first page in the rank's pool."""
    num_pages: int


class KeyRun(msgspec.Struct, frozen=True, array_like=True):
    """Tokens at consecutive positions of one request in consecutive rows of one tensor."""

    position: int
    row: int
    num_tokens: int


class PageTable:
    """The pages of one request in one KV group, in sequence order.

    Grows at the end (`append`), and is freed from the front (`free_before`), which leaves a hole. Runs that continue
    each other in pages, rank and slots are kept as one.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.runs: list[PageRun] = []
        self._starts: list[int] = []  # page_idx of every run, for bisection
        self.num_pages = 0
        """Pages ever appended; holes count."""

    def append(self, rank: int, slot: int, num_pages: int) -> PageRun:
        """Add pages at the end of the sequence.

        Returns:
            The pages added, as one run.
        """
        added = PageRun(self.num_pages, rank, slot, num_pages)
        self.apply([added])
        return added

    def apply(self, added: list[PageRun]) -> None:
        """Add runs that name their own place; between the last page and the first new one may be a hole."""
        for run in added:
            assert run.page_idx >= self.num_pages, f"pages {run.page_idx}.. are in the table already"
            assert run.num_pages > 0, run
            self.num_pages = run.page_idx + run.num_pages
            if self.runs:
                last = self.runs[-1]
                follows = (last.page_idx + last.num_pages, last.rank, last.slot + last.num_pages)
                if follows == (run.page_idx, run.rank, run.slot):
                    self.runs[-1] = PageRun(last.page_idx, last.rank, last.slot, last.num_pages + run.num_pages)
                    continue
            self.runs.append(run)
            self._starts.append(run.page_idx)

    def free_before(self, page_idx: int) -> list[PageRun]:
        """Drop all pages before `page_idx`.

        Returns:
            The runs dropped.
        """
        freed: list[PageRun] = []
        while self.runs and self.runs[0].page_idx < page_idx:
            run = self.runs[0]
            keep = run.page_idx + run.num_pages - page_idx
            if keep <= 0:
                freed.append(self.runs.pop(0))
            else:
                cut = run.num_pages - keep
                freed.append(PageRun(run.page_idx, run.rank, run.slot, cut))
                self.runs[0] = PageRun(page_idx, run.rank, run.slot + cut, keep)
        self._starts = [run.page_idx for run in self.runs]
        return freed

    def _overlapping(self, start: int, end: int) -> Iterator[tuple[PageRun, int, int]]:
        """Runs that hold tokens of positions `[start, end)`, each with the part of that range it holds."""
        size = self.page_size
        index = max(0, bisect_right(self._starts, start // size) - 1)
        while index < len(self.runs) and self.runs[index].page_idx * size < end:
            run = self.runs[index]
            first = max(start, run.page_idx * size)
            last = min(end, (run.page_idx + run.num_pages) * size)
            if first < last:
                yield run, first, last
            index += 1

    def page(self, page_idx: int) -> tuple[int, int] | None:
        """`(rank, slot)` of one page, or None where there is none."""
        index = bisect_right(self._starts, page_idx) - 1
        if index < 0:
            return None
        run = self.runs[index]
        offset = page_idx - run.page_idx
        return (run.rank, run.slot + offset) if offset < run.num_pages else None

    def owners(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Cut positions `[start, end)` where the rank changes.

        Returns:
            `(rank, start, end)` per piece, in sequence order.

        Raises:
            KeyError: a position has no page.
        """
        pieces: list[tuple[int, int, int]] = []
        expected = start
        for run, first, last in self._overlapping(start, end):
            if first != expected:
                break
            if pieces and pieces[-1][0] == run.rank:
                pieces[-1] = (run.rank, pieces[-1][1], last)
            else:
                pieces.append((run.rank, first, last))
            expected = last
        if expected < end:
            raise KeyError(f"position {expected} has no page")
        return pieces

    def key_runs(self, rank: int, start: int, end: int) -> list[KeyRun]:
        """Where one rank's pool holds the tokens at positions `[start, end)`.

        Returns:
            Runs in sequence order; tokens on other ranks and in holes are left out.
        """
        size = self.page_size
        return [
            KeyRun(first, run.slot * size + first - run.page_idx * size, last - first)
            for run, first, last in self._overlapping(start, end)
            if run.rank == rank
        ]

    def count_tokens(self, start: int, end: int) -> dict[int, int]:
        """How many of positions `[start, end)` each rank holds; ranks with none are left out."""
        counts: dict[int, int] = {}
        for run, first, last in self._overlapping(start, end):
            counts[run.rank] = counts.get(run.rank, 0) + last - first
        return counts
