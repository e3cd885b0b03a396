"""Placement by policy, and refusals of what never fits. No scheduler."""

import pytest
from fake_ranks import make_config, make_model, pools_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longspan.errors import CapacityError
from longspan.scheduler.allocation import Allocation
from longspan.scheduler.page_placer import PagePlacer, pages_for
from longspan.scheduler.reservations import RankPools
from longspan.types import Placement


def make_placer(num_pages: tuple[int, ...] = (20,), windows=(None,), num_ranks: int = 2, **options) -> PagePlacer:
    model, config = make_model(*windows), make_config(num_ranks, **options)
    return PagePlacer(model, config, RankPools.of(model, config, pools_of(config, num_pages)))


def placed(placer: PagePlacer, runs: list[tuple[int, int]]) -> Allocation:
    """An allocation with these pages."""
    allocation = Allocation(4, 1)
    for rank, num_pages in runs:
        allocation.place(rank, num_pages)
    return allocation


def test_short_prompts_are_packed_if_one_rank_can_hold_them_and_long_ones_striped():
    placer = make_placer((5,))
    placer.stripe_from(16)
    assert placer.placement_of(15) is Placement.PACKED
    assert placer.placement_of(16) is Placement.STRIPED
    placer.stripe_from(100)
    assert placer.placement_of(20) is Placement.PACKED
    assert placer.placement_of(21) is Placement.STRIPED, "six pages, and a rank has five"


@pytest.mark.parametrize("placement", ["packed", "striped", "spill"])
def test_the_users_policy_is_taken_for_any_length(placement):
    placer = make_placer(placement=placement)
    assert {placer.placement_of(length) for length in (1, 10_000)} == {Placement(placement)}
    assert placer.may_leave_home == (placement != "packed")


@settings(deadline=None, max_examples=100)
@given(
    windows=st.sampled_from([(None,), (None, 9), (9,), (9, None)]),
    placement=st.sampled_from(list(Placement)),
    prompt_pages=st.integers(1, 30),
    tail_pages=st.integers(0, 10),
    room=st.lists(st.integers(0, 20), min_size=3, max_size=3),
)
def test_pages_are_placed_where_every_group_has_room(windows, placement, prompt_pages, tail_pages, room):
    placer = make_placer((20,) * len(windows), windows, num_ranks=3)
    pools = RankPools.of(make_model(*windows), make_config(3), [(20,) * len(windows)] * 3)
    rooms = [[pages] * len(windows) for pages in room]
    runs = placer.place(prompt_pages, tail_pages, placement, rooms)
    if runs is None:
        assert placement is not Placement.SPILL or windows != (None,) or sum(room) < prompt_pages + tail_pages
        return
    counts = [sum(pages for r, pages in runs if r == rank) for rank in range(3)]
    assert sum(counts) == prompt_pages + tail_pages
    assert all(pools.fit(pages, rooms[rank]) for rank, pages in enumerate(counts) if pages)
    assert placement is not Placement.PACKED or len(runs) == 1


@settings(deadline=None, max_examples=200)
@given(
    windows=st.sampled_from([(None,), (None, 9), (9,), (9, None), (None, 20, 3)]),
    placement=st.sampled_from(["auto", "packed", "striped", "spill"]),
    pools=st.lists(st.lists(st.integers(1, 12), min_size=3, max_size=3), min_size=3, max_size=3),
    weights=st.none() | st.lists(st.sampled_from([1.0, 0.5, 0.25]), min_size=3, max_size=3),
    prompt_len=st.integers(1, 120),
    max_tokens=st.integers(1, 60),
)
@example((9, None), "auto", [[1, 1, 1], [1, 2, 1], [3, 3, 1]], None, 1, 13)
def test_a_request_that_is_not_refused_fits_empty_ranks_however_much_of_it_is_known(
    windows, placement, pools, weights, prompt_len, max_tokens
):
    """A request may be preempted after any of its tokens, and nobody makes room for the only one."""
    model, config = make_model(*windows), make_config(3, placement=placement, rank_weights=weights)
    rooms = [tuple(of_rank[: len(windows)]) for of_rank in pools]
    placer = PagePlacer(model, config, RankPools.of(model, config, rooms))
    try:
        placer.check_fits(prompt_len, max_tokens)
    except CapacityError:
        return
    for num_tokens in range(prompt_len, prompt_len + max_tokens):
        assert placer.place(pages_for(num_tokens, 4), 0, placer.placement_of(num_tokens), rooms) is not None


def test_ranks_without_room_for_a_window_leave_its_pages_to_others():
    placer = make_placer((9, 9), windows=(None, 100), num_ranks=3, placement="striped")
    assert placer.place(12, 0, Placement.STRIPED, [(9, 2), (9, 9), (9, 0)]) is None, "eleven pages fit"
    runs = placer.place(11, 0, Placement.STRIPED, [(9, 2), (9, 9), (9, 0)])
    assert runs is not None
    assert [sum(pages for r, pages in runs if r == rank) for rank in range(3)] == [2, 9, 0]


def test_generated_tokens_stay_at_home_or_follow_snake_order_behind_the_prompt():
    placer = make_placer(num_ranks=3)  # a stripe has two pages
    assert placer.next_rank(placed(placer, [(2, 5)]), 20) == 2, "packed"
    runs = [(1, 2), (2, 2), (0, 2)]
    found = []
    for _ in range(14):
        found.append(placer.next_rank(placed(placer, runs), 24))
        runs.append((found[-1], 1))
    assert found == [1, 1, 2, 2, 0, 0, 0, 0, 2, 2, 1, 1, 1, 1]
    spilled = make_placer(num_ranks=3, placement="spill")
    assert spilled.next_rank(placed(spilled, [(1, 2), (2, 2)]), 16) == 2


@pytest.mark.parametrize("placement", ["auto", "packed", "striped", "spill"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_longest_request_is_the_longest_that_is_not_refused(num_ranks, placement):
    placer = make_placer((6,), num_ranks=num_ranks, placement=placement)
    longest = placer.max_request_len
    assert longest == 6 * 4 * (1 if placement == "packed" else num_ranks) + 1
    for prompt_len in (1, longest // 2, longest - 1):
        placer.check_fits(prompt_len, longest - prompt_len)
        with pytest.raises(CapacityError, match=f"legal is at most {longest} "):
            placer.check_fits(prompt_len, longest - prompt_len + 1)


def test_windows_alone_admit_any_length():
    make_placer((9,), windows=(9,)).check_fits(10**6, 10**6)


def test_pages_hold_tokens():
    assert [pages_for(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
