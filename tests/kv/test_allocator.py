"""Proves that the page allocator never loses, doubles or scatters slots.

A state machine runs random histories against a plain list of reference counts; examples show what the layout is for.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from longspan.errors import LongspanError
from longspan.kv.allocator import OutOfPagesError, PageAllocator

NUM_PAGES = 24


class AllocatorMachine(RuleBasedStateMachine):
    """Every allocation is a request that may grow, be shared and let go in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(NUM_PAGES)
        self.references = [0] * NUM_PAGES
        self.held: list[list[tuple[int, int]]] = []  # per holder: (slot, num_pages) runs, one reference each
        self.peak = 0

    def widest_gap(self) -> int:
        flags = "".join("x" if count else "." for count in self.references)
        return max(len(gap) for gap in flags.split("x"))

    def take(self, num_pages: int, near: int | None) -> list[tuple[int, int]]:
        runs = self.allocator.allocate(num_pages, near)
        assert sum(count for _, count in runs) == num_pages
        for slot, count in runs:
            for i in range(slot, slot + count):
                assert self.references[i] == 0, "a page in use was handed out"
                self.references[i] = 1
        self.peak = max(self.peak, sum(count > 0 for count in self.references))
        return runs

    @rule(num_pages=st.integers(0, NUM_PAGES + 2))
    def allocate(self, num_pages: int) -> None:
        widest, before = self.widest_gap(), list(self.references)
        if num_pages > self.references.count(0):
            with pytest.raises(OutOfPagesError):
                self.allocator.allocate(num_pages)
            assert self.references == before
            return
        runs = self.take(num_pages, None)
        if num_pages:
            assert (len(runs) == 1) == (num_pages <= widest), "one run wherever one gap is wide enough"
            self.held.append(runs)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), num_pages=st.integers(1, 6))
    def grow(self, data: st.DataObject, num_pages: int) -> None:
        holder = data.draw(st.sampled_from(self.held))
        if num_pages > self.references.count(0):
            return
        near = holder[-1][0] + holder[-1][1]
        free_behind = 0
        while near + free_behind < NUM_PAGES and self.references[near + free_behind] == 0:
            free_behind += 1
        runs = self.take(num_pages, near)
        if free_behind:
            assert runs[0] == (near, min(num_pages, free_behind)), "its own run is extended as far as possible"
        holder += runs

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        slot, count = data.draw(st.sampled_from(data.draw(st.sampled_from(self.held))))
        first = data.draw(st.integers(0, count - 1))
        pages = data.draw(st.integers(1, count - first))
        self.allocator.retain(slot + first, pages)
        for i in range(slot + first, slot + first + pages):
            self.references[i] += 1
        self.held.append([(slot + first, pages)])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go_of_a_front(self, data: st.DataObject) -> None:
        """As a sliding window does; a run may end up released in several pieces."""
        holder = data.draw(st.sampled_from(self.held))
        slot, count = holder[0]
        pages = data.draw(st.integers(1, count))
        self.allocator.release(slot, pages)
        for i in range(slot, slot + pages):
            self.references[i] -= 1
        holder[:1] = [(slot + pages, count - pages)] if pages < count else []
        self.held = [runs for runs in self.held if runs]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.held))
        for slot, count in holder:
            self.allocator.release(slot, count)
            for i in range(slot, slot + count):
                self.references[i] -= 1
        self.held.remove(holder)

    @invariant()
    def tells_the_same_story(self) -> None:
        self.allocator.check_integrity()
        assert self.allocator.num_free == self.references.count(0)
        assert self.allocator.num_used == NUM_PAGES - self.references.count(0)
        assert self.allocator.peak_used == self.peak


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_refused_allocation_takes_nothing_and_says_the_numbers():
    allocator = PageAllocator(5)
    allocator.allocate(3)
    with pytest.raises(OutOfPagesError, match="3 pages asked, 2 of 5 free"):
        allocator.allocate(3)
    allocator.check_integrity()
    assert allocator.num_free == 2
    assert len(allocator.allocate(2)) == 1
    assert issubclass(OutOfPagesError, LongspanError)


def test_a_growing_request_beside_another_stays_in_one_run():
    allocator = PageAllocator(64)
    ends = [slot + count for slot, count in (allocator.allocate(1) + allocator.allocate(1))]
    for _ in range(20):
        for i, near in enumerate(ends):
            assert allocator.allocate(1, near) == [(near, 1)]
            ends[i] += 1
    allocator.check_integrity()


@given(st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_four_requests_that_start_together_can_each_double_in_place(sizes):
    allocator = PageAllocator(128)
    ends = [sum(allocator.allocate(size)[0]) for size in sizes]
    for size, near in zip(sizes, ends, strict=True):
        assert allocator.allocate(size, near) == [(near, size)]


def test_pages_are_taken_from_as_few_gaps_as_possible():
    allocator = PageAllocator(10)
    allocator.allocate(10)
    for slot, count in [(0, 1), (2, 3), (7, 2)]:
        allocator.release(slot, count)
    assert allocator.allocate(5) == [(2, 3), (7, 2)]
    assert allocator.num_free == 1


def test_a_shared_page_is_free_only_after_its_last_reference():
    allocator = PageAllocator(4)
    allocator.allocate(3)
    allocator.retain(1, 1)
    allocator.release(0, 3)
    allocator.check_integrity()
    assert allocator.num_free == 3
    assert allocator.allocate(3, near=2) == [(2, 2), (0, 1)]
    allocator.release(1, 1)
    assert allocator.num_free == 1


def test_freed_neighbours_become_one_gap_again():
    allocator = PageAllocator(6)
    allocator.allocate(6)
    for slot in (1, 3, 2, 5, 0, 4):
        allocator.release(slot, 1)
        allocator.check_integrity()
    assert allocator.allocate(6) == [(0, 6)]


@pytest.mark.parametrize("near", [-1, 0, 2, 4, 99])
def test_a_place_that_is_not_free_is_only_a_wish(near):
    allocator = PageAllocator(4)
    allocator.allocate(3)
    assert allocator.allocate(1, near) == [(3, 1)]


def test_a_pool_without_pages_gives_none():
    allocator = PageAllocator(0)
    allocator.check_integrity()
    assert allocator.allocate(0) == []
    with pytest.raises(OutOfPagesError, match="1 pages asked, 0 of 0 free"):
        allocator.allocate(1)


def test_rejects_releasing_or_retaining_a_free_page():
    allocator = PageAllocator(4)
    allocator.allocate(2)
    with pytest.raises(AssertionError, match="slot 2 is free already"):
        allocator.release(2, 1)
    with pytest.raises(AssertionError, match="slot 3 is free"):
        allocator.retain(3, 1)
