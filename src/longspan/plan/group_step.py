"""Builder of one KV group's step under one strategy: what ranks are told of what moves.

Holds one pure function. Must not know which strategy is best (`longspan.costmodel`), or tensors.
Read next: `longspan.costmodel.choose`, which builds the best candidate; `longspan.cp.eager`, which runs it.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from longspan.plan.exchanges import DirectExchange, Exchange, RingExchange, count_exchanges
from longspan.plan.query_units import cut_blocks, num_rows
from longspan.plan.step_keys import Counts, StepKeys
from longspan.plan.types import GroupStep
from longspan.types import Strategy

BLOCK_LEN = 2048
"""Rows per block of a ring, and most tokens of a query run: long enough for efficient kernels, while three blocks are a
ring's whole temporary memory."""
GPU_BLOCK_LEN = 8192
"""The same on GPUs: beside 0.9 ms of attention over 2,048 keys, writing and merging a partial takes 0.125 ms more (by
arithmetic, for 8,192 queries of an 8 B Llama on an H200)."""

QUERY_BLOCKS = 4
"""Messages of queries and partials hold this part of a block, so that even a chunk of a few thousand rows is several
messages, and one travels while another is computed."""

BLOCKS_AHEAD = 2
"""Blocks of queries that are under way to a rank while it computes."""


def nodes_of(
    strategy: Strategy, ranks: Iterable[int], node_of_rank: Sequence[int] | None
) -> tuple[tuple[int, ...], ...]:
    """Participants of a strategy, node by node.

    Args:
        strategy: the movement strategy; but for `tree`, every rank is a node of its own.
        ranks: the participants, ascending.
        node_of_rank: node of each rank; None puts all ranks on one node.
    """
    if strategy is not Strategy.TREE:
        return tuple([(rank,) for rank in ranks])
    by_node: dict[int, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(0 if node_of_rank is None else node_of_rank[rank], []).append(rank)
    return tuple([tuple(by_node[node]) for node in sorted(by_node)])


def make_group_step(
    strategy: Strategy,
    keys: StepKeys,
    block_len: int = BLOCK_LEN,
    node_of_rank: Sequence[int] | None = None,
    exchanges: Sequence[Exchange] | None = None,
) -> GroupStep:
    """Build a KV group's step under a strategy.

    Args:
        strategy: the movement strategy; the step is `local` if every key is on the rank of its query.
        keys: keys that the step's runs see.
        block_len: rows per block of a ring; messages of queries and partials hold a quarter of it.
        node_of_rank: node of each rank, for `tree`; None puts all ranks on one node.
        exchanges: result of `count_exchanges` for this step; None counts them.
    """
    ranks = keys.participants
    if not ranks:
        return GroupStep(Strategy.LOCAL)
    nodes = nodes_of(strategy, ranks, node_of_rank)
    if exchanges is None:
        exchanges = count_exchanges(strategy, keys, block_len, nodes)
    if isinstance(exchanges[0], RingExchange):
        return GroupStep(strategy, nodes, block_len, tuple(exchanges[0].num_rows))
    columns = np.searchsorted(keys.ranks, ranks)
    there = [e.num_rows for e in exchanges if isinstance(e, DirectExchange) and e.operand != "partial"]
    rows: Counts = np.sum(there, axis=0)
    sent, received = rows.sum(axis=1)[columns].tolist(), rows.sum(axis=0)[columns].tolist()
    if strategy is Strategy.GATHER_KV:
        return GroupStep(strategy, nodes, block_len, tuple(sent), tuple(received))
    query_block_len = max(1, block_len // QUERY_BLOCKS)
    num_blocks, most_rows = _query_blocks(keys, query_block_len)
    at_once = most_rows * max(map(len, nodes))  # every mate of a leader may pass a block on
    num_ahead = max(1, BLOCKS_AHEAD * query_block_len // at_once)
    return GroupStep(strategy, nodes, query_block_len, tuple(sent), tuple(received), num_blocks, num_ahead)


def _query_blocks(keys: StepKeys, block_len: int) -> tuple[int, int]:
    """Most blocks that a rank's queries for one other rank take, and most rows of a block."""
    runs_of: dict[int, list[tuple[int, int, int]]] = {}
    for run, most_keys in zip(keys.runs, keys.remote.max(axis=1).tolist(), strict=True):
        if most_keys:
            runs_of.setdefault(run.compute_rank, []).append((run.request_id, run.position, run.end))
    blocks = [cut_blocks(runs, block_len) for runs in runs_of.values()]
    return max(map(len, blocks)), max(num_rows(block) for of_rank in blocks for block in of_rank)
