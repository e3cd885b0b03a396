"""Attention over latents: queries projected into their space, or keys and values of all heads expanded from them.

Holds the projections, the choice between both ways, and the backend that wraps any other one. Must not know pages,
ranks or models.
Read next: `longspan.kv.layout`, Note [Latents]; `longspan.models.latent`, which takes the weights from a model.

Note [Runs of keys that are expanded]
    A call's keys are cut where a segment begins or ends, and into runs of at most so many keys that their expansion
    stays small. A run is expanded if enough queries see a key of it, else it is left to the absorbed queries. Queries
    0..255 see keys 0..1279, queries 256..511 keys 0..1023 (min_expanded_queries 300, runs of 512):

        keys         0..511       512..1023    1024..1279
        queries      512          512          256
        becomes      expanded     expanded     absorbed
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.attention.base import AttentionBackend, RowSegment, RowSegments
from longspan.attention.partial import PartialAttention, merge_rows_
from longspan.kv.layout import KVSpec
from longspan.sharding.visibility import Visibility, visibility
from longspan.types import AttentionParams

EXPANDED_BYTES = 32 << 20
"""Most bytes of keys and values that are expanded at a time, unless MIN_EXPANDED_KEYS take more. On a CPU 16 and 64 MiB
are as fast, 4 MiB are a fifth slower."""
MIN_EXPANDED_KEYS = 128


class LatentWeights(NamedTuple):
    """Projections of one layer. See Note [Latents] in `longspan.kv.layout`."""

    w_k: Tensor
    """[H, nope, rank]: a latent's key in every head, without the part that carries the position."""
    w_v: Tensor
    """[H, Dout, rank]: a latent's value in every head."""

    def absorb(self, q: Tensor) -> Tensor:
        """Project queries [T, H, nope + rotated] into the latent space: [T, H, rank + rotated]."""
        num_heads, nope, rank = self.w_k.shape
        absorbed = q.new_empty(q.shape[0], num_heads, rank + q.shape[2] - nope)
        torch.bmm(q[..., :nope].transpose(0, 1), self.w_k, out=absorbed[..., :rank].transpose(0, 1))
        absorbed[..., rank:] = q[..., nope:]
        return absorbed

    def project(self, partial: PartialAttention) -> PartialAttention:
        """Project outputs [T, H, rank] over latents to those of the heads: [T, H, Dout]; `lse` stays."""
        out = partial.out.to(self.w_v.dtype).transpose(0, 1)  # [H, T, rank]
        projected = torch.bmm(out, self.w_v.transpose(1, 2)).to(partial.out.dtype)  # [H, T, Dout]
        return PartialAttention(projected.transpose(0, 1).contiguous(), partial.lse)

    def expand(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [H, s, nope + rotated] and values [H, s, Dout] of all heads, from latents [1, s, rank + rotated]."""
        num_heads, _, rank = self.w_k.shape
        stored, rotated = latents[..., :rank], latents[..., rank:]
        keys = torch.matmul(stored, self.w_k.transpose(1, 2))  # [H, s, nope]
        values = torch.matmul(stored, self.w_v.transpose(1, 2))
        return torch.cat((keys, rotated.expand(num_heads, -1, -1)), dim=2), values


class LatentParams(AttentionParams, frozen=True, eq=False, kw_only=True):
    """Parameters of one layer of latent attention, on a rank that has the weights."""

    weights: LatentWeights
    spec: KVSpec

    @property
    def of_heads(self) -> AttentionParams:
        """Parameters of a call whose keys are expanded, or whose queries are absorbed: both have the same scores."""
        return AttentionParams(self.scale, self.softcap, self.window)


class LatentBackend:
    """Backend that computes latent attention by another backend, and leaves other layers to it."""

    def __init__(self, inner: AttentionBackend) -> None:
        self._inner = inner

    @property
    def name(self) -> str:
        """Name of the other backend."""
        return self._inner.name

    def unsupported(self, spec: KVSpec, params: AttentionParams) -> str | None:
        """See `AttentionBackend.unsupported`."""
        return self._inner.unsupported(spec, params)

    def partial_attention(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Sequence[RowSegment], params: AttentionParams
    ) -> PartialAttention:
        """See `AttentionBackend.partial_attention`.

        For a layer of `LatentParams` q is [T, H, nope + rotated], k is [1, S, rank + rotated], v its first elements,
        and the result [T, H, Dout].
        """
        if not isinstance(params, LatentParams):
            return self._inner.partial_attention(q, k, v, segments, params)
        weights, plain = params.weights, params.of_heads
        work = self._work(segments, params)
        if work.absorbed or not work.expanded:
            absorbed = self._inner.partial_attention(weights.absorb(q), k, v, work.absorbed, plain)
            acc = weights.project(absorbed)
        else:
            dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
            acc = PartialAttention.empty(q.shape[0], q.shape[1], params.spec.out_width, dtype, q.device)
        for block in work.expanded:
            rows = [k[:, start:end] for start, end in block.runs]
            keys, values = weights.expand(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))
            part = self._inner.partial_attention(
                q[block.first_row : block.last_row], keys, values, block.segments, plain
            )
            merge_rows_(acc, block.first_row, part)
        return acc

    def _work(self, segments: Sequence[RowSegment], params: LatentParams) -> Work:
        """Divide a call's segments, once for all layers of a step."""
        derived = segments.derived if isinstance(segments, RowSegments) else {}
        key = ("latent", params.spec, params.weights.w_k.shape[0])
        if key not in derived:
            derived[key] = self._divide(segments, params)
        found = derived[key]
        assert isinstance(found, Work)
        return found

    def _divide(self, segments: Sequence[RowSegment], params: LatentParams) -> Work:
        spec, heads = params.spec, params.weights.w_k.shape[0]
        least = spec.min_expanded_queries
        if sum(s.num_queries for s in segments) < least:
            return Work(segments, ())
        expanded = KVSpec.uniform(heads, spec.q_width, spec.out_width, spec.compute_dtype, spec.window)
        if self._inner.unsupported(expanded, params.of_heads) is not None:
            return Work(segments, ())
        most_keys = max(MIN_EXPANDED_KEYS, EXPANDED_BYTES // expanded.layout.token_bytes)
        return divide(segments, params.window, least, most_keys)


@dataclass(frozen=True, slots=True)
class ExpandedBlock:
    """Keys that are expanded together."""

    runs: Sequence[tuple[int, int]]
    """Rows [start, end) of the call's keys, in the order of the expanded ones."""
    first_row: int
    """First query row that sees one of them."""
    last_row: int
    """One past the last such row."""
    segments: RowSegments
    """Segments over the expanded keys, with query rows from `first_row` on."""


@dataclass(frozen=True, slots=True)
class Work:
    """Segments of one call, divided. See Note [Runs of keys that are expanded]."""

    absorbed: Sequence[RowSegment]
    """Segments of keys that are met in the latent space."""
    expanded: Sequence[ExpandedBlock]


def divide(segments: Sequence[RowSegment], window: int | None, min_queries: float, most_keys: int) -> Work:
    """Divide segments into those of keys that few queries see, and blocks of keys that many see.

    Args:
        segments: a call's segments.
        window: sliding window in tokens, or None.
        min_queries: queries per key from which keys are expanded.
        most_keys: most keys of a block.
    """
    few: dict[int, list[tuple[int, int]]] = {}  # index of a segment: rows [start, end) of its keys
    blocks: list[_OpenBlock] = []
    for start, end, active in _runs(segments, most_keys):
        middle = (start + end) // 2
        if sum(_num_seeing(segments[i], middle, window) for i in active) < min_queries:
            for i in active:
                _extend(few.setdefault(i, []), start, end)
            continue
        if not blocks or blocks[-1].num_keys + end - start > most_keys:
            blocks.append(_OpenBlock())
        blocks[-1].add(start, end, active)
    if not blocks:
        return Work(segments, ())
    absorbed = RowSegments(
        part for i, runs in few.items() for start, end in runs for part in _clip(segments[i], start, end, start, window)
    )
    closed = (block.close(segments, window) for block in blocks)
    return Work(absorbed, tuple(block for block in closed if block.segments))


class _OpenBlock:
    """Block that still takes keys, in the order of their rows."""

    def __init__(self) -> None:
        self.num_keys = 0
        self._runs: list[tuple[int, int]] = []
        self._seen: dict[int, list[tuple[int, int]]] = {}  # index of a segment: rows [start, end) of its keys

    def add(self, start: int, end: int, active: Sequence[int]) -> None:
        """Add rows [start, end) of keys, which the segments of some indices see."""
        _extend(self._runs, start, end)
        for i in active:
            _extend(self._seen.setdefault(i, []), start, end)
        self.num_keys += end - start

    def close(self, segments: Sequence[RowSegment], window: int | None) -> ExpandedBlock:
        """Make the block's segments."""
        starts = [start for start, _ in self._runs]
        lengths = accumulate((end - start for start, end in self._runs), initial=0)
        shifts = [row - start for row, start in zip(lengths, starts, strict=False)]
        parts: list[RowSegment] = []
        for i, runs in self._seen.items():
            for start, end in runs:
                row = start + shifts[bisect_right(starts, start) - 1]
                parts += _clip(segments[i], start, end, row, window)
        first_row = min((s.query_row for s in parts), default=0)
        last_row = max((s.query_row + s.num_queries for s in parts), default=0)
        moved = RowSegments(replace(s, query_row=s.query_row - first_row) for s in parts)
        return ExpandedBlock(tuple(self._runs), first_row, last_row, moved)


def _runs(segments: Sequence[RowSegment], most_keys: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Cut keys where a segment begins or ends, and after `most_keys`: rows [start, end) and the segments there."""
    starting: dict[int, list[int]] = {}
    ending: dict[int, list[int]] = {}
    for i, s in enumerate(segments):
        if s.num_queries and s.num_keys and s.visibility is not Visibility.NONE:
            starting.setdefault(s.key_row, []).append(i)
            ending.setdefault(s.key_row + s.num_keys, []).append(i)
    active: dict[int, None] = {}  # a set that keeps its order
    for first, last in pairwise(sorted({*starting, *ending})):
        for i in ending.get(first, ()):
            del active[i]
        active |= dict.fromkeys(starting.get(first, ()))
        if active:
            for start in range(first, last, most_keys):
                yield start, min(last, start + most_keys), tuple(active)


def _num_seeing(segment: RowSegment, key_row: int, window: int | None) -> int:
    """Number of a segment's queries that see one of its keys."""
    if segment.key_position is None or segment.visibility is Visibility.FULL:
        return segment.num_queries
    after = segment.key_position + key_row - segment.key_row - segment.query_position  # the first query's index
    end = segment.num_queries
    if segment.visibility is Visibility.BAND and window is not None:
        end = min(end, after + window)
    return max(0, end - max(0, after))


def _clip(segment: RowSegment, start: int, end: int, key_row: int, window: int | None) -> Iterator[RowSegment]:
    """The part of a segment over its keys of rows [start, end), which lie from `key_row` on; none if it sees none."""
    position, seen = segment.key_position, segment.visibility
    if position is not None:
        position += start - segment.key_row
        first, last = segment.query_position, segment.query_position + segment.num_queries
        if seen is not Visibility.FULL:
            band = window if seen is Visibility.BAND else None
            seen = visibility(first, last, position, position + end - start, band)
    if seen is not Visibility.NONE:
        yield replace(segment, key_row=key_row, num_keys=end - start, key_position=position, visibility=seen)


def _extend(runs: list[tuple[int, int]], start: int, end: int) -> None:
    """Add [start, end) to ascending runs, as a part of the last one if it continues that."""
    if runs and runs[-1][1] == start:
        runs[-1] = (runs[-1][0], end)
    else:
        runs.append((start, end))
