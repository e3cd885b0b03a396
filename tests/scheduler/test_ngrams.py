"""Drafts from n-grams are what followed their latest occurrence, however the tokens came in."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.scheduler.ngrams import BULK_TOKENS, NgramProposer


def propose(tokens, most=4, *, longest=3, shortest=3):
    return NgramProposer(longest, shortest).propose(tokens, most)


def test_a_draft_is_what_followed_the_latest_occurrence():
    assert propose([1, 2, 3, 4, 5, 9, 1, 2, 3]) == [4, 5, 9, 1]
    assert propose([1, 2, 3, 4, 1, 2, 3, 7, 8, 1, 2, 3], 2) == [7, 8]
    assert propose([1, 2, 3, 4, 5, 2, 3]) == [], "two tokens are no match for three"
    assert propose([1, 2, 3, 4, 5, 2, 3], 2, shortest=2) == [4, 5]
    assert propose([7, 1, 2, 3, 4, 8, 2, 3, 5, 1, 2, 3], 1, shortest=2) == [4], "the longer n-gram counts"
    assert propose([5]) == []
    assert propose([5], shortest=1, longest=1) == []


def test_a_sequence_goes_on_with_its_drafts():
    assert propose([9, 1, 2, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert propose([4, 4, 4, 4], 3) == [4, 4, 4]


def test_a_match_is_followed_while_it_is_right():
    """Also where the newest n-gram alone would say something else."""
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    proposer = NgramProposer(3, 3)
    tokens = [*text, 50, 4, 5, 6, 90, 60, 1, 2, 3]
    assert proposer.propose(tokens, 2) == [4, 5]
    for token, following in ((4, [5, 6]), (5, [6, 7]), (6, [7, 8])):
        tokens.append(token)
        assert proposer.propose(tokens, 2) == following
    tokens.append(99)
    assert proposer.propose(tokens, 2) == []


def last_occurrence(tokens, length):
    """Position behind the latest earlier occurrence of the newest n-gram, or None."""
    ngram = tokens[len(tokens) - length :]
    ends = [e for e in range(length, len(tokens)) if tokens[e - length : e] == ngram]
    return max(ends, default=None)


@given(st.lists(st.integers(0, 3), max_size=200), st.integers(1, 4), st.randoms(use_true_random=False))
def test_drafts_are_those_of_a_search_in_all_tokens(tokens, length, rng):
    """Read in pieces of any length; small tables lose n-grams, but these have slots enough."""
    proposer, end = NgramProposer(length, length), 0
    while end < len(tokens):
        end = min(len(tokens), end + rng.choice([1, 2, 30, BULK_TOKENS, 100]))
        proposer.read(tokens, end)
    found = proposer.propose(tokens, 1)
    place = last_occurrence(tokens, length) if len(tokens) >= length else None
    if place is None:
        assert found == []
    elif found:
        behind = [tokens[e] for e in range(length, len(tokens)) if tokens[e - length : e] == tokens[-length:]]
        assert found[0] in behind


@pytest.mark.parametrize(("longest", "shortest"), [(4, 4), (5, 2)])
def test_the_index_takes_32_bytes_a_token_and_keeps_most_ngrams(longest, shortest):
    rng = random.Random(0)
    tokens = [rng.randrange(50_000) for _ in range(70_000)]
    proposer = NgramProposer(longest, shortest)
    proposer.read(tokens, len(tokens))
    assert proposer.num_bytes <= 32 * len(tokens)
    found = 0
    following = tokens + tokens[1000 : 1000 + 200]
    for i in range(len(tokens) + longest, len(following)):
        found += proposer.propose(following[:i], 1) == [following[i]]
    assert found > 150


def test_the_index_grows_with_its_tokens():
    rng = random.Random(1)
    tokens = [rng.randrange(1000) for _ in range(5000)]
    proposer = NgramProposer(4, 4)
    for end in range(1, 5001, 7):
        proposer.read(tokens, end)
    assert proposer.propose([*tokens, *tokens[2000:2030]], 3) == tokens[2030:2033]
