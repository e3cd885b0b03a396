"""Proves that placement balances: memory at every length, causal work wherever snake order promises it.

Also that no rank gets more pages than it has room for, that all room is used before a request is refused, and that
lengths which fit badly (0, 1, a page more or less, 31 tokens on 8 ranks) are ordinary.
"""

from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.sharding.geometry import StepGeometry
from longspan.sharding.placement import chunk_len, place, snake_order, snake_rank
from longspan.types import Placement

PACKED, STRIPED, SPILL = Placement.PACKED, Placement.STRIPED, Placement.SPILL
RANK_COUNTS = range(1, 9)


def stripe_lengths(num_pages, stripe_pages, chunk_pages, num_ranks, tail_pages):
    """Stripes of equal ranks, with pages of one token."""
    return StepGeometry(num_ranks, 1, stripe_pages, chunk_pages).stripes(num_pages, tail_pages)


def causal_work(runs: list[tuple[int, int]], num_ranks: int) -> list[int]:
    """Query-key pairs per rank, a page counted as one token."""
    work, position = [0] * num_ranks, 0
    for rank, num_pages in runs:
        for _ in range(num_pages):
            position += 1
            work[rank] += position
    return work


def pages_per_rank(runs: list[tuple[int, int]], num_ranks: int) -> list[int]:
    pages = [0] * num_ranks
    for rank, num_pages in runs:
        pages[rank] += num_pages
    return pages


# -- snake order -----------------------------------------------------------------------------------------------------


def test_snake_order_goes_forwards_and_backwards():
    assert list(islice(snake_order([2, 0, 1]), 8)) == [2, 0, 1, 1, 0, 2, 2, 0]


@pytest.mark.parametrize("num_ranks", RANK_COUNTS)
def test_the_rank_of_a_stripe_is_where_snake_order_comes_to_it(num_ranks):
    for home in range(num_ranks):
        order = [(home + i) % num_ranks for i in range(num_ranks)]
        expected = list(islice(snake_order(order), 5 * num_ranks))
        assert [snake_rank(stripe_idx, home, num_ranks) for stripe_idx in range(5 * num_ranks)] == expected


@pytest.mark.parametrize("num_ranks", RANK_COUNTS)
@pytest.mark.parametrize("rounds", [1, 2, 3, 7])
@pytest.mark.parametrize("stripe_pages", [1, 3])
def test_snake_order_balances_the_work_between_stripes_exactly_for_multiples_of_2n(num_ranks, rounds, stripe_pages):
    """Stripe i, whole, meets 2i + 1 half squares of keys."""
    order = snake_order(range(num_ranks))
    work = [0] * num_ranks
    for i in range(2 * num_ranks * rounds):
        work[next(order)] += (2 * i + 1) * stripe_pages**2
    assert len(set(work)) == 1


@pytest.mark.parametrize("num_ranks", range(2, 9))
def test_round_robin_would_not_balance(num_ranks):
    """The excess of the heaviest rank that the design names, (N-1)/num_stripes, is real: the test above can fail."""
    num_stripes = 2 * num_ranks
    work = [0] * num_ranks
    for i in range(num_stripes):
        work[i % num_ranks] += 2 * i + 1
    assert max(work) * num_ranks / sum(work) - 1 == pytest.approx((num_ranks - 1) / num_stripes)


# -- stripes ---------------------------------------------------------------------------------------------------------

stripe_arguments = st.tuples(
    st.integers(0, 300), st.integers(1, 12), st.integers(1, 5), st.sampled_from(RANK_COUNTS), st.integers(0, 50)
)


@given(stripe_arguments)
def test_stripes_sum_to_the_request_and_none_is_too_long(arguments):
    num_pages, stripe_pages, stripes_per_rank, num_ranks, tail_pages = arguments
    chunk_pages = stripes_per_rank * num_ranks * stripe_pages
    lengths = stripe_lengths(num_pages, stripe_pages, chunk_pages, num_ranks, tail_pages)
    assert sum(lengths) == num_pages + tail_pages
    assert all(0 <= length <= stripe_pages for length in lengths)


