"""Policy: which strategy one KV group uses in one step.

Holds pure functions of integers. Must not know clocks, free memory or anything else that ranks could see differently.
Only makers of plans call it.
Read next: `longspan.cp.attend`, which runs what was chosen.

The first policy picks by bytes moved per layer: of each exchange, what the rank that sends most sends. For 32 query and
8 KV heads `pass_q` moves less than `pass_kv` once the context, the chunk included, exceeds about 4 chunks: queries and
partials have 2 * 32 heads, keys and values 2 * 8. (That holds in every dtype, since a partial's `out` travels in the
model's; with float32 partials of a bfloat16 model it would be 6.)
"""

from collections.abc import Mapping, Sequence

from longspan.plan.group_step import make_group_step
from longspan.plan.segments import make_segments
from longspan.plan.types import (
    DirectExchange,
    GroupStep,
    QueryRun,
    RingExchange,
    Segment,
)
from longspan.sharding.pages import PageTable
from longspan.types import KVGroup, Strategy

BLOCK_LEN = 2048
"""Rows per block of a ring: long enough for efficient kernels; three blocks are the ring's whole temporary memory."""


def _message_bytes(operand: str, num_rows: int, group: KVGroup) -> int:
    """Bytes of one message."""
    spec, heads = group.spec, group.num_query_heads
    if operand == "kv":
        return num_rows * spec.token_bytes
    if operand == "query":
        return num_rows * heads * spec.k_width * spec.itemsize_bytes
    assert operand == "partial", operand
    out_bytes = num_rows * heads * spec.v_width * group.partial_itemsize_bytes
    lse_bytes = num_rows * heads * max(4, group.partial_itemsize_bytes)  # float32, beside float64 also float64
    return out_bytes + lse_bytes


def exchange_bytes(exchange: DirectExchange | RingExchange, group: KVGroup) -> int:
    """The most bytes that any participant sends in one layer."""
    if isinstance(exchange, RingExchange):
        # Every participant forwards every block, except those that came from its successor: their way ends here.
        total = sum(exchange.num_rows)
        return max(total - rows for rows in exchange.num_rows) * group.spec.token_bytes
    return max(sum(_message_bytes(exchange.operand, n, group) for n in rows) for rows in exchange.num_rows)


def _gathered_rows(step: GroupStep) -> int:
    """The most rows that any rank receives in a gather."""
    (gather,) = step.exchanges
    assert isinstance(gather, DirectExchange)
    return max(sum(row[i] for row in gather.num_rows) for i in range(len(gather.participants)))


def choose_strategy(
    segments: Sequence[Segment],
    tables: Mapping[int, PageTable],
    group: KVGroup,
    *,
    forced: Strategy | None = None,
    block_len: int = BLOCK_LEN,
    node_of_rank: Sequence[int] | None = None,
) -> GroupStep:
    """Pick the strategy that moves the fewest bytes, and write down its exchanges.

    `gather_kv` is a candidate only while what a rank gathers fits two blocks of the ring (which holds three): its
    memory grows with what is visible. At equal bytes the earlier of gather_kv, pass_kv, pass_q wins.

    Args:
        segments: of this KV group in this step.
        tables: page table per request of this group.
        group: for the widths of rows.
        forced: the user's choice, or None.
        block_len: rows per block of a ring; queries go in quarters of it.
        node_of_rank: per rank, its node; None: all on one.

    Returns:
        The group's step. When nothing is remote it is `local`, whatever was forced.
    """
    if all(s.query_rank == s.key_rank for s in segments):
        return GroupStep(Strategy.LOCAL, tuple(segments))
    candidates = [forced] if forced is not None else [Strategy.GATHER_KV, Strategy.PASS_KV, Strategy.PASS_Q]
    best: tuple[int, GroupStep] | None = None
    for strategy in candidates:
        step = make_group_step(strategy, segments, tables, block_len, node_of_rank)
        if forced is None and strategy is Strategy.GATHER_KV and _gathered_rows(step) > 2 * block_len:
            continue
        cost = sum(exchange_bytes(exchange, group) for exchange in step.exchanges)
        if best is None or cost < best[0]:
            best = (cost, step)
    assert best is not None
    return best[1]


def plan_group(
    query_runs: Sequence[QueryRun],
    tables: Mapping[int, PageTable],
    group: KVGroup,
    *,
    forced: Strategy | None = None,
    block_len: int = BLOCK_LEN,
    node_of_rank: Sequence[int] | None = None,
) -> GroupStep:
    """Everything that a plan says of one KV group. Arguments as in `choose_strategy`."""
    segments = make_segments(query_runs, tables, group.spec.window)
    return choose_strategy(segments, tables, group, forced=forced, block_len=block_len, node_of_rank=node_of_rank)
