"""Policy that chooses the strategy of one KV group in one step.

Holds pure functions of numbers. Must not know clocks, free memory or anything else that ranks could see differently.
Only makers of plans call it.
Read next: `longspan.costmodel.predict`, which predicts each strategy's time; `longspan.cp.eager`, which runs the chosen
one.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from longspan.costmodel.parameters import Costs, costs_by_bytes
from longspan.costmodel.predict import Prediction, predict_attention
from longspan.costmodel.work import StepWork, count_work
from longspan.kv.layout import KVGroup
from longspan.plan.exchanges import DirectExchange, Exchange, RingExchange, count_exchanges
from longspan.plan.group_step import BLOCK_LEN, make_group_step, nodes_of
from longspan.plan.message_format import row_bytes
from longspan.plan.step_keys import StepKeys, is_local, step_keys
from longspan.plan.types import GroupStep, QueryRun
from longspan.sharding.pages import PageTable
from longspan.types import Strategy

CANDIDATES = (Strategy.GATHER_KV, Strategy.PASS_KV, Strategy.PASS_Q, Strategy.TREE)
"""Strategies that are compared; of equal predicted times the earlier one wins."""


class Candidate(NamedTuple):
    """Strategy that a step could use."""

    strategy: Strategy
    exchanges: tuple[Exchange, ...]
    """What it moves."""
    prediction: Prediction


def exchange_bytes(exchange: Exchange, group: KVGroup) -> int:
    """Most bytes that one participant sends in one layer."""
    if isinstance(exchange, RingExchange):
        # Every participant forwards every block but those of its successor, which have been everywhere.
        total = sum(exchange.num_rows)
        return max(total - rows for rows in exchange.num_rows) * row_bytes("kv", group)
    return int(exchange.num_rows.sum(axis=1).max()) * row_bytes(exchange.operand, group)


def _gathered_rows(gather: Exchange) -> int:
    """Most rows that one rank receives in a gather."""
    assert isinstance(gather, DirectExchange)
    return int(gather.num_rows.sum(axis=0).max())


def _least_rows(work: StepWork) -> int:
    """Lower bound of the keys that some rank receives, if keys move: of every pair the longest piece."""
    most = work.most_keys
    return int((most.sum(axis=1) - most.diagonal()).max(initial=0))


def _least_keys_s(work: StepWork, group: KVGroup, costs: Costs) -> float:
    """Lower bound of the seconds for moving keys: the rows above, over the best link."""
    topology = costs.topology
    best = max(topology.inside.bytes_per_s, topology.between.bytes_per_s * topology.ranks_per_link)
    return _least_rows(work) * group.spec.layout.token_bytes / best


def _has_levels(nodes: Sequence[int]) -> bool:
    """Whether ranks on these nodes (one entry per rank) span several nodes, with two ranks on one of them."""
    return 1 < len(set(nodes)) < len(nodes)


def predict_strategy(
    strategy: Strategy,
    keys: StepKeys,
    group: KVGroup,
    costs: Costs,
    work: StepWork,
    block_len: int,
    exchanges: tuple[Exchange, ...] | None = None,
) -> Candidate:
    """Predict a step under one strategy, candidate or not."""
    if exchanges is None:
        nodes = nodes_of(strategy, keys.participants, costs.topology.nodes)
        exchanges = count_exchanges(strategy, keys, block_len, nodes)
    return Candidate(strategy, exchanges, predict_attention(strategy, exchanges, work, group, costs))


def predict_candidates(
    keys: StepKeys, group: KVGroup, costs: Costs, *, block_len: int = BLOCK_LEN, prune: bool = False
) -> Iterator[Candidate]:
    """Yield every strategy that could be used, in the order of `CANDIDATES`.

    `gather_kv` is a candidate only while the rows that a rank gathers fit two blocks of the ring (which holds three):
    its memory grows with the visible keys. `tree` is a candidate only where the ranks that exchange lie on several
    nodes, and two of them on one: else it equals `pass_q`.

    Args:
        keys: keys that the runs of this step see in this KV group.
        group: the KV group.
        costs: topology and rates of the cluster.
        block_len: rows per block of a ring.
        prune: leave out strategies that move keys if the keys alone would take longer than `pass_q`.
    """
    work = count_work(keys, group, costs.rates)
    nodes = costs.topology.nodes
    strategies: Sequence[Strategy] = CANDIDATES
    known: dict[Strategy, Candidate] = {}
    if prune:
        known[Strategy.PASS_Q] = predict_strategy(Strategy.PASS_Q, keys, group, costs, work, block_len)
        if _least_keys_s(work, group, costs) > known[Strategy.PASS_Q].prediction.total_s:
            strategies = (Strategy.PASS_Q, Strategy.TREE)
    for strategy in strategies:
        if strategy in known:
            yield known[strategy]
            continue
        if strategy is Strategy.TREE and not _has_levels([nodes[rank] for rank in keys.participants]):
            continue
        exchanges: tuple[Exchange, ...] | None = None
        if strategy is Strategy.GATHER_KV:
            if _least_rows(work) > 2 * block_len:
                continue
            exchanges = count_exchanges(strategy, keys, block_len, ())
            if _gathered_rows(exchanges[0]) > 2 * block_len:
                continue
        yield predict_strategy(strategy, keys, group, costs, work, block_len, exchanges)


def best_candidate(keys: StepKeys, group: KVGroup, costs: Costs, *, block_len: int = BLOCK_LEN) -> Candidate:
    """The strategy with the least predicted time. Arguments: `choose_strategy`."""
    if not keys.participants:
        work = count_work(keys, group, costs.rates)
        return Candidate(Strategy.LOCAL, (), predict_attention(Strategy.LOCAL, (), work, group, costs))
    candidates = predict_candidates(keys, group, costs, block_len=block_len, prune=True)
    return min(candidates, key=lambda candidate: candidate.prediction.total_s)  # the first of equals


def choose_strategy(
    keys: StepKeys,
    group: KVGroup,
    costs: Costs | None = None,
    *,
    forced: Strategy | None = None,
    block_len: int = BLOCK_LEN,
    node_of_rank: Sequence[int] | None = None,
) -> GroupStep:
    """Choose the strategy with the least predicted time.

    Args:
        keys: keys that the runs of this step see in this KV group.
        group: the KV group, whose widths give bytes and flops.
        costs: topology and rates of the cluster; None counts bytes alone (`costs_by_bytes`).
        forced: the strategy that the user forces, or None.
        block_len: rows per block of a ring; messages of queries hold a quarter of it.
        node_of_rank: node of each rank where `costs` is None; None puts all ranks on one node.

    Returns:
        The group's step; `local` where every key is on the rank of its query, whatever was forced.
    """
    if not keys.participants:
        return GroupStep(Strategy.LOCAL)
    if costs is None:
        costs = costs_by_bytes(node_of_rank or (0,) * (1 + max(keys.ranks)))
    if forced is not None:
        return make_group_step(forced, keys, block_len, costs.topology.nodes)
    best = best_candidate(keys, group, costs, block_len=block_len)
    return make_group_step(best.strategy, keys, block_len, costs.topology.nodes, best.exchanges)


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
    if is_local(query_runs, tables, group.spec):
        return GroupStep(Strategy.LOCAL)
    keys = step_keys(query_runs, tables, group.spec)
    return choose_strategy(keys, group, costs, forced=forced, block_len=block_len, node_of_rank=node_of_rank)
