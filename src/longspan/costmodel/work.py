"""Time of a step's attention kernels, by rank of the queries and rank of the keys.

Holds arithmetic over the keys that runs see, for all ranks at once. Must not know which rank computes what: that is the
strategy's choice.
Read next: `longspan.costmodel.predict`, which adds messages and waits.
"""

from collections.abc import Callable, Sequence
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
    """How pieces are computed: queries per call, calls, and a call's seconds."""

    def __init__(self, group: KVGroup, rates: KernelRates) -> None:
        self._group, self._rates = group, rates
        self._pair_s: dict[int, float] = {}
        self._key_s = group.spec.layout.token_bytes / rates.read_bytes_per_s

    def of(self, pieces: Sequence[Piece], num_queries: Counts) -> tuple[Counts, Callable[[Counts], Floats]]:
        """Calls of each of S pieces, and the function from the keys of each [S, ...] to the seconds of its kernels.

        Args:
            pieces: the pieces.
            num_queries: [S] queries that see each.
        """
        calls, pair_s, share, is_causal = [], [], [], []
        for piece, count in zip(pieces, num_queries.tolist(), strict=True):
            call_len, num_calls, part = count, 1, 1.0
            if piece.visibility is Visibility.BAND:
                window = self._group.spec.window
                assert window is not None
                call_len = min(count, BAND_BLOCK)
                num_calls = -(-count // call_len)
                part = min(1.0, (window + call_len) / piece.num_positions)
            calls.append(num_calls)
            pair_s.append(self._seconds(call_len))
            share.append(part)
            is_causal.append(piece.visibility is Visibility.CAUSAL)

        def seconds(num_keys: Counts) -> Floats:
            """A query is computed with these keys, whether it sees them or a block at the diagonal hides them."""
            shape = (len(pieces), *[1] * (num_keys.ndim - 1))
            seen = num_keys.astype(np.float64)
            if any(is_causal):
                half = np.minimum(seen, (seen + CAUSAL_BLOCK) / 2)
                seen = np.where(np.array(is_causal).reshape(shape), half, seen)
            seen *= np.array(share).reshape(shape)
            computed_s = seen * num_queries.reshape(shape) * np.array(pair_s).reshape(shape)
            found: Floats = np.maximum(computed_s, num_keys * self._key_s)
            return found

        return np.array(calls, dtype=np.int64), seconds

    def _seconds(self, call_len: int) -> float:
        """Seconds per query and key of a call with so many queries."""
        found = self._pair_s.get(call_len)
        if found is None:
            found = self._group.pair_flops(call_len) / self._rates.attention_rate(call_len)
            self._pair_s[call_len] = found
        return found


def count_work(keys: StepKeys, group: KVGroup, rates: KernelRates) -> StepWork:
    """Count the kernel calls that a KV group's step needs, on whichever rank.

    Args:
        keys: keys that the step's runs see.
        group: the KV group, whose widths give bytes and flops.
        rates: the ranks' kernel rates.
    """
    kernels, num_queries = _Kernels(group, rates), keys.num_queries
    before, firsts, ends = keys.before, [p.start for p in keys.pieces], [p.end for p in keys.pieces]
    num_keys = before[ends] - before[firsts] if firsts else np.zeros((0, len(keys.ranks)), dtype=np.int64)
    has_keys = num_keys > 0
    calls, kernel_s = kernels.of(keys.pieces, num_queries[keys.piece_runs])
    run_s = _by_run(kernel_s(num_keys), keys)
    run_calls = _by_run(has_keys * calls[:, None], keys)
    run_pieces = _by_run(has_keys.astype(np.int64), keys)
    own = [piece for piece in keys.own if piece is not None]
    own_runs = np.array([piece.run for piece in own], dtype=np.int64)
    own_calls, own_s = kernels.of(own, num_queries[own_runs])
    homes = (own_runs, keys.homes[own_runs])
    run_s[homes] += own_s(np.array([piece.num_positions for piece in own], dtype=np.int64))
    run_calls[homes] += own_calls
    run_pieces[homes] += 1
    # The kernel's caller merges what it has of a row already with what follows.
    row_s = rates.merge_s + num_queries * group.merged_row_bytes / rates.copy_bytes_per_s
    run_s += np.maximum(run_pieces - 1, 0) * row_s[:, None]
    return StepWork(
        keys=keys,
        kernel_s=keys.by_home(run_s),
        num_calls=keys.by_home(run_calls),
        num_rows=keys.by_home((run_pieces > 0) * num_queries[:, None]),
        num_keys=num_keys,
        calls=calls,
    )
