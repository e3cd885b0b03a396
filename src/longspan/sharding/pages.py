"""Pages and page tables: the places of one request's KV.

Holds the integer bookkeeping of one request. Must not know which pages are free (`longspan.kv.allocator`), which
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

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

import msgspec


class PageRun(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Consecutive pages of a page table that lie in consecutive slots of one rank."""

    page_idx: int
    """Index of the first page in the page table."""
    rank: int
    slot: int
    """Slot of the first page in the rank's pool."""
    num_pages: int


class KeyRun(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Tokens at consecutive positions of one request in consecutive rows of one tensor."""

    position: int
    row: int
    num_tokens: int


class _RankRows:
    """One rank's part of a page table, which answers questions about long ranges by bisection."""

    def __init__(self) -> None:
        self.positions: list[int] = []  # first position of each run
        self.rows: list[int] = []  # first row of each run
        self.before: list[int] = [0]  # tokens of all runs before each run; and one more entry for the sum
        self.heads: list[int] = []  # runs whose rows do not continue those of the run before

    def add(self, position: int, row: int, num_tokens: int) -> None:
        """Append a run; one that continues the last in position and row becomes part of it."""
        if self.positions and (position, row) == (self._end(-1), self.rows[-1] + self._len(-1)):
            self.before[-1] += num_tokens
            return
        if not self.rows or row != self.rows[-1] + self._len(-1):
            self.heads.append(len(self.rows))
        self.positions.append(position)
        self.rows.append(row)
        self.before.append(self.before[-1] + num_tokens)

    @property
    def end_row(self) -> int:
        """One past the last row."""
        return self.rows[-1] + self._len(-1)

    def _len(self, index: int) -> int:
        index %= len(self.positions)
        return self.before[index + 1] - self.before[index]

    def _end(self, index: int) -> int:
        return self.positions[index] + self._len(index)

    def _tokens_before(self, position: int) -> int:
        """Tokens of this rank at lower positions."""
        index = bisect_left(self.positions, position) - 1
        if index < 0:
            return 0
        return self.before[index] + min(position - self.positions[index], self._len(index))

    def count(self, start: int, end: int) -> int:
        """Tokens at positions `[start, end)`."""
        return max(0, self._tokens_before(end) - self._tokens_before(start))

    def key_runs(self, start: int, end: int) -> list[KeyRun]:
        """Runs of positions `[start, end)`, in sequence order."""
        found: list[KeyRun] = []
        index = max(0, bisect_right(self.positions, start) - 1)
        while index < len(self.positions) and self.positions[index] < end:
            position = self.positions[index]
            first, last = max(start, position), min(end, self._end(index))
            if first < last:
                found.append(KeyRun(first, self.rows[index] + first - position, last - first))
            index += 1
        return found

    def row_runs(self, start: int, end: int) -> list[tuple[int, int]]:
        """Runs `(row, tokens)` of positions `[start, end)`, as few as consecutive rows admit."""
        first, last = self._tokens_before(start), self._tokens_before(end)
        found: list[tuple[int, int]] = []
        head = bisect_right(self.before, first) - 1  # the run that holds token `first`
        group = bisect_right(self.heads, head)
        while first < last:
            stop = self.before[self.heads[group]] if group < len(self.heads) else self.before[-1]
            row = self.rows[head] + first - self.before[head]
            found.append((row, min(stop, last) - first))
            first = stop
            if group < len(self.heads):
                head = self.heads[group]
            group += 1
        return found


class PageTable:
    """Pages of one request in one KV group, in sequence order.

    A table grows at the end (`append`), and is freed from the front (`free_before`), which leaves a hole. Runs that
    continue each other in pages, rank and slots are kept as one.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.runs: list[PageRun] = []
        self._starts: list[int] = []  # page_idx of every run, for bisection
        self._by_rank: dict[int, _RankRows] = {}
        self.num_pages = 0
        """Pages appended so far; holes count."""

    def append(self, rank: int, slot: int, num_pages: int) -> PageRun:
        """Add pages at the end of the sequence.

        Returns:
            The pages added, as one run.
        """
        added = PageRun(self.num_pages, rank, slot, num_pages)
        self._add(added)
        return added

    def apply(self, added: list[PageRun]) -> None:
        """Add runs at the page indices that they name; there may be a hole before the first new page."""
        for run in added:
            self._add(run)

    def _add(self, run: PageRun) -> None:
        assert run.page_idx >= self.num_pages, f"pages {run.page_idx}.. are in the table already"
        assert run.num_pages > 0, run
        self.num_pages = run.page_idx + run.num_pages
        self._index(run)
        if self.runs:
            last = self.runs[-1]
            if last.rank == run.rank:
                follows = (last.page_idx + last.num_pages, last.slot + last.num_pages)
                if follows == (run.page_idx, run.slot):
                    self.runs[-1] = PageRun(last.page_idx, last.rank, last.slot, last.num_pages + run.num_pages)
                    return
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
        if freed:
            self._starts = [run.page_idx for run in self.runs]
            self._by_rank = {}
            for run in self.runs:
                self._index(run)
        return freed

    def _index(self, run: PageRun) -> None:
        rows, size = self._by_rank.get(run.rank), self.page_size
        if rows is None:
            rows = self._by_rank[run.rank] = _RankRows()
        rows.add(run.page_idx * size, run.slot * size, run.num_pages * size)

    def _overlapping(self, start: int, end: int) -> Iterator[tuple[PageRun, int, int]]:
        """Yield runs that hold tokens of positions `[start, end)`, each with the part of that range it holds."""
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
        """Place `(rank, slot)` of one page, or None where there is no page."""
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
        if start < end and self.runs:
            last_run = self.runs[-1]  # holds a decode's new token
            if last_run.page_idx * self.page_size <= start and end <= self.num_pages * self.page_size:
                return [(last_run.rank, start, end)]
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
        """Rows of one rank's pool that hold the tokens at positions `[start, end)`, with their positions.

        Returns:
            Runs in sequence order; tokens on other ranks and in holes are left out.
        """
        rows = self._by_rank.get(rank)
        return [] if rows is None else rows.key_runs(start, end)

    @property
    def ranks(self) -> list[int]:
        """Ranks that hold some page, ascending."""
        return sorted(self._by_rank)

    def is_on(self, rank: int) -> bool:
        """Whether all pages lie on one rank."""
        return len(self._by_rank) == 1 and rank in self._by_rank

    def ranks_with(self, start: int, end: int) -> list[int]:
        """Ranks that hold some of positions `[start, end)`, ascending."""
        if len(self.runs) == 1:
            run, size = self.runs[0], self.page_size
            is_here = max(start, run.page_idx * size) < min(end, (run.page_idx + run.num_pages) * size)
            return [run.rank] if is_here else []
        return sorted(self.tokens_per_rank(start, end))

    def tokens_per_rank(self, start: int, end: int) -> dict[int, int]:
        """Number of positions `[start, end)` that each rank holds; ranks that hold none are left out."""
        found: dict[int, int] = {}
        num_runs = bisect_left(self._starts, -(-end // self.page_size)) - bisect_right(
            self._starts, start // self.page_size
        )
        if num_runs < len(self._by_rank):  # a run is walked as fast as a rank is asked
            for run, first, last in self._overlapping(start, end):
                found[run.rank] = found.get(run.rank, 0) + last - first
            return found
        for rank, rows in self._by_rank.items():
            count = rows.count(start, end)
            if count:
                found[rank] = count
        return found

    def slot_after(self, rank: int) -> int | None:
        """Slot behind the last page on a rank; None if the rank has none."""
        rows = self._by_rank.get(rank)
        return None if rows is None else rows.end_row // self.page_size

    def count_on(self, rank: int, start: int, end: int) -> int:
        """Number of positions `[start, end)` that one rank holds."""
        rows = self._by_rank.get(rank)
        return 0 if rows is None else rows.count(start, end)

    def row_runs(self, rank: int, start: int, end: int) -> list[tuple[int, int]]:
        """Rows of one rank's pool that hold the tokens at positions `[start, end)`, without their positions.

        Returns:
            Runs `(row, tokens)`, as few as consecutive rows admit; tokens on other ranks and in holes are left out.
        """
        rows = self._by_rank.get(rank)
        return [] if rows is None else rows.row_runs(start, end)
