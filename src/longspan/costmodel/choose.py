"""Policy: which strategy one KV group uses in one step.

Holds pure functions of numbers. Must not know clocks, free memory or anything else that ranks could see differently.
Only makers of plans call it.
Read next: `longspan.costmodel.predict`, which says how long each would take; `longspan.cp.eager`, which runs what was
chosen.
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
"""What is compared; at equal times the earlier wins."""


def exchange_bytes(exchange: DirectExchange | RingExchange, group: KVGroup) -> int:
    """The most bytes that any participant sends in one layer."""
    if isinstance(exchange, RingExchange):
        # Every participant forwards every block, except those that came from its successor: their way ends here.
        total = sum(exchange.num_rows)
        return max(total - rows for rows in exchange.num_rows) * row_bytes("kv", group)
    return max(map(sum, exchange.num_rows)) * row_bytes(exchange.operand, group)


def _gathered_rows(step: GroupStep) -> int:
    """The most rows that any rank receives in a gather."""
    (gather,) = step.exchanges
    assert isinstance(gather, DirectExchange)
    return max(sum(row[i] for row in gather.num_rows) for i in range(len(gather.participants)))


def _least_keys_s(work: StepWork, group: KVGroup, costs: Costs) -> float:
    """Less than moving keys can take: those that the rank which needs most has to receive, over the best link."""
    wanted: dict[int, int] = {}
    for (query_rank, key_rank), pair in work.pairs.items():
        if query_rank != key_rank:
            wanted[query_rank] = wanted.get(query_rank, 0) + max(num_keys for num_keys, _, _ in pair.segments)
    topology = costs.topology
    best = max(topology.inside.bytes_per_s, topology.between.bytes_per_s * topology.ranks_per_link)
    return max(wanted.values(), default=0) * group.spec.layout.token_bytes / best


def _has_levels(nodes: Sequence[int]) -> bool:
    """Whether there is anything between nodes, and anything inside one. Args: the node of every rank that exchanges."""
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
    """Every strategy that a step could use, written down and predicted, in the order of `CANDIDATES`.

    `gather_kv` is a candidate only while what a rank gathers fits two blocks of the ring (which holds three): its
    memory grows with what is visible. `tree` is one only where the ranks that exchange lie on several
    nodes, and two of them on one: else it is `pass_q`.

    Args: as `choose_strategy`; `prune` leaves out what moves keys if the keys alone would take longer than `pass_q`.
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
    """The strategy that is predicted to take the least time, and the prediction. Arguments as in `choose_strategy`."""
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
    """Pick the strategy that is predicted to take the least time, and write down its exchanges.

    Args:
        segments: of this KV group in this step.
        tables: page table per request of this group.
        group: for the widths of rows.
        costs: what the cluster can do; None counts bytes alone (`costs_by_bytes`).
        forced: the user's choice, or None.
        block_len: rows per block of a ring; queries go in quarters of it.
        node_of_rank: per rank, its node, where `costs` is None; None: all on one.

    Returns:
        The group's step. When nothing is remote it is `local`, whatever was forced.
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
    """Everything that a plan says of one KV group. Arguments as in `choose_strategy`."""
    segments = make_segments(query_runs, tables, group.spec.window)
    return choose_strategy(
        segments, tables, group, costs, forced=forced, block_len=block_len, node_of_rank=node_of_rank
    )
