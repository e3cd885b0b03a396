"""Proves the visibility rule by brute force: over all small ranges and windows, every claim holds for every pair.

`visibility` is the cheapest exact word for a rectangle of queries and keys; `visible_keys` is the tight hull;
`split_visible_keys` covers every visible pair exactly once and is FULL wherever it can be.
"""

from itertools import pairwise

import pytest

from longspan.sharding.visibility import Visibility, split_visible_keys, visibility, visible_keys

WINDOWS = [None, 1, 2, 3, 4, 5, 8, 20]
RANGES = [(start, end) for start in range(9) for end in range(start, 10)]
windows = pytest.mark.parametrize("window", WINDOWS)


def sees(query: int, key: int, window: int | None) -> bool:
    return key <= query and (window is None or key > query - window)


def seen_pairs(queries: range, keys: range, window: int | None) -> set[tuple[int, int]]:
    return {(t, s) for t in queries for s in keys if sees(t, s, window)}


@windows
def test_visibility_is_none_or_full_exactly_when_no_or_every_query_sees_every_key(window):
    for query_start, query_end in RANGES:
        queries = range(query_start, query_end)
        for key_start, key_end in RANGES:
            keys = range(key_start, key_end)
            seen = seen_pairs(queries, keys, window)
            got = visibility(query_start, query_end, key_start, key_end, window)
            where = (query_start, query_end, key_start, key_end)
            assert (got is Visibility.NONE) == (not seen), where
            if seen:
                assert (got is Visibility.FULL) == (len(seen) == len(queries) * len(keys)), where


@windows
def test_causal_means_that_the_window_hides_nothing_and_band_that_it_does(window):
    for query_start, query_end in RANGES:
        queries = range(query_start, query_end)
        for key_start, key_end in RANGES:
            keys = range(key_start, key_end)
            got = visibility(query_start, query_end, key_start, key_end, window)
            hidden_by_window = seen_pairs(queries, keys, None) - seen_pairs(queries, keys, window)
            if got in (Visibility.CAUSAL, Visibility.BAND):
                assert (got is Visibility.BAND) == bool(hidden_by_window), (query_start, query_end, key_start, key_end)


@windows
def test_visible_keys_is_the_smallest_range_that_holds_what_some_query_sees(window):
    for query_start, query_end in RANGES:
        seen = {s for _, s in seen_pairs(range(query_start, query_end), range(12), window)}
        start, end = visible_keys(query_start, query_end, window)
        assert set(range(start, end)) == seen, (query_start, query_end)  # no gaps: adjacent queries' keys overlap


@windows
def test_split_covers_every_visible_key_once_in_order_with_the_right_word(window):
    for query_start, query_end in RANGES:
        parts = split_visible_keys(query_start, query_end, window)
        assert all(start < end for start, end, _ in parts)
        assert all(a[1] == b[0] for a, b in pairwise(parts)), "parts leave a gap, overlap or go backwards"
        covered = {s for start, end, _ in parts for s in range(start, end)}
        assert covered == set(range(*visible_keys(query_start, query_end, window)))
        for start, end, word in parts:
            assert word is visibility(query_start, query_end, start, end, window)
            assert word is not Visibility.NONE


@windows
def test_split_is_full_for_every_key_that_all_queries_see_but_the_first_querys_own(window):
    """The first query's own key is in nobody's future, but stays with the causal part to keep that part square."""
    for query_start, query_end in RANGES:
        queries = range(query_start, query_end)
        if not queries:
            continue
        for start, end, word in split_visible_keys(query_start, query_end, window):
            for key in range(start, end):
                by_all = all(sees(t, key, window) for t in queries)
                squares_the_causal_part = key == query_start and len(queries) > 1
                assert (word is Visibility.FULL) == (by_all and not squares_the_causal_part), (queries, key)


@windows
def test_a_lone_query_needs_nothing_but_full(window):
    for position in range(30):
        assert [word for *_, word in split_visible_keys(position, position + 1, window)] == [Visibility.FULL]


def test_the_examples_of_the_docstrings_hold():
    assert split_visible_keys(4, 6, 3) == [
        (2, 3, Visibility.BAND),
        (3, 4, Visibility.FULL),
        (4, 6, Visibility.CAUSAL),
    ]
    assert split_visible_keys(4, 7, None) == [(0, 4, Visibility.FULL), (4, 7, Visibility.CAUSAL)]
    assert visible_keys(4, 7, 3) == (2, 7)


def test_no_queries_see_no_keys():
    assert visible_keys(5, 5, None) == (5, 5)
    assert split_visible_keys(5, 5, None) == []
    assert visibility(5, 5, 0, 3, None) is Visibility.NONE
    assert visibility(5, 6, 3, 3, None) is Visibility.NONE
