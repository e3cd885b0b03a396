"""Proves by brute force that segments cover every visible (query, key) pair exactly once, on the right ranks.

And that what the exchanges announce is what the segments need: row counts, participants, moved queries and keys.
"""

import random
from collections import Counter
from itertools import pairwise

import pytest
from cp_cases import RANK_COUNTS, Cluster, random_chunk, random_cluster

from longspan.kv.layout import KVSpec
from longspan.plan.exchanges import DirectExchange, Exchange, RingExchange, count_exchanges
from longspan.plan.group_step import make_group_step
from longspan.plan.query_units import find_meetings, query_units, rank_units
from longspan.plan.segments import count_keys, keys_of_others, make_segments, moved_keys
from longspan.plan.step_keys import StepKeys, is_local, step_keys
from longspan.plan.types import GroupStep, Literals, QueryRun, Segment
from longspan.sharding.pages import PageTable
from longspan.sharding.visibility import Visibility
from longspan.types import Strategy

Pair = tuple[int, int, int, int, int]
"""(request, query position, query rank, key position, key rank)"""
NUM_CASES = 60


def owner_of(table: PageTable) -> dict[int, int]:
    """Position to rank of every stored token."""
    size = table.page_size
    return {
        position: run.rank
        for run in table.runs
        for position in range(run.page_idx * size, (run.page_idx + run.num_pages) * size)
    }


def expected_pairs(query_runs: list[QueryRun], tables: dict[int, PageTable], window: int | None) -> Counter[Pair]:
    pairs: Counter[Pair] = Counter()
    for run in query_runs:
        owners = owner_of(tables[run.request_id])
        for t in range(run.position, run.end):
            for s in range(0 if window is None else max(0, t - window + 1), t + 1):
                pairs[run.request_id, t, run.compute_rank, s, owners[s]] += 1
    return pairs


def pairs_of(segments: tuple[Segment, ...], tables: dict[int, PageTable], window: int | None) -> Counter[Pair]:
    pairs: Counter[Pair] = Counter()
    for seg in segments:
        owners = owner_of(tables[seg.request_id])
        for t in range(seg.query_start, seg.query_end):
            for s in range(seg.key_start, seg.key_end):
                in_window = seg.visibility is not Visibility.BAND or (window is not None and s > t - window)
                seen = seg.visibility is Visibility.FULL or (s <= t and in_window)
                if owners.get(s) == seg.key_rank and seen:
                    pairs[seg.request_id, t, seg.query_rank, s, seg.key_rank] += 1
    return pairs


def spec_of(window: int | None) -> KVSpec:
    return KVSpec.uniform(1, 1, 1, "float32", window)


def exchanges_of(strategy: Strategy, keys: StepKeys) -> tuple[Exchange, ...]:
    return count_exchanges(strategy, keys, 4, (keys.participants,))


def random_steps(num_ranks: int):
    """(query runs, tables, window) of many steps, for each KV group."""
    for seed in range(NUM_CASES):
        rng = random.Random(f"{num_ranks} {seed}")
        cluster = random_cluster(rng, num_ranks=num_ranks)
        for _ in range(3):
            query_runs = cluster.step(random_chunk(rng, cluster))
            for tables, window in zip(cluster.tables, cluster.windows, strict=True):
                yield query_runs, tables, window
            cluster.slide()


@pytest.mark.parametrize("num_ranks", RANK_COUNTS)
def test_segments_cover_every_visible_pair_once_where_query_and_key_lie(num_ranks):
    for query_runs, tables, window in random_steps(num_ranks):
        segments = make_segments(query_runs, tables, window)
        assert pairs_of(segments, tables, window) == expected_pairs(query_runs, tables, window)
        assert all(seg.visibility is not Visibility.NONE for seg in segments)


@pytest.mark.parametrize("num_ranks", RANK_COUNTS)
def test_a_rank_makes_the_segments_that_concern_it_and_no_others(num_ranks):
    for query_runs, tables, window in random_steps(num_ranks):
        segments = make_segments(query_runs, tables, window)
        for rank in range(num_ranks):
            own = tuple(s for s in segments if rank in (s.query_rank, s.key_rank))
            assert make_segments(query_runs, tables, window, rank=rank) == own


