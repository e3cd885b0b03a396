"""Time of a step's attention kernels, by rank of the queries and rank of the keys.

Holds arithmetic over segments. Must not know which rank computes what: that is the strategy's choice.
Read next: `longspan.costmodel.predict`, which adds messages and waits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from longspan.costmodel.parameters import KernelRates
from longspan.kv.layout import KVGroup
from longspan.plan.types import Segment
from longspan.sharding.pages import PageTable
from longspan.sharding.visibility import Visibility

CAUSAL_BLOCK = 512
"""Keys per block of a kernel, which computes blocks at the diagonal in full, hidden pairs included. (Measured on a CPU,
visible pairs counted: 45, 47 and 64 GFLOP/s at 256, 512 and 1024 queries; 95 where all pairs are visible.)"""

BAND_BLOCK = 64
"""Queries per kernel call where a sliding window's edge is masked: each call also computes what its mask hides."""


@dataclass(slots=True)
class PairWork:
    """Work of one rank's queries on one rank's keys, in one layer."""

    kernel_s: float = 0.0
    """Time of all kernel calls without their fixed part, and of merging several calls on the same rows."""
    num_calls: int = 0
    num_rows: int = 0
    """Query rows that see a key: the rows of a partial."""
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    """Triples (keys, kernel calls, query rows), one per segment."""

    def in_blocks(self, block_len: int) -> tuple[int, int]:
        """Kernel calls, and query rows to merge, if the keys come in blocks of `block_len`."""
        num_calls = num_rows = 0
        for num_keys, calls, rows in self.segments:
            num_blocks = -(-num_keys // block_len)
            num_calls += calls * num_blocks
            num_rows += rows * num_blocks
        return num_calls, num_rows


@dataclass(slots=True)
class StepWork:
    """Work of one KV group in one layer of a step."""

    pairs: dict[tuple[int, int], PairWork] = field(default_factory=dict)
    """Work by (rank of the queries, rank of the keys)."""

    def pair_s(self, query_rank: int, key_rank: int, rates: KernelRates) -> float:
        """Seconds of all kernel calls of one pair, on whichever rank."""
        pair = self.pairs.get((query_rank, key_rank))
        return pair.kernel_s + pair.num_calls * rates.call_s if pair else 0.0

    def num_rows(self, query_rank: int, key_rank: int) -> int:
        """Query rows of one rank that see a key of the other."""
        pair = self.pairs.get((query_rank, key_rank))
        return pair.num_rows if pair else 0


def count_work(
    segments: Iterable[Segment], tables: Mapping[int, PageTable], group: KVGroup, rates: KernelRates
) -> StepWork:
    """Count the kernel calls that a KV group's segments need, on whichever rank.

    Args:
        segments: the segments of this KV group in this step.
        tables: page table per request of this group.
        group: the KV group, whose widths give bytes and flops.
        rates: the ranks' kernel rates.
    """
    window, token_bytes = group.spec.window, group.spec.layout.token_bytes
    row_bytes = group.merged_row_bytes
    work = StepWork()
    pairs = work.pairs
    seen: set[tuple[int, int, int, int]] = set()  # (request, first query, rank of queries, rank of keys)
    pair_s_of: dict[int, float] = {}  # by queries of a call
    for s in segments:
        num_keys = tables[s.request_id].count_on(s.key_rank, s.key_start, s.key_end)
        if not num_keys:
            continue
        num_queries = s.query_end - s.query_start
        key = (s.query_rank, s.key_rank)
        pair = pairs.get(key)
        if pair is None:
            pair = pairs[key] = PairWork()
        call_len, num_calls = num_queries, 1
        seen_keys = float(num_keys)  # per query, as the kernel computes them
        if s.visibility is Visibility.CAUSAL:
            seen_keys = min(seen_keys, (seen_keys + CAUSAL_BLOCK) / 2)
        elif s.visibility is Visibility.BAND:
            assert window is not None
            call_len = min(num_queries, BAND_BLOCK)
            num_calls = -(-num_queries // call_len)
            seen_keys *= min(1.0, (window + call_len) / (s.key_end - s.key_start))
        pair_s = pair_s_of.get(call_len)
        if pair_s is None:
            pair_s = pair_s_of[call_len] = group.pair_flops(call_len) / rates.attention_rate(call_len)
        pair.kernel_s += max(num_queries * seen_keys * pair_s, num_keys * token_bytes / rates.read_bytes_per_s)
        pair.num_calls += num_calls
        pair.segments.append((num_keys, num_calls, num_queries))
        run = (s.request_id, s.query_start, *key)
        if run not in seen:
            seen.add(run)
            pair.num_rows += num_queries
        else:  # the kernel's caller merges what it has of these rows already
            pair.kernel_s += rates.merge_s + num_queries * row_bytes / rates.copy_bytes_per_s
    return work