@given(stripe_arguments)
def test_full_chunks_take_full_stripes_and_the_last_chunk_a_multiple_of_2n_as_equal_as_pages_allow(arguments):
    num_pages, stripe_pages, stripes_per_rank, num_ranks, _ = arguments
    chunk_pages = stripes_per_rank * num_ranks * stripe_pages
    lengths = stripe_lengths(num_pages, stripe_pages, chunk_pages, num_ranks, 0)
    num_full = num_pages // chunk_pages * (chunk_pages // stripe_pages)
    assert lengths[:num_full] == [stripe_pages] * num_full
    last = lengths[num_full:]
    cycle = 2 * num_ranks
    assert len(last) == cycle * -(-(num_pages % chunk_pages) // (cycle * stripe_pages)), "fewest stripes"
    if last:
        assert max(last) - min(last) <= 1


@pytest.mark.parametrize("num_ranks", RANK_COUNTS)
@pytest.mark.parametrize("num_pages", [1, 2, 5, 7, 15, 16, 17, 31, 32, 33, 47, 64, 100, 250])
def test_a_short_prompt_balances_to_one_page(num_ranks, num_pages):
    """One page more on a rank is all the imbalance there is, and a page meets at most all pages."""
    lengths = stripe_lengths(num_pages, 8, 10**6, num_ranks, 0)
    runs = place(STRIPED, lengths, [num_pages] * num_ranks, 0)
    assert runs is not None
    pages = pages_per_rank(runs, num_ranks)
    assert max(pages) - min(pages) <= 1
    work = causal_work(runs, num_ranks)
    if num_pages >= 2 * num_ranks:
        assert max(work) - sum(work) / num_ranks <= 1.1 * num_pages


@pytest.mark.parametrize("num_ranks", RANK_COUNTS)
def test_whole_chunks_balance_causal_work_to_the_last_token(num_ranks):
    stripe_pages = 4
    lengths = stripe_lengths(6 * num_ranks * stripe_pages, stripe_pages, 2 * num_ranks * stripe_pages, num_ranks, 0)
    runs = place(STRIPED, lengths, [10**6] * num_ranks, 0)
    assert runs is not None
    assert len(set(pages_per_rank(runs, num_ranks))) == 1
    assert len(set(causal_work(runs, num_ranks))) == 1


def test_31_tokens_on_8_ranks_give_every_rank_its_share():
    lengths = stripe_lengths(31, 512, 10**6, 8, 0)
    assert len(lengths) == 16
    runs = place(STRIPED, lengths, [4] * 8, 0)
    assert runs is not None
    assert sorted(pages_per_rank(runs, 8)) == [3] + [4] * 7


@pytest.mark.parametrize(("num_pages", "tail_pages"), [(0, 0), (0, 3), (1, 0), (1, 1)])
def test_tiny_requests_have_stripes_too(num_pages, tail_pages):
    lengths = stripe_lengths(num_pages, 2, 8, 4, tail_pages)
    assert sum(lengths) == num_pages + tail_pages
    runs = place(STRIPED, lengths, [1] * 4, 0)
    assert runs is not None
    assert max(pages_per_rank(runs, 4)) <= 1


# -- chunks ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 4300), st.integers(1, 700), st.sampled_from(RANK_COUNTS))
def test_a_chunk_is_the_largest_balanced_one_within_the_budget(more_than_a_stripe, stripe_len, num_ranks):
    budget = stripe_len + more_than_a_stripe
    tokens = chunk_len(budget, stripe_len, num_ranks)
    assert tokens % (num_ranks * stripe_len) == 0
    stripes_per_rank = tokens // (num_ranks * stripe_len)
    assert stripes_per_rank * stripe_len <= budget
    assert stripes_per_rank == 1 or stripes_per_rank % 2 == 0
    more = 2 if stripes_per_rank % 2 == 0 else 1
    assert (stripes_per_rank + more) * stripe_len > budget


# -- place -----------------------------------------------------------------------------------------------------------

rooms = st.lists(st.integers(0, 20), min_size=1, max_size=8)


@given(st.sampled_from(list(Placement)), st.lists(st.integers(0, 9), max_size=12), rooms, st.data())
def test_place_fits_exactly_when_there_is_room_and_never_exceeds_it(placement, stripes, room, data):
    home = data.draw(st.integers(0, len(room) - 1))
    runs = place(placement, stripes, room, home)
    capacity = room[home] if placement is PACKED else sum(room)
    assert (runs is None) == (sum(stripes) > capacity)
    if runs is None:
        return
    pages = pages_per_rank(runs, len(room))
    assert sum(pages) == sum(stripes)
    assert all(got <= free for got, free in zip(pages, room, strict=True))
    assert all(num_pages > 0 for _, num_pages in runs)
    assert all(a[0] != b[0] for a, b in pairwise(runs)), "neighbours on one rank are one run"
    if placement is PACKED:
        assert {rank for rank, _ in runs} <= {home}


@given(rooms, st.sampled_from([STRIPED, SPILL]), st.data())
def test_all_room_of_all_ranks_can_be_used(room, placement, data):
    home = data.draw(st.integers(0, len(room) - 1))
    total = sum(room)
    stripes = [2] * (total // 2) + [1] * (total % 2)
    runs = place(placement, stripes, room, home)
    assert runs is not None
    assert pages_per_rank(runs, len(room)) == room


@given(rooms, st.integers(0, 60), st.data())
def test_spill_fills_the_home_rank_before_any_other(room, num_pages, data):
    home = data.draw(st.integers(0, len(room) - 1))
    runs = place(SPILL, [num_pages], room, home)
    if runs is None:
        return
    pages = pages_per_rank(runs, len(room))
    order = [(home + i) % len(room) for i in range(len(room))]
    expected, left = [0] * len(room), num_pages
    for rank in order:
        expected[rank] = min(left, room[rank])
        left -= expected[rank]
    assert pages == expected
    assert [rank for rank, _ in runs] == [rank for rank in order if expected[rank]]


@given(stripe_arguments, st.data())
def test_striped_memory_per_rank_is_an_equal_share_and_at_most_a_stripe_and_a_page(arguments, data):
    """The page is the prompt's uneven end, the stripe that of the generated tokens, which have stripes of their own."""
    num_pages, stripe_pages, stripes_per_rank, num_ranks, tail_pages = arguments
    lengths = stripe_lengths(
        num_pages, stripe_pages, stripes_per_rank * num_ranks * stripe_pages, num_ranks, tail_pages
    )
    home = data.draw(st.integers(0, num_ranks - 1))
    runs = place(STRIPED, lengths, [10**6] * num_ranks, home)
    assert runs is not None
    assert max(pages_per_rank(runs, num_ranks)) <= (num_pages + tail_pages) / num_ranks + stripe_pages + 1
    if not tail_pages:
        assert max(pages_per_rank(runs, num_ranks)) <= num_pages / num_ranks + stripe_pages


def test_generated_tokens_do_not_stay_on_one_rank_for_ever():
    lengths = stripe_lengths(8, 2, 8, 2, 100)
    runs = place(STRIPED, lengths, [10**6] * 2, 0)
    assert runs is not None
    assert pages_per_rank(runs, 2) == [54, 54]
    assert max(num_pages for _, num_pages in runs) <= 4


def test_a_full_rank_hands_the_rest_of_its_stripe_to_the_next_in_snake_order():
    assert place(STRIPED, [4, 4, 4], [2, 9, 9], 0) == [(0, 2), (1, 2), (2, 8)]


@pytest.mark.parametrize("placement", list(Placement))
@pytest.mark.parametrize("stripes", [[], [0]])
def test_no_pages_need_no_room(placement, stripes):
    assert place(placement, stripes, [0, 0, 0], 1) == []


@pytest.mark.parametrize("placement", list(Placement))
def test_one_rank_makes_all_placements_equal(placement):
    assert place(placement, [3, 3, 1], [7], 0) == [(0, 7)]
    assert place(placement, [3, 3, 2], [7], 0) is None
