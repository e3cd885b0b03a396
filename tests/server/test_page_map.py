"""The map of pages says of every cell what is in it, however coarse the cells are."""

from collections import Counter
from types import SimpleNamespace

import pytest

from longspan.server.page_map import CACHED, FREE, SHARED, make_map
from longspan.sharding.pages import PageRun


def snapshot(num_pages, taken, **held):
    """`taken`: [rank] slots that are no longer free; `held`: page runs by request, named `r7`."""
    free = [
        [(slot, slot + 1) for slot in range(pages) if slot not in of_rank]
        for pages, of_rank in zip(num_pages, taken, strict=True)
    ]
    running = [SimpleNamespace(request_id=int(name[1:]), pages=runs) for name, runs in held.items()]
    return SimpleNamespace(num_pages=num_pages, free_slots=free, running=running)


def cells(runs):
    return [pair for count, owner, shade in zip(*[iter(runs)] * 3, strict=True) for pair in [(owner, shade)] * count]


def test_a_cell_per_page_shows_owners_stripes_cached_and_free_pages():
    runs = [PageRun(0, 0, 0, 2), PageRun(2, 1, 0, 4), PageRun(6, 0, 2, 4), PageRun(10, 1, 4, 2)]
    found = make_map(snapshot([8, 8], [{*range(6), 7}, range(6)], r7=runs))
    assert found.slots_per_cell == 1
    even, odd = (7, 8), (7, 9)
    assert cells(found.cells[0]) == [even, even, odd, odd, odd, odd, (FREE, 0), (CACHED, 8)]
    assert cells(found.cells[1]) == [even, even, even, even, odd, odd, (FREE, 0), (FREE, 0)]


def test_a_page_of_several_requests_is_shared():
    both = [PageRun(0, 0, 1, 2)]
    found = make_map(snapshot([4], [{1, 2, 3}], r1=both, r2=[*both, PageRun(2, 0, 3, 1)]))
    assert cells(found.cells[0]) == [(FREE, 0), (SHARED, 8), (SHARED, 8), (2, 9)]


def test_a_coarse_cell_belongs_to_whoever_has_most_and_says_how_full_it_is():
    num_pages = 4 * 1024
    runs = [PageRun(0, 0, 0, 1), PageRun(1, 0, 3, 4)]  # slots 0 and 3..6
    found = make_map(snapshot([num_pages], [{0, 1, 2, 3, 4, 5, 6, 8, 9}], r5=runs))
    assert found.slots_per_cell == 4
    first, second, third, fourth = cells(found.cells[0])[:4]
    assert first == (5, 8)  # two of each: the request's, whose odd run has one of them
    assert second == (5, 7)  # three of four, of the odd run
    assert third == (CACHED, 4)
    assert fourth == (FREE, 0)


@pytest.mark.parametrize("num_ranks", [1, 3, 128])
def test_cells_are_few_on_any_number_of_ranks_and_cover_every_page(num_ranks):
    num_pages = [20_003 - rank for rank in range(num_ranks)]
    runs = [PageRun(0, rank, 5 * rank, 1000) for rank in range(num_ranks)]
    taken = [range(5 * rank, 5 * rank + 1000) for rank in range(num_ranks)]
    found = make_map(snapshot(num_pages, taken, r3=runs))
    per_rank = [len(cells(runs)) for runs in found.cells]
    assert sum(per_rank) <= 128 * 64
    for count, pages in zip(per_rank, num_pages, strict=True):
        assert (count - 1) * found.slots_per_cell < pages <= count * found.slots_per_cell
    owners = Counter(owner for runs in found.cells for owner, _ in cells(runs))
    assert owners[3] >= num_ranks
    assert owners[3] * found.slots_per_cell <= 1000 * num_ranks + 2 * found.slots_per_cell * num_ranks
