"""Where requests go, as arithmetic: cached pages and free pages are numbers here. No scheduler, no allocator."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from fake_ranks import make_config, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.scheduler.admission import COPY_COST, Admission, choose_packed, choose_spread
from longspan.scheduler.page_placer import PagePlacer
from longspan.scheduler.reservations import RankPools, Room
from longspan.types import Placement

SIZE = 4
POOLS = RankPools(num_pages=((20,),), most_held=(None,))


@dataclass
class Cached:
    """Pages in one KV group that ranks still have; all of them idle, so that using one takes room."""

    copies_on: list[frozenset[int]]
    num_ranks: int

    def taken(self, hit: Sequence[int], home: int | None) -> Room | None:
        taken = [[0] for _ in range(self.num_ranks)]
        for rank, found in zip(hit, self.copies_on, strict=False):
            if rank not in found:
                return None
            taken[rank][0] += 1
            if home is not None and rank != home:
                taken[home][0] += 1
        return taken


def cached_on(num_ranks: int, *copies_on: set[int]) -> Cached:
    return Cached([frozenset(ranks) for ranks in copies_on], num_ranks)


def packed(num_pages: int, cached: Cached, load: list[float], room: list[int]) -> Admission | None:
    rooms = [[pages] for pages in room]
    return choose_packed(
        POOLS, SIZE, num_pages, cached.copies_on, cached.taken, load, rooms.__getitem__, [1.0] * len(room)
    )


def spread(num_pages: int, cached: Cached, room: list[int], placement: Placement = Placement.STRIPED):
    pools, config = RankPools(((20,),) * len(room), (None,)), make_config(len(room))
    placer = PagePlacer(make_model(None), config, pools)
    return choose_spread(placer, placement, num_pages, cached.copies_on, cached.taken, [[pages] for pages in room])


# -- short requests ----------------------------------------------------------------------------------------------------


def test_a_request_goes_where_least_work_waits_and_among_equals_to_the_first_rank():
    assert packed(3, cached_on(3), [5.0, 1.0, 2.0], [9, 9, 9]) == Admission([], [(1, 3)], 1)
    assert packed(3, cached_on(3), [1.0, 1.0, 1.0], [9, 9, 9]) == Admission([], [(0, 3)], 0)


def test_a_request_goes_elsewhere_if_the_least_busy_rank_has_no_room():
    assert packed(3, cached_on(3), [5.0, 1.0, 2.0], [9, 2, 9]) == Admission([], [(2, 3)], 2)
    assert packed(3, cached_on(3), [5.0, 1.0, 2.0], [2, 2, 2]) is None


@pytest.mark.parametrize(("load", "home"), [(7.9, 0), (8.1, 1)])
def test_cached_pages_are_copied_once_their_owner_is_busier_than_that_takes(load, home):
    """Twenty pages of four tokens to copy cost as much as eight tokens to compute; one page is new anyway."""
    assert 20 * SIZE * COPY_COST == 8
    found = packed(21, cached_on(2, *[{0}] * 20), [load, 0.0], [99, 99])
    assert found == Admission([0] * 20, [(home, 1)], home)


def test_an_owner_that_is_far_too_busy_is_not_waited_for_and_computing_again_takes_longer_than_copying():
    assert packed(5, cached_on(2, *[{0}] * 4), [1e6, 0.0], [99, 99]) == Admission([0] * 4, [(1, 1)], 1)


def test_a_hit_without_room_for_its_copies_is_shortened_to_what_the_rank_has():
    """Idle pages of rank 0 take room there, and there is none; rank 1 has the first two pages itself."""
    cached = cached_on(2, {0, 1}, {0, 1}, {0}, {0})
    assert packed(5, cached, [0.0, 0.0], [0, 9]) == Admission([1, 1], [(1, 3)], 1)


def test_a_hit_that_takes_all_the_room_is_given_up():
    """A page that is used where it lies and copied takes room twice: on rank 0 and on rank 1."""
    cached = cached_on(2, {0})
    assert packed(2, cached, [1e6, 0.0], [1, 2]) == Admission([0], [(1, 1)], 1)
    assert packed(2, cached, [1e6, 0.0], [0, 2]) == Admission([], [(1, 2)], 1)
    assert packed(2, cached, [1e6, 0.0], [0, 1]) is None


def test_a_hit_of_which_a_page_is_missing_is_no_option():
    def nothing(hit: Sequence[int], home: int | None) -> Room | None:
        return None

    found = choose_packed(POOLS, SIZE, 3, [frozenset({0})] * 2, nothing, [0.0, 1.0], lambda rank: [9], [1.0] * 2)
    assert found == Admission([], [(0, 3)], 0)


@settings(deadline=None, max_examples=200)
@given(
    num_ranks=st.integers(1, 4),
    num_new=st.integers(1, 6),
    owners=st.lists(st.sets(st.integers(0, 3), min_size=1), max_size=6),
    load=st.lists(st.integers(0, 40), min_size=4, max_size=4),
    room=st.lists(st.integers(0, 12), min_size=4, max_size=4),
)
def test_no_choice_is_cheaper_and_fits(num_ranks, num_new, owners, load, room):
    """Against every rank and every length of the hit, tried one by one; the fitting lengths that are not looked at are
    no cheaper on a rank than those that are, or have fewer pages of its own."""
    copies_on = [ranks & set(range(num_ranks)) or {0} for ranks in owners]
    cached = cached_on(num_ranks, *copies_on)
    num_pages = len(owners) + num_new
    load, room = load[:num_ranks], room[:num_ranks]
    found = packed(num_pages, cached, [float(work) for work in load], room)

    def cost(rank: int, length: int) -> float | None:
        hit = [rank if rank in ranks else min(ranks) for ranks in copies_on[:length]]
        taken = cached.taken(hit, rank)
        left = [pages - used for pages, (used,) in zip(room, taken, strict=True)]
        if min(left) < 0 or left[rank] < num_pages - length:
            return None
        return load[rank] + (num_pages - length + COPY_COST * sum(r != rank for r in hit)) * SIZE

    whole = [cost(rank, len(owners)) for rank in range(num_ranks)]
    none = [cost(rank, 0) for rank in range(num_ranks)]
    options = [option for option in whole + none if option is not None]
    if found is None:
        assert not options
        return
    assert found.runs == [(found.home, num_pages - len(found.hit))]
    assert cost(found.home, len(found.hit)) <= min(options, default=1e9)


# -- long requests -----------------------------------------------------------------------------------------------------


def test_a_long_request_is_striped_behind_its_cached_pages_where_these_are():
    found = spread(4 + 8, cached_on(2, {1}, {1}, {0, 1}, {0}), [20, 20])
    assert found.hit == [1, 1, 1, 0], "on a rank as long as it has the pages"
    assert found.home is None
    assert sum(pages for _, pages in found.runs) == 8
    assert {rank for rank, _ in found.runs} == {0, 1}


def test_a_spill_fills_the_rank_with_most_room_first():
    assert spread(8, cached_on(3), [5, 6, 6], Placement.SPILL) == Admission([], [(1, 6), (2, 2)], None)


def test_a_long_request_waits_while_its_pages_do_not_fit_beside_the_hit():
    cached = cached_on(2, *[{0}] * 4)
    assert spread(12, cached, [6, 6]) is not None
    assert spread(12, cached, [6, 5]) is None
    assert spread(12, cached, [3, 12]) is None, "idle pages of a hit take room where they lie"
