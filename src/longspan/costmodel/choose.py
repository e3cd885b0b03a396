"""Policy that chooses the strategy of one KV group in one step.

Holds pure functions of numbers. Must not know clocks, free memory or anything else that ranks could see differently.
Only makers of plans call it.
Read next: `longspan.costmodel.predict`, which predicts each strategy's time; `longspan.cp.eager`, which runs the chosen
one.
"""

from collections.abc import Iterator, Mapping, Sequence

from longspan.costmodel.parameters import Costs, costs_by_bytes
from longspan.costmodel.predict import Prediction, predict_attention
from longspan.costmodel.work import StepWork, count_work
from longspan.kv.layout import KVGroup
from longspan.plan.group_step import BLOCK_LEN, make_group_step
from longspan.plan.message_format import row_bytes
from longspan.plan.segments import make_segments, remote_ranks
from longspan.plan.types import DirectExchange, GroupStep, QueryRun, RingExchange, Segment
from longspan.sharding.pages import PageTable
from longspan.types import Strategy

CANDIDATES = (Strategy.GATHER_KV, Strategy.PASS_KV, Strategy.PASS_Q, Strategy.TREE)
"""Strategies that are compared; of equal predicted times the earlier one wins."""


def exchange_bytes(exchange: DirectExchange | RingExchange, group: KVGroup) -> int:
    """Most bytes that one participant sends in one layer."""
    if isinstance(exchange, RingExchange):
        # Every participant forwards every block but those of its successor, which have been everywhere.
        total = sum(exchange.num_rows)
        return max(total - rows for rows in exchange.num_rows) * row_bytes("kv", group)
    return max(map(sum, exchange.num_rows)) * row_bytes(exchange.operand, group)


def _gathered_rows(step: GroupStep) -> int:
    """Most rows that one rank receives in a gather."""
    (gather,) = step.exchanges
    assert isinstance(gather, DirectExchange)
    return max(sum(row[i] for row in gather.num_rows) for i in range(len(gather.participants)))


def _least_keys_s(work: StepWork, group: KVGroup, costs: Costs) -> float:
    """Lower bound of the seconds for moving keys: what the rank that needs most receives, over the best link."""
    wanted: dict[int, int] = {}
    for (query_rank, key_rank), pair in work.pairs.items():
        if query_rank != key_rank:
            wanted[query_rank] = wanted.get(query_rank, 0) + max(num_keys for num_keys, _, _ in pair.segments)
    topology = costs.topology
    best = max(topology.inside.bytes_per_s, topology.between.bytes_per_s * topology.ranks_per_link)
    return max(wanted.values(), default=0) * group.spec.layout.token_bytes / best


def _has_levels(nodes: Sequence[int]) -> bool:
    """Whether ranks on these nodes (one entry per rank) span several nodes, with two ranks on one of them."""
    return 1 < len(set(nodes)) < len(nodes)


def predict_candidates(
    segments: Sequence[Segment],
    tables: Mapping[int, PageTable],
    group: KVGroup,
    costs: Costs,
    *,
    block_len: int = BLOCK_LEN,
    prune: bool = False,
) -> Iterator[tuple[GroupStep, Prediction]]:
    """Yield a step and its prediction for every strategy that could be used, in the order of `CANDIDATES`.

    `gather_kv` is a candidate only while the rows that a rank gathers fit two blocks of the ring (which holds three):
    its memory grows with the visible keys. `tree` is a candidate only where the ranks that exchange lie on several
    nodes, and two of them on one: else it equals `pass_q`.

    Args:
        segments: the segments of this KV group in this step.
        tables: page table per request of this group.
        group: the KV group.
        costs: topology and rates of the cluster.
        block_len: rows per block of a ring.
        prune: leave out strategies that move keys if the keys alone would take longer than `pass_q`.
    """
    work = count_work(segments, tables, group, costs.rates)
    nodes = costs.topology.nodes
    candidates: Sequence[Strategy] = CANDIDATES
    known: dict[Strategy, tuple[GroupStep, Prediction]] = {}
    if prune:
        step = make_group_step(Strategy.PASS_Q, segments, tables, block_len, nodes)
        known[Strategy.PASS_Q] = (step, predict_attention(step, tables, group, costs, work))
        if _least_keys_s(work, group, costs) > known[Strategy.PASS_Q][1].total_s:
            candidates = (Strategy.PASS_Q, Strategy.TREE)
    for strategy in candidates:
        if strategy in known:
            yield known[strategy]
            continue
        if strategy is Strategy.TREE and not _has_levels([nodes[rank] for rank in remote_ranks(segments)]):
            continue
        step = make_group_step(strategy, segments, tables, block_len, nodes)
        if strategy is Strategy.GATHER_KV and _gathered_rows(step) > 2 * block_len:
            continue
        yield step, predict_attention(step, tables, group, costs, work)


def best_candidate(
    segments: Sequence[Segment],
    tables: Mapping[int, PageTable],
    group: KVGroup,
    costs: Costs,
    *,
    block_len: int = BLOCK_LEN,
) -> tuple[GroupStep, Prediction]:
    """The step of the strategy with the least predicted time, and its prediction. Arguments: `choose_strategy`."""
    if all(s.query_rank == s.key_rank for s in segments):
        step = GroupStep(Strategy.LOCAL, tuple(segments))
        return step, predict_attention(step, tables, group, costs)
    candidates = predict_candidates(segments, tables, group, costs, block_len=block_len, prune=True)
    return min(candidates, key=lambda candidate: candidate[1].total_s)  # the first of equals


def choose_strategy(
    segments: Sequence[Segment],
    tables: Mapping[int, PageTable],
    group: KVGroup,
    costs: Costs | None = None,
    *,
    forced: Strategy | None = None,
    block_len: int = BLOCK_LEN,
    node_of_rank: Sequence[int] | None = None,
) -> GroupStep:
    """Choose the strategy with the least predicted time, and state its exchanges.

    Args:
        segments: the segments of this KV group in this step.
        tables: page table per request of this group.
        group: the KV group, whose widths give bytes and flops.
        costs: topology and rates of the cluster; None counts bytes alone (`costs_by_bytes`).
        forced: the strategy that the user forces, or None.
        block_len: rows per block of a ring; messages of queries hold a quarter of it.
        node_of_rank: node of each rank where `costs` is None; None puts all ranks on one node.

    Returns:
        The group's step; `local` where every key is on the rank of its query, whatever was forced.
    """
    if all(s.query_rank == s.key_rank for s in segments):
        return GroupStep(Strategy.LOCAL, tuple(segments))
    if costs is None:
        num_ranks = 1 + max(max(s.query_rank, s.key_rank) for s in segments)
        costs = costs_by_bytes(node_of_rank or (0,) * num_ranks)
    if forced is not None:
        return make_group_step(forced, segments, tables, block_len, costs.topology.nodes)
    return best_candidate(segments, tables, group, costs, block_len=block_len)[0]


def plan_group(
    query_runs: Sequence[QueryRun],
    tables: Mapping[int, PageTable],
    group: KVGroup,
    costs: Costs | None = None,
    *,
    forced: Strategy | None = None,
    block_len: int = BLOCK_LEN,
    node_of_rank: Sequence[int] | None = None,
) -> GroupStep:
    """One KV group's step for query runs. Other arguments: `choose_strategy`."""
    segments = make_segments(query_runs, tables, group.spec.window, group.spec.chunk)
    return choose_strategy(
        segments, tables, group, costs, forced=forced, block_len=block_len, node_of_rank=node_of_rank
    )
