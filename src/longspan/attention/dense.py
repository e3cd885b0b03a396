"""Attention by a library's kernel for dense rectangles and bottom-right causal squares.

Holds the way from segments to such calls. Must not know any library.
Read next: `longspan.attention.torch_flash` and `longspan.attention.flashinfer`, two such kernels.

Note [Dense calls]
    The keys that a run of queries sees are gathered once per layer (0.25 ms for 128k keys of 8 heads of 128 where the
    attention of 8k queries takes 29 ms, both by arithmetic); pages are of no concern to the kernel then. Key runs that
    follow each other in position become one. Queries 4..7 and keys 2..5, CAUSAL, are two calls, since a kernel's causal
    mask ends where queries and keys end together:

        key  2 3 4 5
        q4   x x x .      queries 4..5 x keys 2..5: causal, ends at 5 on both sides
        q5   x x x x
        q6   x x x x      queries 6..7 x keys 2..5: full
        q7   x x x x

    FULL keys go into the same call as those of a causal square that has all queries of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from longspan.attention.base import (
    AttentionBackend,
    RowSegment,
    RowSegments,
    check_arguments,
    check_supported,
    empty_like_queries,
    other_storage,
)
from longspan.attention.partial import PartialAttention, merge_rows_
from longspan.attention.staging import to_device
from longspan.kv.layout import KVSpec
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams

MIN_QUERIES = 128
"""Shorter runs of queries are left to the other backend, if there is one."""

KeyRange = tuple[int, int]
"""First row and number of rows of keys."""


class DenseKernel(Protocol):
    """Attention kernel of a library."""

    @property
    def name(self) -> str:
        """Name that users write for `attention_backend`."""
        ...

    def unsupported(self, spec: KVSpec, params: AttentionParams) -> str | None:
        """See `AttentionBackend.unsupported`."""
        ...

    def dense_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of all queries over all keys, or over those up to the diagonal.

        Args:
            q: [T, H, D], T > 0.
            k: [Hkv, S, D], S > 0; if causal, S >= T.
            v: [Hkv, S, D].
            is_causal: query i sees keys up to i + S - T.
            scale: factor of the scores.
            softcap: bound of the scores (`softcap * tanh(score / softcap)`), or None.

        Returns:
            `out` [T, H, D] in any dtype, and `lse` [T, H] float32, a natural logarithm.
        """
        ...


def unsupported_by(name: str, spec: KVSpec, params: AttentionParams, max_width: int) -> str | None:
    """Say why a library's kernel without softcap, for 16 bits and one width of keys and values, cannot serve a model.

    Args:
        name: backend as users write it.
        spec: what a token caches.
        params: attention of the layers.
        max_width: widest head, in elements.
    """
    if spec.compute_dtype not in ("bfloat16", "float16"):
        return f"dtype: got {spec.compute_dtype}, the {name} backend takes bfloat16 and float16"
    k_width, v_width = spec.layout.k_width, spec.layout.v_width
    if k_width != v_width or k_width > max_width or k_width % 8:
        return (
            f"head size: got {k_width} of keys and {v_width} of values, the {name} backend takes one size for both, "
            f"a multiple of 8 up to {max_width}"
        )
    if params.softcap is not None:
        return f"softcap: got {params.softcap}, the {name} backend takes none"
    return None


class _Call(NamedTuple):
    """One call of the kernel."""

    row: int
    num_queries: int
    keys: Tensor | KeyRange
    """[S] int64 rows to gather, or rows that follow each other."""
    is_causal: bool


class _DenseCalls(NamedTuple):
    """Kernel calls that compute some segments, and the segments that are left."""

    calls: list[_Call]
    rest: RowSegments
    """Segments for the other backend."""


