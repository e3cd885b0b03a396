"""What a request's allocation says of its pages. No scheduler."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from longspan.plan.types import PageCopy
from longspan.scheduler.allocation import Allocation
from longspan.sharding.pages import PageRun


@given(
    page_size=st.sampled_from([1, 4]),
    runs=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), max_size=8),
    start=st.integers(0, 60),
    length=st.integers(0, 60),
)
def test_the_placement_of_positions_is_that_of_their_pages(page_size, runs, start, length):
    allocation = Allocation(page_size, 1)
    for rank, num_pages in runs:
        allocation.place(rank, num_pages)
    pages = [rank for rank, num_pages in runs for _ in range(num_pages)]
    assert allocation.num_pages == len(pages)
    assert allocation.ranks == set(pages)
    assert all(a[0] != b[0] for a, b in pairwise(allocation.page_ranks))
    start, end = min(start, len(pages) * page_size), min(start + length, len(pages) * page_size)
    found = list(allocation.ranks_of(start, end))
    assert [(rank, i) for rank, first, last in found for i in range(first, last)] == [
        (pages[i // page_size], i) for i in range(start, end)
    ]
    assert all(a[0] != b[0] for a, b in pairwise(found)), "one run while the rank is the same"


def test_copies_go_where_there_are_slots_and_follow_the_pages_before_them():
    allocation = Allocation(4, 2)
    allocation.tables[1].apply([PageRun(0, 1, 10, 2)])
    allocation.copy_to(1, 1, PageRun(2, 0, 30, 5), [(12, 3), (20, 2)])
    assert allocation.copies == [
        PageCopy(1, PageRun(2, 0, 30, 3), PageRun(2, 1, 12, 3)),
        PageCopy(1, PageRun(5, 0, 33, 2), PageRun(5, 1, 20, 2)),
    ]
    assert allocation.tables[1].runs == [PageRun(0, 1, 10, 5), PageRun(5, 1, 20, 2)]
    assert allocation.tables[0].runs == []


def test_pages_that_no_token_sees_any_more_need_not_be_copied():
    allocation = Allocation(4, 2)
    allocation.copy_to(1, 0, PageRun(0, 0, 30, 8), [(10, 2), (20, 3), (40, 3)])
    allocation.copy_to(1, 1, PageRun(0, 0, 30, 8), [(10, 8)])
    assert allocation.leave_copies_before(0, 3) == [PageRun(0, 0, 30, 2), PageRun(2, 0, 32, 1)]
    assert allocation.copies == [
        PageCopy(0, PageRun(3, 0, 33, 2), PageRun(3, 1, 21, 2)),
        PageCopy(0, PageRun(5, 0, 35, 3), PageRun(5, 1, 40, 3)),
        PageCopy(1, PageRun(0, 0, 30, 8), PageRun(0, 1, 10, 8)),
    ]
    assert allocation.leave_copies_before(0, 3) == []
    assert allocation.leave_copies_before(1, 9) == [PageRun(0, 0, 30, 8)]
    assert [copy.group_idx for copy in allocation.copies] == [0, 0]
