"""Time of a step's attention kernels, by rank of the queries and rank of the keys.

Holds arithmetic over the keys that runs see, for all ranks at once. Must not know which rank computes what: that is the
strategy's choice.
Read next: `longspan.costmodel.predict`, which adds messages and waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from longspan.costmodel.parameters import KernelRates
from longspan.kv.layout import KVGroup
from longspan.plan.step_keys import Counts, Piece, StepKeys
from longspan.plan.types import QueryRun
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
    num_calls: Floats
    """[P, P] kernel calls."""
    num_rows: Floats
    """[P, P] query rows that see a key: the rows of a partial."""
    num_keys: Counts
    """[S, P] keys of each piece on each rank."""
    calls: Floats
    """[S] kernel calls of each piece, if its keys come at once."""

    def pair_s(self, rates: KernelRates) -> Floats:
        """[P, P] seconds of all kernel calls of each pair, on whichever rank."""
        found: Floats = self.kernel_s + self.num_calls * rates.call_s
        return found

    def in_blocks(self, block_len: int) -> tuple[Floats, Floats]:
        """Kernel calls, and query rows to merge, [P, P] each, if the keys of other ranks come in blocks."""
        keys = self.keys
        num_blocks = -(-self.num_keys // block_len)
        per_block = np.stack([self.calls, keys.num_queries[keys.piece_runs]], axis=1)  # [S, 2]
        found = keys.by_home(keys.by_run(num_blocks[:, None] * per_block[:, :, None]))
        return found[:, 0], found[:, 1]

    @cached_property
    def most_keys(self) -> Counts:
        """[P, P] keys of the longest piece."""
        return self.keys.by_home(self.keys.by_run(self.num_keys, np.maximum), np.maximum)


class _Kernels:
    """How pieces are computed: queries per call, calls, and a call's seconds."""

    def __init__(self, group: KVGroup, rates: KernelRates) -> None:
        self._group, self._rates = group, rates
        self._pair_s: dict[int, float] = {}
        self._key_s = group.spec.layout.token_bytes / rates.read_bytes_per_s

    def calls(self, pieces: Sequence[Piece], runs: Sequence[QueryRun]) -> tuple[Floats, Floats]:
        """Kernel calls of each of S pieces, and the seconds of all its queries per key [S]."""
        calls: list[float] = []
        seconds: list[float] = []
        for piece in pieces:
            count = call_len = runs[piece.run].num_tokens
            num_calls, share = 1, 1.0
            if piece.visibility is Visibility.BAND:
                window = self._group.spec.window
                assert window is not None
                call_len = min(count, BAND_BLOCK)
                num_calls = -(-count // call_len)
                share = min(1.0, (window + call_len) / piece.num_positions)
            pair_s = self._pair_s.get(call_len)
            if pair_s is None:
                pair_s = self._group.pair_flops(call_len) / self._rates.attention_rate(call_len)
                self._pair_s[call_len] = pair_s
            calls.append(num_calls)
            seconds.append(count * share * pair_s)
        return np.array(calls, dtype=np.float64), np.array(seconds)

    def seconds(self, pieces: Sequence[Piece], num_keys: NDArray[Any], per_key_s: Floats) -> Floats:
        """Seconds of the kernels of S pieces with keys [S, ...], each key taking `per_key_s` [S, ...] if computed."""
        seen = num_keys  # a query is computed with these, whether it sees them or a block at the diagonal hides them
        is_causal = [piece.visibility is Visibility.CAUSAL for piece in pieces]
        if any(is_causal):
            causal = np.array(is_causal).reshape(-1, *[1] * (num_keys.ndim - 1))
            seen = np.where(causal, np.minimum(seen, (seen + CAUSAL_BLOCK) / 2), seen)
        found: Floats = np.maximum(seen * per_key_s, num_keys * self._key_s)
        return found


def count_work(keys: StepKeys, group: KVGroup, rates: KernelRates) -> StepWork:
    """Count the kernel calls that a KV group's step needs, on whichever rank.

    Args:
        keys: keys that the step's runs see.
        group: the KV group, whose widths give bytes and flops.
        rates: the ranks' kernel rates.
    """
    kernels, runs, before = _Kernels(group, rates), keys.runs, keys.before
    calls, per_key_s = kernels.calls(keys.pieces, runs)
    num_keys = before[[p.end for p in keys.pieces]] - before[[p.start for p in keys.pieces]] if keys.pieces else _NONE
    num_keys = num_keys.reshape(len(keys.pieces), len(keys.ranks))
    has_keys = num_keys > 0
    kernel_s = kernels.seconds(keys.pieces, num_keys, per_key_s[:, None])
    of_run = keys.by_run(np.stack([kernel_s, has_keys * calls[:, None], has_keys], axis=1))  # [R, 3, P]
    own = [piece for piece in keys.own if piece is not None]
    if own:
        own_calls, own_key_s = kernels.calls(own, runs)
        own_s = kernels.seconds(own, np.array([piece.num_positions for piece in own], dtype=np.float64), own_key_s)
        own_runs = [piece.run for piece in own]
        of_run[own_runs, :, keys.homes[own_runs]] += np.stack([own_s, own_calls, np.ones(len(own))], axis=1)
    num_pieces = of_run[:, 2]
    if num_pieces.max(initial=0.0) > 1:  # the kernel's caller merges what it has of a row already with what follows
        row_s = rates.merge_s + keys.num_queries * (group.merged_row_bytes / rates.copy_bytes_per_s)
        of_run[:, 0] += np.maximum(num_pieces - 1, 0) * row_s[:, None]
    np.multiply(num_pieces > 0, keys.num_queries[:, None], out=num_pieces)
    found = keys.by_home(of_run)
    return StepWork(keys, found[:, 0], found[:, 1], found[:, 2], num_keys, calls)


_NONE = np.zeros(0, dtype=np.int64)