class DenseBackend:
    """A library's kernel for long runs of queries, and another backend for everything else."""

    def __init__(self, kernel: DenseKernel, others: AttentionBackend | None) -> None:
        """Wrap a kernel.

        Args:
            kernel: the library's kernel.
            others: backend for bands and short runs of queries; None gives the kernel every run, and refuses bands.
        """
        self._kernel, self._others = kernel, others
        self.name = kernel.name

    def unsupported(self, spec: KVSpec, params: AttentionParams) -> str | None:
        """See `AttentionBackend.unsupported`."""
        if (reason := other_storage(spec, self.name)) is not None:
            return reason
        if self._others is None:
            if params.window is not None:
                return f"window: got {params.window}, the {self.name} backend takes none"
            return self._kernel.unsupported(spec, params)
        return self._kernel.unsupported(spec, params) or self._others.unsupported(spec, params)

    def partial_attention(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Sequence[RowSegment], params: AttentionParams
    ) -> PartialAttention:
        """See `AttentionBackend.partial_attention`.

        Raises:
            ValueError: also for what `unsupported` names.
        """
        check_arguments(q, k, v, segments, params)
        check_supported(self, q, k, v, params)
        derived = segments.derived if isinstance(segments, RowSegments) else {}
        key = (self.name, k.device)
        if key not in derived:
            derived[key] = _split(segments, k.device, 1 if self._others is None else MIN_QUERIES)
        work = derived[key]
        assert isinstance(work, _DenseCalls)
        rest = work.rest
        touched = bytearray(q.shape[0])
        if rest:
            assert self._others is not None, "bands are refused above"
            acc = self._others.partial_attention(q, k, v, rest, params)
            for s in rest:
                touched[s.query_row : s.query_row + s.num_queries] = b"\x01" * s.num_queries
        else:
            acc = empty_like_queries(q, v)
        for call in work.calls:
            end = call.row + call.num_queries
            out, lse = self._kernel.dense_attention(
                q[call.row : end],
                _gathered(k, call.keys),
                _gathered(v, call.keys),
                is_causal=call.is_causal,
                scale=params.scale,
                softcap=params.softcap,
            )
            if touched.find(1, call.row, end) < 0:
                acc.out[call.row : end] = out
                acc.lse[call.row : end] = lse
            else:
                merge_rows_(acc, call.row, PartialAttention(out, lse))
            touched[call.row : end] = b"\x01" * call.num_queries
        return acc


def _gathered(tensor: Tensor, rows: Tensor | KeyRange) -> Tensor:
    """Gather rows of [Hkv, rows, D] into [Hkv, S, D]; a view where the rows follow each other."""
    if isinstance(rows, Tensor):
        return tensor.index_select(1, rows)
    return tensor[:, rows[0] : rows[0] + rows[1]]


def _split(segments: Sequence[RowSegment], device: torch.device, min_queries: int) -> _DenseCalls:
    """Split segments into kernel calls and a rest: bands and runs of fewer than `min_queries` queries."""
    runs: dict[KeyRange, list[RowSegment]] = {}
    rest = RowSegments()
    for s in segments:
        if s.num_queries and s.num_keys and s.visibility is not Visibility.NONE:
            if s.visibility is Visibility.BAND or s.num_queries < min_queries:
                rest.append(s)
            else:
                runs.setdefault((s.query_row, s.num_queries), []).append(s)
    return _DenseCalls([call for found in runs.values() for call in _calls(found, device)], rest)


def _calls(segments: Sequence[RowSegment], device: torch.device) -> Iterator[_Call]:
    """Calls for one run of queries. See Note [Dense calls]."""
    row, num_queries, position = segments[0].query_row, segments[0].num_queries, segments[0].query_position
    full = [(s.key_row, s.num_keys) for s in segments if s.visibility is Visibility.FULL]
    for first_position, keys in _joined([s for s in segments if s.visibility is Visibility.CAUSAL]):
        num_unseeing = max(0, first_position - position)  # queries before the first key
        lead = position + num_unseeing - first_position
        num_left = num_queries - num_unseeing
        if num_left <= 0:
            continue
        keys = _first(keys, lead + num_left)  # the others are newer than every query
        num_keys = sum(count for _, count in keys)
        num_diagonal = max(0, min(num_left, num_keys - lead))  # queries up to the last key
        if num_diagonal == num_queries:
            yield _Call(row, num_queries, _rows(full + keys, device), True)
            full = []
            continue
        if num_diagonal:
            yield _Call(row + num_unseeing, num_diagonal, _rows(keys, device), True)
        if num_diagonal < num_left:
            yield _Call(row + num_unseeing + num_diagonal, num_left - num_diagonal, _rows(keys, device), False)
    if full:
        yield _Call(row, num_queries, _rows(full, device), False)


def _joined(segments: Sequence[RowSegment]) -> Iterator[tuple[int, list[KeyRange]]]:
    """Join keys whose positions follow each other into runs of (first position, rows)."""
    placed = sorted((s.key_position, s.key_row, s.num_keys) for s in segments if s.key_position is not None)
    first, end = 0, None
    rows: list[KeyRange] = []
    for position, row, count in placed:
        if position != end:
            if rows:
                yield first, rows
            first, rows = position, []
        rows.append((row, count))
        end = position + count
    if rows:
        yield first, rows


def _first(rows: Sequence[KeyRange], most: int) -> list[KeyRange]:
    """Return at most the first `most` of some rows."""
    kept: list[KeyRange] = []
    for row, count in rows:
        taken = min(count, most)
        if taken > 0:
            kept.append((row, taken))
        most -= taken
    return kept


def _rows(runs: Sequence[KeyRange], device: torch.device) -> Tensor | KeyRange:
    """Return the rows of several runs in their order: as one range if they follow each other, else as a tensor."""
    joined: list[KeyRange] = []
    for row, count in runs:
        if joined and sum(joined[-1]) == row:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((row, count))
    if len(joined) == 1:
        return joined[0]
    return to_device(np.concatenate([np.arange(row, row + count) for row, count in joined]), device)
