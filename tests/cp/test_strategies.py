"""Proves that distributed attention is exact: every strategy on 1 to 8 ranks against dense attention in float64.

Random page tables (any owner per page, starts in mid-page, several requests, windows, empty ranks, all head ratios),
several chunks in a row, decode rows. Then that the proof can fail (mutations), that exchanges and bytes are what the
strategies document, and that the ring's memory depends on neither the number of ranks nor the context.
"""

import random
import threading
import weakref

import pytest
import torch
from cp_cases import NODE_COUNTS, RANK_COUNTS, Cluster, make_group, random_chunk, random_cluster, spread
from cp_ranks import Ranks, Step, random_groups
from msgspec import structs

import longspan.cp.base
import longspan.cp.eager
import longspan.cp.wire
from longspan.attention import latent
from longspan.attention.partial import PartialAttention
from longspan.comm.recording import RecordingCommunicator
from longspan.comm.threads import thread_group
from longspan.cp.base import KVBlock, RankStep
from longspan.cp.eager import EagerStepAttention
from longspan.kv.layout import KVGroup, KVLayout, KVSpec
from longspan.plan.build import count_tokens
from longspan.plan.exchanges import RingExchange
from longspan.plan.group_step import make_group_step
from longspan.plan.query_units import num_rows
from longspan.plan.step_keys import step_keys
from longspan.plan.types import GroupStep, Plan
from longspan.sharding.pages import PageRun, PageTable
from longspan.types import Phase, Strategy

LOCAL, GATHER_KV, PASS_KV, PASS_Q, TREE = (
    Strategy.LOCAL,
    Strategy.GATHER_KV,
    Strategy.PASS_KV,
    Strategy.PASS_Q,
    Strategy.TREE,
)
REMOTE = [GATHER_KV, PASS_KV, PASS_Q, TREE]
NUM_CASES = 11
"""Per rank count and strategy: 306 in all."""
rank_counts = pytest.mark.parametrize("num_ranks", RANK_COUNTS)
strategies = pytest.mark.parametrize("strategy", REMOTE, ids=[s.value for s in REMOTE])


def random_nodes(rng: random.Random, num_ranks: int) -> tuple[int, ...]:
    """Nodes of all shapes: equal ones, unequal ones, ranks of a node apart."""
    num_nodes = rng.choice(NODE_COUNTS)
    if rng.random() < 0.5:
        return spread(num_ranks, num_nodes)
    drawn = [rng.randrange(num_nodes) for _ in range(num_ranks)]
    return tuple(sorted(set(drawn)).index(node) for node in drawn)