@pytest.mark.parametrize("num_ranks", RANK_COUNTS)
def test_a_rank_derives_its_part_of_the_units_of_all_ranks(num_ranks):
    for query_runs, tables, window in random_steps(num_ranks):
        keys, everyone = step_keys(query_runs, tables, spec_of(window)), range(num_ranks)
        meets = find_meetings(query_runs, tables, spec_of(window), everyone, everyone)
        for strategy, nodes in ((Strategy.PASS_Q, None), (Strategy.TREE, [rank // 2 for rank in everyone])):
            step = make_group_step(strategy, keys, 12, nodes)
            units = query_units(meets, step.nodes, step.block_len, step.num_blocks)
            assert [unit.number for unit in units] == sorted({unit.number for unit in units})
            for rank in everyone:
                expected = []
                for unit in units:
                    mine = [{p: r for p, r in m.items() if rank in p} for m in (unit.queries, unit.relayed)]
                    expected += [(unit.number, unit.has_relays, *mine)] if any(mine) else []
                own = make_segments(query_runs, tables, window, rank=rank)
                found = rank_units(rank, own, query_runs, tables, spec_of(window), step)
                assert [tuple(unit) for unit in found] == expected


@pytest.mark.parametrize("num_ranks", RANK_COUNTS)
def test_every_remote_pair_is_among_the_moved_keys(num_ranks):
    for query_runs, tables, window in random_steps(num_ranks):
        segments = make_segments(query_runs, tables, window)
        for request_id, _, query_rank, s, key_rank in expected_pairs(query_runs, tables, window):
            if query_rank == key_rank:
                continue
            for destination in (query_rank, None):
                ranges = moved_keys(segments, key_rank, destination)
                assert sum((r, start <= s < end) == (request_id, True) for r, start, end in ranges) == 1
                one = [(start, end) for r, start, end in ranges if r == request_id]
                assert all(a[1] < b[0] for a, b in pairwise(one)), "ascending, with gaps: what touches is one range"


def test_keys_in_the_gaps_between_windows_stay():
    table = PageTable(4)
    for rank in (0, 1, 1, 0, 0, 1, 1, 0):
        table.append(rank, table.num_pages, 1)
    runs = [QueryRun(7, start, 4, 0, Literals((0,) * 4)) for start in (0, 12, 16, 28)]
    segments = make_segments(runs, {7: table}, 3)
    ranges = moved_keys(segments, 1, 0)
    assert ranges == [(7, 10, 16), (7, 26, 32)]
    assert count_keys({7: table}, 1, ranges) == 4  # 10, 11, 26, 27; rank 1 also stores 4..9 and 20..25


@pytest.mark.parametrize("num_ranks", RANK_COUNTS)
def test_exchanges_announce_the_rows_that_the_segments_need(num_ranks):
    for query_runs, tables, window in random_steps(num_ranks):
        segments = make_segments(query_runs, tables, window)
        remote = {pair for pair in expected_pairs(query_runs, tables, window) if pair[2] != pair[4]}
        ranks = tuple(sorted({rank for _, _, a, _, b in remote for rank in (a, b)}))
        keys = step_keys(query_runs, tables, spec_of(window))
        assert keys.participants == ranks
        assert is_local(query_runs, tables, spec_of(window)) == (not ranks)
        if not ranks:
            assert all(make_group_step(s, keys, 4) == GroupStep(Strategy.LOCAL) for s in Strategy)
            continue

        queries, partials = exchanges_of(Strategy.PASS_Q, keys)
        assert isinstance(queries, DirectExchange)
        assert isinstance(partials, DirectExchange)
        assert (queries.operand, partials.operand) == ("query", "partial")
        step = make_group_step(Strategy.PASS_Q, keys, 4)
        assert step.participants == ranks
        assert queries.ranks == partials.ranks == keys.ranks
        assert step.num_sent == tuple(queries.num_rows.sum(axis=1)[[keys.ranks.index(rank) for rank in ranks]])
        assert step.num_received == tuple(queries.num_rows.sum(axis=0)[[keys.ranks.index(rank) for rank in ranks]])
        for i, a in enumerate(keys.ranks):
            for j, b in enumerate(keys.ranks):
                # A query run travels whole, if any of its queries sees a key over there.
                rows = sum(
                    run.num_tokens
                    for run in query_runs
                    if run.compute_rank == a != b
                    and any(
                        (r, q, k) == (run.request_id, a, b) and run.position <= t < run.end for r, t, q, _, k in remote
                    )
                )
                assert queries.num_rows[i][j] == partials.num_rows[j][i] == rows

        (gather,) = exchanges_of(Strategy.GATHER_KV, keys)
        (ring,) = exchanges_of(Strategy.PASS_KV, keys)
        assert isinstance(gather, DirectExchange)
        assert isinstance(ring, RingExchange)
        assert gather.operand == "kv"
        assert ring.participants == ranks
        assert ring.block_len == 4
        assert make_group_step(Strategy.PASS_KV, keys, 4).num_sent == tuple(ring.num_rows)
        for i, a in enumerate(ranks):
            others = keys_of_others(query_runs, tables, spec_of(window), a)
            assert count_keys(tables, a, others) == ring.num_rows[i]
            seen = {(r, s) for r, _, _, s, k in remote if k == a}
            assert ring.num_rows[i] == count_keys(tables, a, moved_keys(segments, a)) >= len(seen)
            assert bool(ring.num_rows[i]) == bool(seen)
            for b in ranks:
                seen = {(r, s) for r, _, q, s, k in remote if (q, k) == (b, a)}
                rows = gather.num_rows[keys.ranks.index(a), keys.ranks.index(b)]
                assert rows == (count_keys(tables, a, moved_keys(segments, a, b)) if a != b else 0)
                assert rows >= len(seen)
                if window is None:
                    assert rows == len(seen), "nothing moves that is not seen"


def test_a_decode_step_moves_only_the_keys_in_the_window():
    cluster = Cluster(random.Random(0), num_ranks=2, page_size=4, windows=[5], num_requests=1, owner_style="striped")
    cluster.step({0: 20})
    cluster.slide()
    runs = cluster.step({0: 1})  # position 20 on rank 1 sees 16..20; page 4 (16..19) lies on rank 0
    (gather,) = exchanges_of(Strategy.GATHER_KV, step_keys(runs, cluster.tables[0], spec_of(5)))
    assert isinstance(gather, DirectExchange)
    assert gather.num_rows.tolist() == [[0, 4], [0, 0]]


def test_the_example_of_the_plan_types_holds():
    table = PageTable(4)
    for rank, slot, num_pages in [(0, 0, 1), (1, 0, 2), (0, 1, 1)]:
        table.append(rank, slot, num_pages)
    runs = [QueryRun(7, 8, 4, 1, Literals((0,) * 4)), QueryRun(7, 12, 4, 0, Literals((0,) * 4))]
    segments = make_segments(runs, {7: table}, None)
    assert segments == (
        Segment(7, 8, 12, 1, 0, 0, 8, Visibility.FULL),
        Segment(7, 8, 12, 1, 1, 0, 8, Visibility.FULL),
        Segment(7, 8, 12, 1, 1, 8, 12, Visibility.CAUSAL),
        Segment(7, 12, 16, 0, 0, 0, 12, Visibility.FULL),
        Segment(7, 12, 16, 0, 1, 0, 12, Visibility.FULL),
        Segment(7, 12, 16, 0, 0, 12, 16, Visibility.CAUSAL),
    )
    keys = step_keys(runs, {7: table}, spec_of(None))
    queries, partials = exchanges_of(Strategy.PASS_Q, keys)
    assert queries.num_rows.tolist() == partials.num_rows.tolist() == [[0, 4], [4, 0]]
    (ring,) = exchanges_of(Strategy.PASS_KV, keys)
    assert (ring.participants, ring.num_rows) == ((0, 1), [4, 8])
    step = make_group_step(Strategy.PASS_Q, keys, 16)
    assert (step.nodes, step.num_sent, step.num_received) == (((0,), (1,)), (4, 4), (4, 4))
    assert (step.block_len, step.num_blocks, step.num_ahead) == (4, 1, 2)


def test_rejects_a_local_strategy_for_remote_keys():
    table = PageTable(1)
    table.append(0, 0, 1)
    table.append(1, 0, 1)
    keys = step_keys([QueryRun(0, 1, 1, 1, Literals((0,)))], {0: table}, spec_of(None))
    with pytest.raises(AssertionError, match="local cannot serve"):
        make_group_step(Strategy.LOCAL, keys, 4)
