"""Lengths of stripes and chunks, under a budget per rank and under one for all ranks."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.sharding.geometry import StepGeometry

PAGE_SIZES = st.sampled_from([1, 2, 16, 64])


@given(num_ranks=st.integers(1, 9), page_size=PAGE_SIZES, stripe_pages=st.integers(1, 40), budget=st.integers(1, 3000))
def test_every_rank_of_a_chunk_keeps_its_budget_and_has_whole_stripes(num_ranks, page_size, stripe_pages, budget):
    geometry = StepGeometry.of_rank_budget(num_ranks, page_size, stripe_pages * page_size, budget)
    (tokens,) = set(geometry.tokens_per_rank)
    assert tokens <= max(page_size, budget)
    assert tokens % geometry.stripe_len == 0
    assert tokens * num_ranks == geometry.chunk_len
    assert geometry.stripe_len == geometry.stripe_pages * page_size <= stripe_pages * page_size


@pytest.mark.parametrize(
    ("page_size", "stripe_size", "budget", "stripe_len", "tokens_per_rank"),
    [
        (16, 512, 2048, 512, 2048),  # the defaults
        (16, 512, 1600, 512, 1024),  # three stripes fit: two balance
        (16, 512, 600, 512, 512),
        (16, 512, 500, 496, 496),  # a stripe is no longer than the whole pages of a budget
        (16, 512, 7, 16, 16),  # nor shorter than a page
    ],
)
def test_stripes_and_chunks_of_a_budget_per_rank(page_size, stripe_size, budget, stripe_len, tokens_per_rank):
    for num_ranks in (1, 3, 8):
        geometry = StepGeometry.of_rank_budget(num_ranks, page_size, stripe_size, budget)
        assert geometry.stripe_len == stripe_len
        assert geometry.tokens_per_rank == (tokens_per_rank,) * num_ranks


@given(num_ranks=st.integers(1, 9), page_size=PAGE_SIZES, stripe_size=st.integers(1, 3000), budget=st.integers(1, 9000))
def test_a_budget_for_all_ranks_is_one_chunk_of_two_stripes_per_rank(num_ranks, page_size, stripe_size, budget):
    geometry = StepGeometry.of_step_budget(num_ranks, page_size, stripe_size, budget)
    assert geometry.chunk_len == max(page_size, budget // page_size * page_size)
    assert geometry.stripe_len == geometry.stripe_pages * page_size < stripe_size + page_size
    if 2 * num_ranks * page_size <= budget:
        assert geometry.stripe_len <= budget / (2 * num_ranks) + page_size


@given(
    num_ranks=st.integers(1, 5),
    page_size=PAGE_SIZES,
    stripe_pages=st.integers(1, 8),
    budget=st.integers(1, 3000),
    prompt_pages=st.integers(0, 400),
    tail_pages=st.integers(0, 30),
)
def test_stripes_hold_all_pages_and_end_where_chunks_end(
    num_ranks, page_size, stripe_pages, budget, prompt_pages, tail_pages
):
    geometry = StepGeometry.of_rank_budget(num_ranks, page_size, stripe_pages * page_size, budget)
    stripes = geometry.stripes(prompt_pages, tail_pages)
    assert sum(stripes) == prompt_pages + tail_pages
    assert max(stripes, default=0) <= geometry.stripe_pages
    ends = {pages * page_size for pages in accumulate(stripes)} | {0}
    assert set(range(0, prompt_pages * page_size + 1, geometry.chunk_len)) <= ends
    assert {prompt_pages * page_size, (prompt_pages + tail_pages) * page_size} <= ends