def check_traffic(step: Step) -> None:
    """Exchanges per layer as documented; ranks that nothing concerns send nothing."""
    for i, (group, exchanges) in enumerate(zip(step.plan.groups, step.exchanges, strict=True)):
        for traffic in (t for t in step.traffic if t.layer == i):
            participants = group.participants
            if traffic.rank not in participants:
                assert traffic.bytes_sent == traffic.messages_sent == 0
                continue
            first, num_ranks = exchanges[0], len(participants)
            if isinstance(first, RingExchange):
                rounds = -(-max(first.num_rows) // first.block_len)
                assert traffic.num_exchanges == rounds * (num_ranks - 1)
            elif group.strategy is GATHER_KV:
                assert traffic.num_exchanges == 1
                assert traffic.messages_sent == (first.num_rows[first.ranks.index(traffic.rank)] > 0).sum()
            else:
                there = [[*unit.queries, *unit.relayed] for unit in step.units[i]]
                mine = [any(traffic.rank in pair for pair in pairs) for pairs in there]
                assert traffic.num_exchanges == sum(
                    (4 if unit.has_relays else 2) * is_mine for unit, is_mine in zip(step.units[i], mine, strict=True)
                ), "a rank takes part in its own units alone"
                there = [pair for pairs in there for pair in pairs]
                assert traffic.messages_sent == sum(traffic.rank in pair for pair in there), (
                    "queries out, partials back"
                )


@rank_counts
@strategies
def test_every_strategy_equals_dense_attention_in_float64(strategy, num_ranks):
    num_remote = num_rings_of_several_rounds = 0
    for seed in range(NUM_CASES):
        rng = random.Random(f"{strategy} {num_ranks} {seed}")
        cluster = random_cluster(rng, num_ranks=num_ranks)
        ranks = Ranks(
            cluster,
            random_groups(rng, cluster),
            softcap=rng.choice([None, None, 5.0]),
            with_sinks=rng.random() < 0.3,
            seed=seed,
        )
        nodes = random_nodes(rng, num_ranks)
        for _ in range(2):
            chunk = cluster.step(random_chunk(rng, cluster))
            step = ranks.run(chunk, strategy, block_len=rng.choice([1, 3, 5, 12, 20, 64]), nodes=nodes)
            ranks.check(step)
            check_traffic(step)
            num_remote += any(group.strategy is strategy for group in step.plan.groups)
            rings = [e for exchanges in step.exchanges for e in exchanges if isinstance(e, RingExchange)]
            num_rings_of_several_rounds += any(max(ring.num_rows) > ring.block_len for ring in rings)
            cluster.slide()
        decode = cluster.step(dict.fromkeys(cluster.computed, 1))
        step = ranks.run(decode, strategy, block_len=4, nodes=nodes)
        ranks.check(step)
        check_traffic(step)
    if num_ranks > 1:
        assert num_remote >= NUM_CASES * 2 // 3, "too few cases move anything"
        assert strategy is not PASS_KV or num_rings_of_several_rounds >= NUM_CASES // 3


@rank_counts
@strategies
def test_latents_are_attended_wherever_they_lie_and_travel_once(strategy, num_ranks, monkeypatch):
    """Absorbed where few queries see a key, expanded where many do; messages have the bytes that the layout says."""
    monkeypatch.setattr(latent, "MIN_EXPANDED_KEYS", 3)
    monkeypatch.setattr(latent, "EXPANDED_BYTES", 0)
    expand, num_expanded = latent.LatentWeights.expand, []
    monkeypatch.setattr(latent.LatentWeights, "expand", lambda *args: num_expanded.append(1) or expand(*args))
    for seed in range(5):
        rng = random.Random(f"latents {strategy} {num_ranks} {seed}")
        cluster = random_cluster(rng, num_ranks=num_ranks, windows=[None])
        spec = KVSpec.latents(4, rng.choice([1, 2]), 3, 2, "float64")
        assert 3 < spec.min_expanded_queries < 6
        group = KVGroup((0,), spec, rng.choice([1, 3, 4]))
        ranks = Ranks(cluster, [group], with_sinks=seed == 0, seed=seed)
        nodes = random_nodes(rng, num_ranks)
        for chunk in (random_chunk(rng, cluster), random_chunk(rng, cluster), dict.fromkeys(cluster.computed, 1)):
            step = ranks.run(cluster.step(chunk), strategy, block_len=rng.choice([3, 20]), nodes=nodes)
            ranks.check(step)
            check_traffic(step)
            exchanges = step.exchanges[0]
            if exchanges and strategy is GATHER_KV:
                rows = exchanges[0].num_rows.sum()
                assert sum(t.bytes_sent for t in step.traffic) == rows * spec.layout.k_width * 8
            cluster.slide()
    assert num_expanded


@rank_counts
@pytest.mark.parametrize("strategy", [None, *REMOTE], ids=["chosen", *(s.value for s in REMOTE)])
def test_the_cpu_backend_is_as_exact_as_eager_attention_in_float32(strategy, num_ranks):
    for seed in range(5):
        rng = random.Random(f"cpu {strategy} {num_ranks} {seed}")
        cluster = random_cluster(rng, num_ranks=num_ranks)
        ranks = Ranks(cluster, random_groups(rng, cluster, "float32"), backend="cpu", with_sinks=seed == 0, seed=seed)
        for _ in range(2):
            ranks.check(ranks.run(cluster.step(random_chunk(rng, cluster)), strategy, block_len=5))
            cluster.slide()
        ranks.check(ranks.run(cluster.step(dict.fromkeys(cluster.computed, 1)), strategy))


@strategies
def test_31_tokens_on_8_ranks_in_chunks_and_then_decoded(strategy):
    for page_size in (1, 4):
        cluster = Cluster(random.Random(0), 8, page_size, [None], 1, owner_style="striped")
        ranks = Ranks(cluster, [make_group([0], query_heads=8)])
        for count in (5, 1, 25, 1, 1):
            ranks.check(ranks.run(cluster.step({0: count}), strategy, block_len=2))
        assert cluster.computed == {0: 33}


@strategies
@pytest.mark.parametrize("window", [1, 3, 4, 5, 9])
def test_windows_below_a_page_and_across_ranks(strategy, window):
    cluster = Cluster(random.Random(window), 3, 4, [window], 2, owner_style="striped")
    ranks = Ranks(cluster, [make_group([0], window=window)])
    for counts in ({0: 13, 1: 1}, {0: 6, 1: 17}, {0: 1, 1: 1}, {0: 1, 1: 5}):
        ranks.check(ranks.run(cluster.step(counts), strategy, block_len=2))
        cluster.slide()


@strategies
def test_a_2_token_prefill_leaves_six_of_eight_ranks_without_work(strategy):
    cluster = Cluster(random.Random(0), 8, 1, [None], 1, owner_style="striped")
    ranks = Ranks(cluster, [make_group([0])])
    step = ranks.run(cluster.step({0: 2}), strategy)
    ranks.check(step)
    assert {t.rank for t in step.traffic if t.bytes_sent} <= {0, 1}
    assert len({t.rank for t in step.traffic}) == 8


@strategies
def test_ranks_without_tokens_serve_their_keys(strategy):
    """All cached keys lie on ranks 1 and 2, which only join; rank 0 computes."""
    cluster = Cluster(random.Random(0), 3, 4, [None], 1)
    cluster.owner = lambda request_id, page_idx: (1, 2, 1, 0)[page_idx]
    ranks = Ranks(cluster, [make_group([0], query_heads=4)])
    ranks.check(ranks.run(cluster.step({0: 12}), strategy))
    step = ranks.run(cluster.step({0: 3}), strategy)
    ranks.check(step)
    assert {run.compute_rank for run in step.plan.query_runs} == {0}
    assert step.plan.groups[0].participants == (0, 1, 2)


@rank_counts
def test_keys_travel_as_often_as_the_notes_of_their_strategies_say(num_ranks):
    """N requests on N ranks, 6 rows of each on every rank; request i decodes on rank i and sees them all."""
    n = num_ranks
    cluster = Cluster(random.Random(0), n, 6, [None], n)
    cluster.owner = lambda request_id, page_idx: page_idx if page_idx < n else request_id
    group = make_group([0], query_heads=4, dtype="float32")
    ranks = Ranks(cluster, [group])
    ranks.check(ranks.run(cluster.step(dict.fromkeys(range(n), 6 * n)), GATHER_KV))
    decode = cluster.step(dict.fromkeys(range(n), 1))
    for strategy, rows, exchanges in ((GATHER_KV, (n - 1) * 6, 1), (PASS_KV, (n - 1) * (n - 1) * 6, None)):
        step = ranks.run(decode, strategy, block_len=4)
        ranks.check(step)
        for traffic in step.traffic:
            assert traffic.bytes_sent == rows * group.spec.layout.token_bytes
            if n > 1:
                assert traffic.num_exchanges == (exchanges or (n - 1) * -(-(n - 1) * 6 // 4))


@pytest.mark.parametrize("num_nodes", NODE_COUNTS)
@rank_counts
def test_a_tree_sends_each_row_to_a_node_once(num_ranks, num_nodes):
    """Rows per rank and layer as the note of `longspan.cp.pass_q` has them, counted on the wire: 8 rows per rank that
    see keys everywhere, N ranks in M equal nodes of g."""
    if num_ranks % num_nodes:
        num_nodes = 1
    nodes, g = spread(num_ranks, num_nodes), num_ranks // num_nodes
    cluster = Cluster(random.Random(0), num_ranks, 8, [None], 1, owner_style="striped")
    group = make_group([0], query_heads=4, dtype="float32")
    ranks = Ranks(cluster, [group], max_len=400)
    ranks.check(ranks.run(cluster.step({0: 8 * num_ranks}), TREE, nodes=nodes))
    query_bytes, partial_bytes = 8 * 4 * 4 * 4, 8 * 4 * 4 * 4 + 8 * 4 * 4
    for strategy, rows in ((TREE, (g - 1) + (num_nodes - 1) * (g - 1) + (num_nodes - 1)), (PASS_Q, num_ranks - 1)):
        for block_len in (8, 2048):
            step = ranks.run(cluster.step({0: 8 * num_ranks}), strategy, nodes=nodes, block_len=block_len)
            ranks.check(step)
            check_traffic(step)
            for traffic in step.traffic:
                assert traffic.partial_bytes == rows * partial_bytes
                assert traffic.bytes_sent - traffic.partial_bytes == rows * query_bytes
        if num_ranks > 1:
            crossing = [
                pair
                for unit in step.units[0]
                for messages in (unit.queries, unit.relayed)
                for pair in messages
                if nodes[pair[0]] != nodes[pair[1]]
            ]
            per_rank = (num_nodes - 1) * (1 if strategy is TREE else g)
            assert len(crossing) == num_ranks * per_rank


@pytest.mark.cover
@pytest.mark.parametrize("strategy", [PASS_Q, TREE])
def test_the_memory_of_queries_under_way_does_not_grow_with_the_ranks(strategy):
    """Two units are ahead at most; each brings one block to a rank, but in a `tree` every mate relays one."""
    for num_ranks in (2, 4, 8):
        cluster = Cluster(random.Random(0), num_ranks, 4, [None], 1, owner_style="striped")
        ranks = Ranks(cluster, [make_group([0])], max_len=64 * num_ranks)
        ranks.run(cluster.step({0: 32 * num_ranks}), strategy)
        nodes = spread(num_ranks, 2)
        step = ranks.run(cluster.step({0: 32 * num_ranks}), strategy, block_len=32, nodes=nodes)
        ranks.check(step)
        group, units = step.plan.groups[0], step.units[0]
        mates = num_ranks // 2 if strategy is TREE else 1
        for unit in units:
            for rank in range(num_ranks):
                messages = [*unit.queries.items(), *unit.relayed.items()]
                assert sum(num_rows(runs) for (_, to), runs in messages if to == rank) <= 8 * mates
        assert group.num_ahead == max(1, 2 // mates)
        assert len(units) >= 4, "a chunk of 32 rows per rank goes in blocks of 8"


def test_nothing_moves_when_every_request_has_its_own_rank():
    for num_ranks in RANK_COUNTS:
        rng = random.Random(num_ranks)
        cluster = Cluster(rng, num_ranks, 2, [None], 3, owner_style="packed")
        ranks = Ranks(cluster, [make_group([0])])
        for _ in range(3):
            step = ranks.run(cluster.step(random_chunk(rng, cluster)), PASS_KV)
            ranks.check(step)
            assert step.plan.groups[0].strategy is LOCAL
            assert all(t.num_exchanges == 0 for t in step.traffic)


def test_layers_of_different_groups_may_use_different_strategies():
    """A full and a window group in one step, chosen by the policy, layers interleaved."""
    cluster = Cluster(random.Random(1), 4, 2, [None, 3], 1, owner_style="striped")
    groups = [make_group([0, 2], query_heads=8), make_group([1, 3], query_heads=8, window=3)]
    ranks = Ranks(cluster, groups)
    chosen = set()
    for count in (30, 17, 1):
        step = ranks.run(cluster.step({0: count}), block_len=4)
        ranks.check(step)
        chosen.add(tuple(group.strategy for group in step.plan.groups))
        cluster.slide()
    assert any(a is not b for a, b in chosen)


@strategies
def test_a_plan_that_says_other_numbers_of_rows_is_refused_by_the_ranks_that_move_them(strategy):
    """Every rank counts what it sends and receives; a count that is too low on one of them is noticed there."""
    cluster = Cluster(random.Random(0), 3, 4, [None], 1, owner_style="striped")
    ranks = Ranks(cluster, [make_group([0])])
    runs = cluster.step({0: 24})
    keys = step_keys(runs, cluster.tables[0], ranks.groups[0].spec)
    honest = make_group_step(strategy, keys, 4)
    for field_name in ("num_sent", "num_received"):
        counts = list(getattr(honest, field_name))
        if not counts:
            continue
        counts[1] -= 1
        step = structs.replace(honest, **{field_name: tuple(counts)})
        plan = Plan(0, Phase.PREFILL, (0, 1, 2), count_tokens(range(3), runs), tuple(runs), (), (step,), ())
        comm = RecordingCommunicator(thread_group(3, timeout_s=1.0)[1])
        with pytest.raises(AssertionError, match="plan and page tables disagree"):
            EagerStepAttention(plan, cluster.tables, ranks.pools[1], comm, ranks.backend, ranks.params)


# -- the proof can fail ----------------------------------------------------------------------------------------------


MUTABLE_NODES = (0, 1, 1)
"""`tree` passes queries on inside node 1."""


def mutable_case(strategy: Strategy) -> tuple[Cluster, Ranks]:
    """Two requests on three ranks, one chunk computed and checked."""
    cluster = Cluster(random.Random(5), 3, 4, [None], 2, owner_style="striped")
    ranks = Ranks(cluster, [make_group([0], query_heads=4, kv_heads=2)], with_sinks=True)
    ranks.check(ranks.run(cluster.step({0: 22, 1: 18}), strategy, block_len=5, nodes=MUTABLE_NODES))
    return cluster, ranks


def last_step_is_right(cluster: Cluster, ranks: Ranks, strategy: Strategy) -> bool:
    step = ranks.run(cluster.step({0: 7, 1: 9}), strategy, block_len=5, nodes=MUTABLE_NODES)
    try:
        ranks.check(step)
    except AssertionError:
        return False
    return True


def page_rows(cluster: Cluster, request_id: int, page_idx: int) -> tuple[int, slice]:
    """Rank and pool rows of a page."""
    for run in cluster.tables[0][request_id].runs:
        if run.page_idx <= page_idx < run.page_idx + run.num_pages:
            first = (run.slot + page_idx - run.page_idx) * cluster.page_size
            return run.rank, slice(first, first + cluster.page_size)
    raise AssertionError(f"no page {page_idx}")


@strategies
def test_without_a_mutation_the_case_is_right(strategy):
    assert last_step_is_right(*mutable_case(strategy), strategy)


@strategies
@pytest.mark.parametrize("page_idx", range(5))
def test_the_comparison_notices_a_dropped_page(strategy, page_idx):
    cluster, ranks = mutable_case(strategy)
    rank, rows = page_rows(cluster, 0, page_idx)
    ranks.pools[rank][0].k[0][:, rows] = 0
    ranks.pools[rank][0].v[0][:, rows] = 0
    assert not last_step_is_right(cluster, ranks, strategy)


@strategies
def test_the_comparison_notices_a_page_that_lies_on_another_rank_than_the_table_says(strategy):
    cluster, ranks = mutable_case(strategy)
    runs = list(cluster.tables[0][0].runs)
    (index,) = [i for i, run in enumerate(runs) if run.page_idx == 1]
    runs[index] = PageRun(1, (runs[index].rank + 1) % 3, 200, 1)
    cluster.tables[0][0] = PageTable(cluster.page_size)
    cluster.tables[0][0].apply(runs)
    for pools in ranks.pools:
        pools[0].k[0][:, 800:804] = pools[0].v[0][:, 800:804] = 0
    assert not last_step_is_right(cluster, ranks, strategy)


@strategies
def test_the_comparison_notices_two_swapped_pages(strategy):
    """Of two requests. Whole pages of one request that every query sees may be swapped: a softmax has no order."""
    cluster, ranks = mutable_case(strategy)
    (rank_a, a), (rank_b, b) = page_rows(cluster, 0, 1), page_rows(cluster, 1, 2)
    for of in ("k", "v"):
        pool_a, pool_b = (getattr(ranks.pools[rank][0], of)[0] for rank in (rank_a, rank_b))
        held = pool_a[:, a].clone()
        pool_a[:, a] = pool_b[:, b]
        pool_b[:, b] = held
    assert not last_step_is_right(cluster, ranks, strategy)


@strategies
def test_the_comparison_notices_keys_swapped_without_their_values(strategy):
    cluster, ranks = mutable_case(strategy)
    (rank_a, a), (rank_b, b) = page_rows(cluster, 0, 1), page_rows(cluster, 0, 2)
    pool_a, pool_b = ranks.pools[rank_a][0].k[0], ranks.pools[rank_b][0].k[0]
    held = pool_a[:, a].clone()
    pool_a[:, a] = pool_b[:, b]
    pool_b[:, b] = held
    assert not last_step_is_right(cluster, ranks, strategy)


@strategies
@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_comparison_notices_one_merge_that_ignores_lse(strategy, which, monkeypatch):
    cluster, ranks = mutable_case(strategy)
    calls, lock = [0], threading.Lock()
    modules = [m for m in (longspan.cp.base, longspan.cp.wire) if hasattr(m, "merge_rows_")]
    honest = longspan.cp.base.merge_rows_

    def merge(acc: PartialAttention, row: int, part: PartialAttention) -> None:
        with lock:
            mine, calls[0] = calls[0], calls[0] + 1
        if mine != which:
            return honest(acc, row, part)
        rows = slice(row, row + len(part.lse))
        acc.out[rows] = (acc.out[rows] + part.out) / 2
        acc.lse[rows] = torch.logaddexp(acc.lse[rows], part.lse)
        return None

    for module in modules:
        monkeypatch.setattr(module, "merge_rows_", merge)
    assert not last_step_is_right(cluster, ranks, strategy)
    assert calls[0] > which


@strategies
def test_the_comparison_notices_sinks_counted_twice(strategy, monkeypatch):
    cluster, ranks = mutable_case(strategy)
    honest = longspan.cp.eager.merge_sinks_

    def merge_twice(acc: PartialAttention, sinks: torch.Tensor) -> None:
        honest(acc, sinks)
        honest(acc, sinks)

    monkeypatch.setattr(longspan.cp.eager, "merge_sinks_", merge_twice)
    assert not last_step_is_right(cluster, ranks, strategy)


# -- memory ----------------------------------------------------------------------------------------------------------


class BlockMeter:
    """Peak bytes of live `KVBlock` buffers per rank (a rank is a thread)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.live: dict[int, int] = {}
        self.peak: dict[int, int] = {}
        honest, lock = KVBlock.__init__, threading.Lock()

        def add(thread: int, num_bytes: int) -> None:
            with lock:
                self.live[thread] = self.live.get(thread, 0) + num_bytes
                self.peak[thread] = max(self.peak.get(thread, 0), self.live[thread])

        def init(block: KVBlock, layout: KVLayout, capacity: int, device: torch.device) -> None:
            honest(block, layout, capacity, device)
            num_bytes = block.message(capacity).untyped_storage().nbytes()
            add(threading.get_ident(), num_bytes)
            weakref.finalize(block, add, threading.get_ident(), -num_bytes)

        monkeypatch.setattr(KVBlock, "__init__", init)


def block_peak(monkeypatch: pytest.MonkeyPatch, strategy: Strategy, num_ranks: int, context: int) -> int:
    """Most bytes that any rank holds in blocks, in a chunk of 24 tokens behind a cached context."""
    cluster = Cluster(random.Random(0), num_ranks, 4, [None], 1, owner_style="striped")
    ranks = Ranks(cluster, [make_group([0])], max_len=context + 24)
    ranks.run(cluster.step({0: context}), strategy, block_len=8)
    with monkeypatch.context() as patch:
        meter = BlockMeter(patch)
        ranks.check(ranks.run(cluster.step({0: 24}), strategy, block_len=8))
    return max(meter.peak.values())


@pytest.mark.cover
def test_the_rings_memory_is_three_blocks_whatever_the_ranks_and_the_context(monkeypatch):
    block_bytes = 8 * make_group([0]).spec.layout.token_bytes
    for num_ranks in (2, 3, 5, 8):
        for context in (64, 256):
            assert block_peak(monkeypatch, PASS_KV, num_ranks, context) <= 3 * block_bytes


def test_the_meter_sees_that_a_gather_grows_with_the_context(monkeypatch):
    peaks = [block_peak(monkeypatch, GATHER_KV, 3, context) for context in (64, 128, 512)]
    assert peaks == sorted(set(peaks))
    assert peaks[2] > 3 * peaks[0]


@pytest.mark.parametrize(
    ("strategy", "nodes"),
    [
        (Strategy.LOCAL, ()),
        *((strategy, ((0,), (1,))) for strategy in (Strategy.GATHER_KV, Strategy.PASS_KV, Strategy.PASS_Q)),
    ],
)
def test_a_plan_that_leaves_out_a_rank_with_visible_keys_is_refused_by_every_rank_that_has_part_in_it(strategy, nodes):
    """Messages that a plan does not know of would be sent and expected by nobody."""
    cluster = Cluster(random.Random(0), 3, 4, [None], 1, owner_style="striped")
    ranks = Ranks(cluster, [make_group([0])])
    runs = cluster.step({0: 24})
    plan_step = GroupStep(strategy, nodes, 4, (0, 0), (0, 0), 1, 1)
    for rank in range(3):
        comm = RecordingCommunicator(thread_group(3, timeout_s=1.0)[rank])
        with pytest.raises(AssertionError, match="plan and page tables disagree"):
            RankStep.of(comm, ranks.backend, ranks.groups[0], plan_step, runs, cluster.tables[0])
