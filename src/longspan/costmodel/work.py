"""Time of a step's attention kernels, by rank of the queries and rank of the keys.

Holds arithmetic over the keys that runs see, for all ranks at once. Must not know which rank computes what: that is the
strategy's choice.
Read next: `longspan.costmodel.predict`, which adds messages and waits.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from longspan.costmodel.parameters import KernelRates
from longspan.kv.layout import KVGroup
from longspan.plan.step_keys import Counts, Piece, StepKeys
from longspan.sharding.visibility import Visibility

Floats: TypeAlias = NDArray[np.float64]

CAUSAL_BLOCK = 512
"""Keys per block of a kernel, which computes blocks at the diagonal in full, hidden pairs included. (Measured on a CPU,
visible pairs counted: 45, 47 and 64 GFLOP/s at 256, 512 and 1024 queries; 95 where all pairs are visible.)"""

BAND_BLOCK = 64
"""Queries per kernel call where a sliding window's edge is masked: each call also computes what its mask hides."""


@dataclass(frozen=True)
class StepWork:
    """Work of one KV group in one layer of a step: of rank i's queries on rank j's keys. P ranks, S pieces of runs."""

    keys: StepKeys
    kernel_s: Floats
    """[P, P] time of all kernel calls without their fixed part, and of merging several calls on the same rows."""
    num_calls: Counts
    """[P, P] kernel calls."""
    num_rows: Counts
    """[P, P] query rows that see a key: the rows of a partial."""
    num_keys: Counts
    """[S, P] keys of each piece on each rank."""
    calls: Counts
    """[S] kernel calls of each piece, if its keys come at once."""

    def pair_s(self, rates: KernelRates) -> Floats:
        """[P, P] seconds of all kernel calls of each pair, on whichever rank."""
        found: Floats = self.kernel_s + self.num_calls * rates.call_s
        return found

    def in_blocks(self, block_len: int) -> tuple[Counts, Counts]:
        """Kernel calls, and query rows to merge, [P, P] each, if the keys of other ranks come in blocks."""
        num_blocks = -(-self.num_keys // block_len)
        calls = num_blocks * self.calls[:, None]
        rows = num_blocks * self.keys.num_queries[self.keys.piece_runs][:, None]
        return self.keys.by_home(_by_run(calls, self.keys)), self.keys.by_home(_by_run(rows, self.keys))

    @cached_property
    def most_keys(self) -> Counts:
        """[P, P] keys of the longest piece."""
        return self.keys.most_by_home(_by_run(self.num_keys, self.keys, np.maximum))


def _by_run(values: NDArray[Any], keys: StepKeys, reduce: np.ufunc = np.add) -> NDArray[Any]:
    """Sum rows of pieces [S, P] over the pieces of each run (or reduce them otherwise): [R, P]."""
    found = np.zeros((len(keys.runs), len(keys.ranks)), dtype=values.dtype)
    if len(keys.pieces) == len(set(keys.piece_runs.tolist())):
        found[keys.piece_runs] = values
    else:
        reduce.at(found, keys.piece_runs, values)
    return found


class _Kernels:
    """How a piece is computed: queries per call, calls, and a call's seconds per query and key."""

    def __init__(self, group: KVGroup, rates: KernelRates) -> None:
        self._group, self._rates, self._pair_s = group, rates, dict[int, float]()

    def of(self, piece: Piece, num_queries: int) -> tuple[int, float, float]:
        """Calls of a piece, seconds per query and key, and the part of the keys that a query is computed with."""
        call_len, num_calls, share = num_queries, 1, 1.0
        if piece.visibility is Visibility.BAND:
            window = self._group.spec.window
            assert window is not None
            call_len = min(num_queries, BAND_BLOCK)
            num_calls = -(-num_queries // call_len)
            share = min(1.0, (window + call_len) / piece.num_positions)
        pair_s = self._pair_s.get(call_len)
        if pair_s is None:
            pair_s = self._group.pair_flops(call_len) / self._rates.attention_rate(call_len)
            self._pair_s[call_len] = pair_s
        return num_calls, pair_s, share


def count_work(keys: StepKeys, group: KVGroup, rates: KernelRates) -> StepWork:
    """Count the kernel calls that a KV group's step needs, on whichever rank.

    Args:
        keys: keys that the step's runs see.
        group: the KV group, whose widths give bytes and flops.
        rates: the ranks' kernel rates.
    """
    kernels = _Kernels(group, rates)
    key_s = group.spec.layout.token_bytes / rates.read_bytes_per_s
    pieces, num_queries = keys.pieces, keys.num_queries
    found = [kernels.of(piece, keys.runs[piece.run].num_tokens) for piece in pieces]
    calls = np.array([num_calls for num_calls, _, _ in found], dtype=np.int64)
    if pieces:
        before, firsts, ends = keys.before, [p.start for p in pieces], [p.end for p in pieces]
        num_keys = before[ends] - before[firsts]
    else:
        num_keys = np.zeros((0, len(keys.ranks)), dtype=np.int64)
    seen = num_keys.astype(np.float64)
    for i, piece in enumerate(pieces):
        if piece.visibility is Visibility.CAUSAL:
            seen[i] = np.minimum(seen[i], (seen[i] + CAUSAL_BLOCK) / 2)
    seen *= np.array([share for _, _, share in found])[:, None]
    pair_s = np.array([pair_s for _, pair_s, _ in found])
    kernel_s = np.maximum(seen * num_queries[keys.piece_runs][:, None] * pair_s[:, None], num_keys * key_s)
    has_keys = num_keys > 0
    pieces_of_run = _by_run(has_keys.astype(np.int64), keys)
    run_s, run_calls = _by_run(kernel_s, keys), _by_run(has_keys * calls[:, None], keys)
    for i, own in enumerate(keys.own):
        if own is not None:
            count, home = own.num_positions, keys.homes[i]
            num_calls, own_s, share = kernels.of(own, keys.runs[i].num_tokens)
            own_seen = (
                min(float(count), (count + CAUSAL_BLOCK) / 2) if own.visibility is Visibility.CAUSAL else count * share
            )
            run_s[i, home] += max(keys.runs[i].num_tokens * own_seen * own_s, count * key_s)
            run_calls[i, home] += num_calls
            pieces_of_run[i, home] += 1
    # The kernel's caller merges what it has of a row already with what follows.
    row_s = rates.merge_s + num_queries * group.merged_row_bytes / rates.copy_bytes_per_s
    run_s += np.maximum(pieces_of_run - 1, 0) * row_s[:, None]
    return StepWork(
        keys=keys,
        kernel_s=keys.by_home(run_s),
        num_calls=keys.by_home(run_calls),
        num_rows=keys.by_home((pieces_of_run > 0) * num_queries[:, None]),
        num_keys=num_keys,
        calls=calls,
    )
