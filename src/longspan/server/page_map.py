"""Map of ranks x slots, made of cells: which request holds most of each few slots, and how many of them are held.

Holds integers, from a snapshot to runs of equal cells. Must not know HTTP or colours.
Read next: `longspan.engine.live`, the snapshot; `longspan.server.live`, which sends the map.

Note [Cells]
    A rank has up to millions of slots, a screen has not. So every rank is cut into equally many cells of equally many
    slots. A cell belongs to the request with most slots in it; it is cached if idle pages of the prefix cache have
    more, and shared if requests count more slots together than are taken. Its shade says how full it is, in quarters,
    and whether its run of pages is an even or an odd one of its request on this rank: where a cell is no longer than a
    stripe, the shades of neighbours alternate, and stripes are seen.

    page_size 4, stripe 8, two ranks, 4 slots per cell; request 7 holds pages 0..15, striped in snake order
    rank 0   slots 0..1 (pages 0, 1)  2..5 (pages 6..9)  6..7 (pages 14, 15)     cells  7 7 . .
    rank 1   slots 0..3 (pages 2..5)  4..7 (pages 10..13)                        cells  7 7 . .
"""

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.engine.live import LiveSnapshot

MAX_CELLS = 8192
"""Most cells of all ranks together."""

MIN_CELLS_PER_RANK, MAX_CELLS_PER_RANK = 64, 1024

FREE, CACHED, SHARED = -1, -2, -3
"""Owners of cells that are no request's."""

QUARTERS = 4
"""Steps of a cell's fill."""


@dataclass(frozen=True, slots=True)
class PageMap:
    """Cells of all ranks."""

    slots_per_cell: int
    cells: Sequence[Sequence[int]]
    """[rank]: runs of equal cells, each as three numbers: cells, owner (a request's id, or -1 to -3), and shade: the
    fill in quarters, rounded up, times two, plus 1 for an odd run of pages."""


class _Rank:
    """Cells of one rank while slots are counted."""

    def __init__(self, num_pages: int, slots_per_cell: int) -> None:
        self.size = slots_per_cell
        num_cells = -(-num_pages // slots_per_cell)
        self.slots = [min(slots_per_cell, num_pages - i * slots_per_cell) for i in range(num_cells)]
        self.taken = [*self.slots]
        self.held: list[dict[int, int]] = [{} for _ in range(num_cells)]  # per cell, slots by request
        self.odd = [0] * num_cells  # slots in odd runs of pages

    def free(self, first: int, end: int) -> None:
        """Count slots as free."""
        for cell, count in self._parts(first, end - first):
            self.taken[cell] -= count

    def hold(self, request_id: int, first: int, num_slots: int, *, is_odd: bool) -> None:
        """Count slots as a request's."""
        for cell, count in self._parts(first, num_slots):
            held = self.held[cell]
            held[request_id] = held.get(request_id, 0) + count
            self.odd[cell] += count * is_odd

    def _parts(self, first: int, num_slots: int) -> list[tuple[int, int]]:
        """(cell, slots) of consecutive slots."""
        size, end = self.size, first + num_slots
        cell = first // size
        if end <= (cell + 1) * size:
            return [(cell, num_slots)]
        last = (end - 1) // size
        middle = [(i, size) for i in range(cell + 1, last)]
        return [(cell, (cell + 1) * size - first), *middle, (last, end - last * size)]

    def runs(self) -> list[int]:
        """Runs of equal cells, three numbers each."""
        found: list[int] = []
        for cell in range(len(self.slots)):
            owner, shade = self._cell(cell)
            if found and found[-2] == owner and found[-1] == shade:
                found[-3] += 1
            else:
                found += (1, owner, shade)
        return found

    def _cell(self, cell: int) -> tuple[int, int]:
        """(owner, shade) of a cell."""
        taken, held = self.taken[cell], self.held[cell]
        if taken == 0:
            return FREE, 0
        fill = 2 * -(-taken * QUARTERS // self.slots[cell])
        total = sum(held.values())
        if total > taken:
            return SHARED, fill
        owner = max(held, key=lambda request_id: held[request_id], default=CACHED)
        if owner == CACHED or taken - total > held[owner]:
            return CACHED, fill
        return owner, fill + (2 * self.odd[cell] > total)


def make_map(snapshot: LiveSnapshot) -> PageMap:
    """Make the map of a snapshot."""
    num_ranks = len(snapshot.num_pages)
    per_rank = min(MAX_CELLS_PER_RANK, max(MIN_CELLS_PER_RANK, MAX_CELLS // num_ranks))
    slots_per_cell = max(1, -(-max(snapshot.num_pages) // per_rank))
    ranks = [_Rank(pages, slots_per_cell) for pages in snapshot.num_pages]
    for rank, free in zip(ranks, snapshot.free_slots, strict=True):
        for first, end in free:
            rank.free(first, end)
    for request in snapshot.running:
        num_runs = dict.fromkeys(range(num_ranks), 0)
        for run in request.pages:
            ranks[run.rank].hold(request.request_id, run.slot, run.num_pages, is_odd=num_runs[run.rank] % 2 == 1)
            num_runs[run.rank] += 1
    return PageMap(slots_per_cell, [rank.runs() for rank in ranks])
