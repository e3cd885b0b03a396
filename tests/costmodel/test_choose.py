"""Proves what the policy chooses, as a table of cases, and that the bytes it reckons with are the bytes that move.

Choices are pure functions of numbers; the last tests run the chosen exchanges on thread ranks and count.
"""

import random

import numpy as np
import pytest
from cp_cases import Cluster, StepCase, attention_time, make_group, random_chunk, random_cluster
from cp_ranks import Ranks, random_groups

from longspan.costmodel.choose import exchange_bytes, plan_group
from longspan.costmodel.parameters import Costs, KernelRates, Link, Topology
from longspan.kv.layout import KVGroup
from longspan.plan.exchanges import DirectExchange, RingExchange
from longspan.plan.group_step import BLOCK_LEN
from longspan.plan.step_keys import step_keys
from longspan.plan.types import GroupStep
from longspan.types import Strategy

LOCAL, GATHER_KV, PASS_KV, PASS_Q = Strategy.LOCAL, Strategy.GATHER_KV, Strategy.PASS_KV, Strategy.PASS_Q


def group_of(query_heads: int, kv_heads: int, dtype: str = "bfloat16", window: int | None = None) -> KVGroup:
    return make_group(
        [0], query_heads=query_heads, kv_heads=kv_heads, k_width=128, v_width=128, dtype=dtype, window=window
    )


def planned(group: KVGroup, num_ranks: int, context: int, chunk: int, **options) -> GroupStep:
    """The step that computes `chunk` tokens behind `context` cached ones, pages of 64 tokens striped over the ranks."""
    cluster = Cluster(
        random.Random(0), num_ranks, 64, [group.spec.window], 1, pages_per_rank=4096, owner_style="striped"
    )
    if context:
        cluster.step({0: context})
        cluster.slide()
    return plan_group(cluster.step({0: chunk}), cluster.tables[0], group, **options)


@pytest.mark.parametrize(
    ("heads", "num_ranks", "context", "chunk", "window", "expected"),
    [
        # everything on one rank
        ((32, 8), 1, 10_000, 512, None, LOCAL),
        ((32, 8), 4, 0, 64, None, LOCAL),
        # a long new prompt: keys move; at once while they are few, round the ring when they are many
        ((32, 8), 2, 0, 4096, None, GATHER_KV),
        ((32, 8), 8, 0, 4096, None, GATHER_KV),
        ((32, 8), 4, 0, 16384, None, PASS_KV),
        ((32, 8), 8, 0, 65536, None, PASS_KV),
        ((32, 8), 4, 16384, 16384, None, PASS_KV),
        # a chunk small against its cached prefix: queries move
        ((32, 8), 4, 65536, 4096, None, PASS_Q),
        ((32, 8), 8, 100_000, 512, None, PASS_Q),
        # decode
        ((32, 8), 2, 1000, 1, None, PASS_Q),
        ((32, 8), 8, 100_000, 1, None, PASS_Q),
        ((8, 1), 5, 777, 1, None, PASS_Q),
        # multi-head attention: a query is no bigger than half a key and value
        ((8, 8), 4, 30_000, 16384, None, PASS_Q),
        # multi-query attention: keys are small, so they move for longer
        ((64, 1), 4, 200_000, 16384, None, PASS_KV),
        # sliding windows: only the rows in the window move
        ((32, 8), 4, 65536, 4096, 512, GATHER_KV),
        ((32, 8), 8, 65536, 4096, 1024, GATHER_KV),
    ],
)
def test_the_policy_chooses(heads, num_ranks, context, chunk, window, expected):
    step = planned(group_of(*heads, window=window), num_ranks, context, chunk)
    assert step.strategy is expected
    assert bool(step.participants) == (expected is not LOCAL)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_pass_q_takes_over_from_pass_kv_at_four_chunks_of_context(num_ranks, dtype):
    """For 32 query and 8 KV heads, the chunk counted as context: 4.03 in bfloat16, 4.02 in float32."""
    chunk, block_len = 2048, 8  # with such blocks a gather is out of the question
    group = group_of(32, 8, dtype)
    choices = [
        (context, planned(group, num_ranks, context, chunk, block_len=block_len).strategy)
        for context in range(chunk, 6 * chunk, 256)
    ]
    last_ring = max(context for context, strategy in choices if strategy is PASS_KV)
    first_queries = min(context for context, strategy in choices if strategy is PASS_Q)
    assert last_ring < first_queries
    assert 3.8 <= (last_ring + chunk) / chunk <= (first_queries + chunk) / chunk <= 4.3


