"""A step's rows are cut by owner, and every query meets every key that it may see exactly once."""

import numpy as np
import pytest

from longspan.integrations.vllm.runner.rows import Scheduled, cut_runs, rows_of_rank
from longspan.sharding.pages import PageTable

PAGE = 4


def table_of(ranks):
    """A page table whose page i lies on `ranks[i]`, in the next slot there."""
    table, used = PageTable(PAGE), {}
    for rank in ranks:
        table.append(rank, used.setdefault(rank, 0), 1)
        used[rank] += 1
    return table


def scheduled(ranks, start, num_tokens, row=0, is_prefilling=True):
    return Scheduled(table_of(ranks), row, start, num_tokens, is_prefilling)


def test_the_example_of_the_note():
    step = [scheduled([0, 1, 0, 1], 8, 6, row=5)]
    runs = cut_runs(step, 2)
    first, second = (rows_of_rank(rank, step, runs) for rank in range(2))
    assert first.slots.tolist() == [4, 5, 6, 7]  # the second page of rank 0
    assert second.slots.tolist() == [4, 5]
    assert (first.own.key_lens.tolist(), first.own.query_starts.tolist()) == ([8], [0, 4])
    assert (second.own.key_lens.tolist(), second.own.query_starts.tolist()) == ([6], [0, 2])
    assert first.num_travelling == second.num_travelling == 4
    # Rank 1's two rows are padded to four; a rank's own rows see nothing in the remote call.
    assert first.remote.query_starts.tolist() == second.remote.query_starts.tolist() == [0, 4, 6, 8]
    assert first.remote.key_lens.tolist() == [0, 8, 0]
    assert second.remote.key_lens.tolist() == [4, 0, 0]
    assert first.own.table_rows.tolist() == [5]
    assert first.remote.empty_queries.tolist() == [True] * 4 + [False] * 2 + [True] * 2


def test_nothing_travels_where_all_keys_are_the_owners():
    step = [scheduled([0, 0], 5, 1, is_prefilling=False), scheduled([1, 1, 1], 0, 9)]
    for rank in range(2):
        rows = rows_of_rank(rank, step, cut_runs(step, 2))
        assert rows.num_travelling == 0
        assert len(rows.travelling) == 0
        assert rows.remote.num_queries == 0


def test_a_rank_without_rows_takes_part():
    step = [scheduled([0, 1], 5, 1, is_prefilling=False)]
    rows = rows_of_rank(0, step, cut_runs(step, 2))
    assert len(rows.slots) == rows.own.num_queries == rows.own.max_query_len == rows.own.max_key_len == 0
    assert rows.num_travelling == 1
    assert rows.remote.key_lens.tolist() == [0, 4]  # its own padding, and the row of rank 1


def test_padding_of_decodes_is_of_single_rows():
    step = [scheduled([1, 0], 5, 1, row, is_prefilling=False) for row in range(3)]
    rows = rows_of_rank(0, step, cut_runs(step, 2))
    assert rows.remote.query_starts.tolist() == [0, 1, 2, 3, 4, 5, 6]  # three rows of rank 0, three of padding
    assert rows.remote.max_query_len == 1


def test_rows_of_decodes_come_before_those_of_prefills():
    step = [scheduled([0], 0, 3), scheduled([0], 2, 1, is_prefilling=False), scheduled([0], 1, 2)]
    (runs,) = cut_runs(step, 1)
    assert [run.request for run in runs] == [1, 0, 2]


def test_only_rows_that_see_other_ranks_travel():
    step = [scheduled([0, 0], 4, 2), scheduled([1, 0], 4, 2), scheduled([0, 1, 0], 2, 8)]
    rows = rows_of_rank(0, step, cut_runs(step, 2))
    # Rows of rank 0: two of the first request, two of the second, positions 2, 3, 8 and 9 of the third.
    assert rows.travelling.tolist() == [2, 3, 6, 7]
    assert rows.num_travelling == 4


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_every_query_meets_every_key_once(num_ranks):
    """Both calls of all ranks together show each query the keys of its request up to itself."""
    rng = np.random.default_rng(num_ranks)
    for _ in range(60):
        step = []
        for row in range(rng.integers(1, 5)):
            start, num_tokens = int(rng.integers(0, 20)), int(rng.integers(1, 14))
            num_pages = -(-(start + num_tokens) // PAGE)
            step.append(scheduled(rng.integers(0, num_ranks, num_pages).tolist(), start, num_tokens, row))
        runs = cut_runs(step, num_ranks)
        seen = {}  # (request, position of the query) to positions of keys
        for rank in range(num_ranks):
            rows = rows_of_rank(rank, step, runs)
            local = [positions_on(one.table, rank) for one in step]
            own_queries = [(s.request, p) for s in runs[rank] for p in range(s.start, s.end)]
            assert len(own_queries) == rows.own.num_queries == len(rows.slots)
            for i, query in call_queries(rows.own, own_queries):
                num_keys = rows.own.key_lens[i] - (rows.own.query_starts[i + 1] - 1 - own_queries.index(query))
                seen.setdefault(query, []).extend(local[query[0]][:num_keys])
            for i, query in call_queries(rows.remote, travelling_queries(step, runs)):
                if query is not None:
                    seen.setdefault(query, []).extend(local[query[0]][: rows.remote.key_lens[i]])
        expected = {(r, p): list(range(p + 1)) for r, one in enumerate(step) for p in range(one.start, one.end)}
        assert {query: sorted(keys) for query, keys in seen.items()} == expected


def positions_on(table, rank):
    """Positions of a rank's keys, in the order of its block table."""
    return [p for p in range(table.num_pages * PAGE) if table.page(p // PAGE)[0] == rank]


def call_queries(call, queries):
    """(run, query) of a call."""
    for i in range(len(call.key_lens)):
        for row in range(call.query_starts[i], call.query_starts[i + 1]):
            yield i, queries[row]


def travelling_queries(step, runs):
    """Queries of the remote call, the same on every rank; None is padding."""
    found = []
    for rank in range(len(runs)):
        rows = rows_of_rank(rank, step, runs)
        own = [(s.request, p) for s in runs[rank] for p in range(s.start, s.end)]
        mine = [own[row] for row in rows.travelling]
        found += mine + [None] * (rows.num_travelling - len(mine))
    return found
