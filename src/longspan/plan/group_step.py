"""Builder of one KV group's step under one strategy, with every exchange stated.

Holds one pure function. Must not know which strategy is best (`longspan.costmodel`), or tensors.
Read next: `longspan.costmodel.choose`, which builds every candidate; `longspan.cp.eager`, which runs the chosen step.
"""

from collections.abc import Mapping, Sequence

from longspan.plan.query_units import Pair, num_rows, query_units
from longspan.plan.segments import count_keys, moved_keys, remote_ranks
from longspan.plan.types import DirectExchange, GroupStep, RingExchange, Segment
from longspan.sharding.pages import PageTable
from longspan.types import Strategy

BLOCK_LEN = 2048
"""Rows per block of a ring, and most tokens of a query run: long enough for efficient kernels, while three blocks are a
ring's whole temporary memory."""


def make_group_step(
    strategy: Strategy,
    segments: Sequence[Segment],
    tables: Mapping[int, PageTable],
    block_len: int,
    node_of_rank: Sequence[int] | None = None,
) -> GroupStep:
    """Build a KV group's step under a strategy, with the rows that participants exchange in every layer.

    Args:
        strategy: the movement strategy; the step is `local` if every key is on the rank of its query.
        segments: the segments of one KV group.
        tables: page table per request of that group.
        block_len: rows per block of a ring; messages of queries and partials hold a quarter of it, so that even a chunk
            of a few thousand rows is several messages, and one travels while another is computed.
        node_of_rank: node of each rank, for `tree`; None puts all ranks on one node.
    """
    ranks = remote_ranks(segments)
    if not ranks:
        return GroupStep(Strategy.LOCAL, tuple(segments))
    if strategy is Strategy.PASS_KV:
        by_rank: dict[int, list[Segment]] = {}
        for s in segments:
            by_rank.setdefault(s.key_rank, []).append(s)
        counts = tuple(count_keys(tables, rank, moved_keys(by_rank.get(rank, ()), rank)) for rank in ranks)
        return GroupStep(strategy, tuple(segments), (RingExchange(ranks, counts, block_len),))
    if strategy is Strategy.GATHER_KV:
        by_pair: dict[Pair, list[Segment]] = {}
        for s in segments:
            by_pair.setdefault((s.key_rank, s.query_rank), []).append(s)
        rows = {(a, b): count_keys(tables, a, moved_keys(seen, a, b)) for (a, b), seen in by_pair.items() if a != b}
        return GroupStep(strategy, tuple(segments), (DirectExchange("kv", ranks, _matrix(ranks, rows)),))
    if strategy is Strategy.PASS_Q:
        nodes: tuple[tuple[int, ...], ...] = tuple((rank,) for rank in ranks)
    elif strategy is Strategy.TREE:
        by_node: dict[int, list[int]] = {}
        for rank in ranks:
            by_node.setdefault(0 if node_of_rank is None else node_of_rank[rank], []).append(rank)
        nodes = tuple(tuple(by_node[node]) for node in sorted(by_node))
    else:
        raise AssertionError(f"{strategy} cannot serve queries and keys on different ranks")
    query_block_len = max(1, block_len // 4)
    queries: dict[Pair, int] = {}
    relayed: dict[Pair, int] = {}
    for unit in query_units(segments, nodes, query_block_len):
        for found, messages in ((queries, unit.queries), (relayed, unit.relayed)):
            for pair, runs in messages.items():
                found[pair] = found.get(pair, 0) + num_rows(runs)
    there = [_matrix(ranks, queries)] + [_matrix(ranks, relayed)] * (strategy is Strategy.TREE)
    exchanges = [DirectExchange("query", ranks, rows) for rows in there]
    exchanges += [DirectExchange("partial", ranks, tuple(zip(*rows, strict=True))) for rows in reversed(there)]
    return GroupStep(strategy, tuple(segments), tuple(exchanges), nodes, query_block_len)


def _matrix(ranks: Sequence[int], rows: Mapping[Pair, int]) -> tuple[tuple[int, ...], ...]:
    """Matrix `num_rows` of a direct exchange, from rows by (sender, receiver)."""
    return tuple(tuple(rows.get((a, b), 0) for b in ranks) for a in ranks)