def test_a_gather_is_chosen_only_while_a_rank_gathers_no_more_than_two_blocks():
    group = group_of(32, 8)
    for block_len in (64, 256, 1024):
        for num_blocks in range(1, 9):
            step = planned(group, 2, 0, num_blocks * block_len, block_len=block_len)
            if step.strategy is LOCAL:
                continue
            gathered = planned(group, 2, 0, num_blocks * block_len, block_len=block_len, forced=GATHER_KV)
            assert (step.strategy is GATHER_KV) == (max(gathered.num_received) <= 2 * block_len)
    assert BLOCK_LEN == 2048


@pytest.mark.parametrize("forced", [GATHER_KV, PASS_KV, PASS_Q])
@pytest.mark.parametrize(("context", "chunk"), [(0, 16384), (65536, 64), (1000, 1)])
def test_a_forced_strategy_wins_wherever_something_is_remote(forced, context, chunk):
    assert planned(group_of(32, 8), 4, context, chunk, forced=forced).strategy is forced
    assert planned(group_of(32, 8), 1, context, chunk, forced=forced).strategy is LOCAL


def test_the_choice_is_predicted_to_take_the_least_time_of_the_forced_ones():
    for seed in range(40):
        rng = random.Random(seed)
        cluster = random_cluster(rng)
        groups = random_groups(rng, cluster)
        cluster.step(random_chunk(rng, cluster))
        runs = cluster.step(random_chunk(rng, cluster))
        link = Link(rng.choice([0, 1e-6, 1e-4]), rng.choice([1e6, 1e8]))
        rates = KernelRates(1e9, 1e9, 1e9, ((1, 1e8), (8, 5e8)), rng.choice([0, 1e-6]), merge_s=rng.choice([0, 1e-6]))
        costs = Costs(Topology((0,) * cluster.num_ranks, link, link), rates)
        for tables, group in zip(cluster.tables, groups, strict=True):
            chosen = plan_group(runs, tables, group, costs=costs)
            keys = step_keys(runs, tables, group.spec)
            forced = [StepCase(s, keys, BLOCK_LEN) for s in (GATHER_KV, PASS_KV, PASS_Q)]
            times = [attention_time(step, group, costs) for step in forced]
            if chosen.strategy is not LOCAL:
                assert chosen.strategy is forced[times.index(min(times))].strategy, "of equals, the first"
            assert (chosen.strategy is LOCAL) == (not keys.participants)


def test_the_same_numbers_give_the_same_choice():
    assert planned(group_of(32, 8), 4, 5000, 3000) == planned(group_of(32, 8), 4, 5000, 3000)


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("strategy", [GATHER_KV, PASS_KV, PASS_Q])
def test_the_reckoned_bytes_are_those_that_the_ranks_send(strategy, dtype):
    for seed in range(25):
        rng = random.Random(f"bytes {strategy} {seed}")
        cluster = random_cluster(rng)
        groups = random_groups(rng, cluster, dtype)
        ranks = Ranks(cluster, groups)
        for _ in range(2):
            step = ranks.run(cluster.step(random_chunk(rng, cluster)), strategy, block_len=rng.choice([2, 7]))
            for layer, (group, done, moved) in enumerate(zip(groups, step.plan.groups, step.exchanges, strict=True)):
                traffic = [t for t in step.traffic if t.layer == layer]
                partials = max(t.partial_bytes for t in traffic)
                others = max(t.bytes_sent - t.partial_bytes for t in traffic)
                assert [exchange_bytes(exchange, group) for exchange in moved] == {
                    LOCAL: [],
                    GATHER_KV: [others],
                    PASS_KV: [others],
                    PASS_Q: [others, partials],
                }[done.strategy]
            cluster.slide()


def test_bytes_of_known_exchanges():
    group = make_group([0], query_heads=3, kv_heads=2, k_width=5, v_width=7, dtype="bfloat16")
    row = 2 * (5 + 7) * 2
    gather = DirectExchange("kv", (0, 1, 2), np.array([[0, 4, 1], [2, 0, 0], [0, 0, 0]]))
    assert exchange_bytes(gather, group) == 5 * row
    assert exchange_bytes(DirectExchange("query", (0, 1), np.array([[0, 4], [2, 0]])), group) == 4 * 3 * 5 * 2
    # 3 rows: 126 bytes of out, and 36 of lse
    assert exchange_bytes(DirectExchange("partial", (0, 1), np.array([[0, 3], [1, 0]])), group) == 126 + 36
    # a rank forwards every block but those of its successor
    assert exchange_bytes(RingExchange((0, 1, 2), (5, 6, 2), 4), group) == (13 - 2) * row
