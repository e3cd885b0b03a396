"""Stripes of unequal ranks: every rank's part of memory and of causal work follows its weight, in every chunk.

Equal weights must change nothing: `stripes_of_equal_ranks` is the rule that equal ranks had before there were weights.
"""

import random
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.errors import ConfigError
from longspan.sharding.geometry import StepGeometry
from longspan.sharding.placement import place, snake_rank
from longspan.types import Placement

WEIGHTS = st.lists(st.sampled_from([0.5, 1, 1.3, 2, 3, 4.7]), min_size=1, max_size=6)


def stripes_of_equal_ranks(num_pages, stripe_pages, chunk_pages, num_ranks, tail_pages):
    lengths, left = [], num_pages
    while left >= chunk_pages:
        lengths += [stripe_pages] * (chunk_pages // stripe_pages)
        lengths += [chunk_pages % stripe_pages] * (chunk_pages % stripe_pages > 0)
        left -= chunk_pages
    if left:
        cycle = 2 * num_ranks
        num_stripes = cycle * -(-left // (cycle * stripe_pages))
        short, longer = divmod(left, num_stripes)
        lengths += [short + 1] * longer + [short] * (num_stripes - longer)
    lengths += [stripe_pages] * (tail_pages // stripe_pages)
    return lengths + [tail_pages % stripe_pages] * (tail_pages % stripe_pages > 0)


def owners(geometry, num_pages, tail_pages=0, home=0):
    """Rank of every page, where all ranks have room."""
    stripes = geometry.stripes(num_pages, tail_pages, home)
    runs = place(Placement.STRIPED, stripes, [10**9] * geometry.num_ranks, home)
    return [rank for rank, pages in runs for _ in range(pages)]


def causal_work(ranks, num_ranks, first=0):
    """Pairs of pages per rank, those before a page and half of itself."""
    work = [0.0] * num_ranks
    for page, rank in enumerate(ranks, first):
        work[rank] += page + 0.5
    return work


@given(
    num_ranks=st.integers(1, 7),
    stripe_pages=st.integers(1, 9),
    budget_pages=st.integers(1, 60),
    num_pages=st.integers(0, 500),
    tail_pages=st.integers(0, 40),
    weight=st.sampled_from([None, 1, 0.3]),
    home=st.integers(0, 6),
)
def test_equal_weights_give_the_stripes_of_equal_ranks(
    num_ranks, stripe_pages, budget_pages, num_pages, tail_pages, weight, home
):
    weights = None if weight is None else [weight] * num_ranks
    geometry = StepGeometry.of_rank_budget(num_ranks, 4, 4 * stripe_pages, 4 * budget_pages, weights)
    assert geometry == StepGeometry.of_rank_budget(num_ranks, 4, 4 * stripe_pages, 4 * budget_pages)
    arguments = (geometry.stripe_pages, geometry.chunk_len // 4, num_ranks, tail_pages)
    assert geometry.stripes(num_pages, tail_pages, home % num_ranks) == stripes_of_equal_ranks(num_pages, *arguments)


@given(
    num_ranks=st.integers(1, 5),
    stripe_size=st.integers(1, 900),
    budget=st.integers(1, 4000),
    num_pages=st.integers(0, 500),
)
def test_a_budget_of_all_ranks_keeps_its_stripes(num_ranks, stripe_size, budget, num_pages):
    geometry = StepGeometry.of_step_budget(num_ranks, 16, stripe_size, budget)
    expected = stripes_of_equal_ranks(num_pages, geometry.stripe_pages, geometry.chunk_len // 16, num_ranks, 5)
    assert geometry.stripes(num_pages, 5) == expected


@given(weights=WEIGHTS, stripe_pages=st.integers(1, 12), budget_pages=st.integers(10, 80), data=st.data())
def test_every_rank_has_its_share_of_every_prompt_and_keeps_its_budget(weights, stripe_pages, budget_pages, data):
    num_ranks = len(weights)
    geometry = StepGeometry.of_rank_budget(num_ranks, 1, stripe_pages, budget_pages, weights)
    assert max(geometry.tokens_per_rank) <= budget_pages
    assert geometry.chunk_len == sum(geometry.tokens_per_rank)
    num_pages, home = data.draw(st.integers(0, 1500)), data.draw(st.integers(0, num_ranks - 1))
    ranks = owners(geometry, num_pages, home=home)
    shares = geometry.tokens_per_rank
    for end in {num_pages, *range(0, num_pages + 1, geometry.chunk_len)}:
        for rank in range(num_ranks):
            assert abs(ranks[:end].count(rank) - end * shares[rank] / sum(shares)) < 1
    for rank, share in enumerate(shares):
        assert abs(share / max(shares) - weights[rank] / max(weights)) <= 0.5 / max(shares) + 1e-12


@given(weights=WEIGHTS, data=st.data())
def test_no_stripe_is_longer_than_its_ranks_full_one(weights, data):
    num_ranks = len(weights)
    geometry = StepGeometry.of_rank_budget(num_ranks, 1, 8, 32, weights)
    num_pages, tail_pages = data.draw(st.integers(0, 400)), data.draw(st.integers(0, 100))
    home = data.draw(st.integers(0, num_ranks - 1))
    stripes = geometry.stripes(num_pages, tail_pages, home)
    assert sum(stripes) == num_pages + tail_pages
    for index, pages in enumerate(stripes):
        share = geometry.tokens_per_rank[snake_rank(index, home, num_ranks)]
        assert 0 <= pages <= -(-share // 4)  # four passes of eight pages are a chunk
    ends = {0, *accumulate(stripes)}
    assert set(range(0, num_pages + 1, geometry.chunk_len)) <= ends


@pytest.mark.parametrize("weights", [(2, 1), (1, 3), (2, 1, 1), (1, 2, 4), (5, 4, 3, 2, 1), (1.7, 1, 1, 1.2, 1)])
def test_causal_work_of_every_chunk_follows_the_weights(weights):
    num_ranks = len(weights)
    geometry = StepGeometry.of_rank_budget(num_ranks, 16, 512, 2048, weights)
    chunk = geometry.chunk_len // 16
    ranks = owners(geometry, 6 * chunk)
    for index in range(6):
        first = index * chunk
        work = causal_work(ranks[first : first + chunk], num_ranks, first)
        for rank, weight in enumerate(weights):
            assert work[rank] / sum(work) == pytest.approx(weight / sum(weights), rel=0.02)


def test_two_ranks_of_two_to_one_share_a_prompt_of_64k_within_five_percent():
    """Dense work goes with tokens, attention with the pairs of a token and what is before it."""
    geometry = StepGeometry.of_rank_budget(2, 16, 512, 2048, (2, 1))
    ranks = owners(geometry, 65536 // 16)
    assert ranks.count(0) / ranks.count(1) == pytest.approx(2, rel=0.001)
    work = causal_work(ranks, 2)
    assert work[0] / work[1] == pytest.approx(2, rel=0.01)


def test_forwards_passes_alone_would_not_balance():
    """What snake order does for unequal stripes is real: the tests above can fail."""
    ranks = ([0] * 2 + [1]) * 4
    work = causal_work(ranks, 2)
    assert abs(work[0] / work[1] - 2) > 0.15


@given(weights=WEIGHTS, home=st.integers(0, 5), start=st.integers(0, 300))
def test_generated_tokens_go_round_by_weight(weights, home, start):
    num_ranks, home = len(weights), home % len(weights)
    geometry = StepGeometry.of_rank_budget(num_ranks, 1, 8, 32, weights)
    cycle = 2 * geometry.chunk_len
    ranks = [geometry.tail_rank(page, home) for page in range(start, start + cycle)]
    expected = [share * 2 for share in geometry.tokens_per_rank]
    assert [ranks.count(rank) for rank in range(num_ranks)] == expected
    assert [geometry.tail_rank(page, home) for page in range(40)] == owners(geometry, 0, 40, home)


def test_a_rank_without_room_hands_its_stripes_on():
    geometry = StepGeometry.of_rank_budget(3, 1, 4, 8, (4, 2, 1))
    stripes = geometry.stripes(100)
    rng = random.Random(0)
    for _ in range(50):
        room = [rng.randrange(0, 100) for _ in range(3)]
        runs = place(Placement.STRIPED, stripes, room, 0)
        if sum(room) < 100:
            assert runs is None
        else:
            assert sum(pages for _, pages in runs) == 100
            assert all(sum(p for r, p in runs if r == rank) <= room[rank] for rank in range(3))


def test_rejects_a_weight_that_leaves_its_rank_without_a_page():
    with pytest.raises(ConfigError) as caught:
        StepGeometry.of_rank_budget(3, 16, 512, 2048, (400, 200, 1))
    assert str(caught.value) == (
        "rank_weights: got 400, 200, 1, which leaves rank 2 without a page: a chunk has 128 pages of 16 tokens on the "
        "rank with the largest weight; legal is at least 1.5625"
    )
    StepGeometry.of_rank_budget(3, 16, 512, 2048, (400, 200, 1.5625))
