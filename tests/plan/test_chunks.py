"""Chunked attention is full and causal segments of runs that are cut where chunks end, in any spread."""

import itertools

import pytest

from longspan.kv.layout import KVSpec
from longspan.plan.segments import cut_runs, make_segments
from longspan.plan.types import Literals, QueryRun
from longspan.sharding.pages import PageTable
from longspan.sharding.visibility import Visibility

SIZE = 4


def spec(*, window=None, chunk=None):
    return KVSpec.uniform(1, 8, 8, "float32", window, chunk)


def sees(kind, query, key):
    if key > query:
        return False
    if kind.chunk is not None:
        return key // kind.chunk == query // kind.chunk
    return kind.window is None or key > query - kind.window


KINDS = [spec(), *(spec(window=n) for n in (1, 3, 8)), *(spec(chunk=n) for n in (1, 3, 8))]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.window}-{kind.chunk}")
def test_a_spec_counts_what_its_queries_see(kind):
    for query in range(30):
        seen = [key for key in range(40) if sees(kind, query, key)]
        assert kind.first_key(query) == seen[0]
        assert kind.reach is None or len(seen) <= kind.reach
    for start, end in itertools.combinations_with_replacement(range(0, 30), 2):
        expected = sum(sees(kind, query, key) for query in range(start, end) for key in range(end))
        assert kind.num_pairs(start, end) == expected


def test_rejects_chunks_beside_a_window():
    with pytest.raises(ValueError, match="chunk: got 8 with a window of 4"):
        spec(window=4, chunk=8)


def test_runs_are_cut_where_chunks_end():
    run = QueryRun(7, 2, 8, 1, Literals(tuple(range(8))))
    assert [(r.position, r.end) for r in cut_runs([run], 4)] == [(2, 4), (4, 8), (8, 10)]
    assert all((r.request_id, r.compute_rank, r.tokens) == (7, 1, run.tokens) for r in cut_runs([run], 4))
    assert [(r.position, r.end) for r in cut_runs([run], 1)] == [(i, i + 1) for i in range(2, 10)]
    for chunk in (None, 10, 16):
        assert cut_runs([run], chunk) == [run]


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 16, 100])
@pytest.mark.parametrize("start", [0, 5, 13])
def test_segments_of_chunks_hold_every_visible_pair_once(chunk, start):
    end = 43
    table = PageTable(SIZE)
    for page in range(-(-end // SIZE)):
        table.append((0, 1, 1, 0, 2)[page % 5], page, 1)
    runs = [QueryRun(0, a, b - a, rank, Literals(())) for rank, a, b in table.owners(start, end)]
    segments = make_segments(runs, {0: table}, None, chunk)
    pairs = []
    for s in segments:
        assert s.visibility in (Visibility.FULL, Visibility.CAUSAL)
        for query in range(s.query_start, s.query_end):
            for key in range(s.key_start, s.key_end):
                if table.page(key // SIZE)[0] == s.key_rank and (s.visibility is Visibility.FULL or key <= query):
                    pairs.append((query, key))
    kind = spec(chunk=chunk)
    expected = [(query, key) for query in range(start, end) for key in range(end) if sees(kind, query, key)]
    assert sorted(pairs) == expected
