"""Pieces of a CPU's attention call, each of which one kernel call computes, and the merge of their partials.

Holds the cutting of segments, in positions and rows, and the merge by rows. Must not know which kernel runs a piece.
Read next: `longspan.attention.flash_cpu`, `longspan.attention.native_cpu` and `longspan.attention.softcap_cpu`, which
compute pieces.

Note [Pieces]
    A piece has no empty row. Queries at 4..7, keys at 2..6, CAUSAL: one rectangle and one square, merged.

        key  2 3 | 4 5 6
        q4   x x | x . .        FULL rows 4..7 x keys 2..3
        q5   x x | x x .        CAUSAL rows 4..7 x keys 4..6, first query = first key
        q6   x x | x x x
        q7   x x | x x x

    A BAND is cut into blocks of queries; a block is one masked call, or, when the window is wide, a masked left edge,
    a FULL middle and a CAUSAL right edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.attention.base import RowSegment, empty_like_queries
from longspan.attention.partial import PartialAttention, accumulation_dtype, merge_views_
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams

NARROW_BAND_BLOCK, WIDE_BAND_BLOCK = 64, 256
"""Queries per block of a BAND. A masked call computes block + window keys per query, so that small blocks waste less:
GFLOP/s of one thread for a window of 128 tokens are 33, 27, 21, 13 at 64, 128, 256, 512 queries; of 4096 tokens 52,
57, 67, 64."""
BAND_MIDDLE = 1024
"""Fewest keys seen by all queries of a block that get a call of their own, without a mask. This bounds a mask to
WIDE_BAND_BLOCK x (2 * WIDE_BAND_BLOCK + BAND_MIDDLE) elements."""


class Piece(NamedTuple):
    """Work of one kernel call. See Note [Pieces]."""

    query_row: int
    num_queries: int
    key_row: int
    num_keys: int
    visibility: Visibility
    """FULL, CAUSAL or BAND."""
    lead: int
    """Position of the first query minus that of the first key, in tokens; 0 and unused for FULL."""


PieceKernel = Callable[[Tensor, Tensor, Tensor, Piece, AttentionParams], tuple[Tensor, Tensor]]
"""Kernel that computes a piece from its rows: q [t, Hkv, G, D] of any strides, k [Hkv, s, D], v [Hkv, s, Dv], the
piece, the layer's parameters. It returns out [t, Hkv, G, Dv] in q's or the accumulation dtype and lse [t, Hkv, G] in
the accumulation dtype, of any strides, finite but for rows with lse -inf and out 0."""


def cut_segment(segment: RowSegment, window: int | None) -> Iterator[Piece]:
    """Cut a segment into pieces, in any order, without those that see nothing. See Note [Pieces]."""
    if segment.num_queries == 0 or segment.num_keys == 0 or segment.visibility is Visibility.NONE:
        return
    if segment.visibility is Visibility.FULL:
        yield Piece(segment.query_row, segment.num_queries, segment.key_row, segment.num_keys, Visibility.FULL, lead=0)
        return
    assert segment.key_position is not None
    # From here on everything is a position; a row is its position plus a shift.
    first_query, first_key = segment.query_position, segment.key_position
    query_shift, key_shift = segment.query_row - first_query, segment.key_row - first_key
    queries = (first_query, first_query + segment.num_queries)
    keys = (first_key, first_key + segment.num_keys)
    if segment.visibility is Visibility.CAUSAL:
        spans = _causal_spans(queries, keys)
    else:
        assert window is not None
        spans = _band_spans(queries, keys, window)
    for visibility, (query_start, query_end), (key_start, key_end) in spans:
        if query_start < query_end and key_start < key_end:
            yield Piece(
                query_start + query_shift,
                query_end - query_start,
                key_start + key_shift,
                key_end - key_start,
                visibility,
                lead=0 if visibility is Visibility.FULL else query_start - key_start,
            )


_Span = tuple[int, int]
"""Positions [start, end); empty when start >= end."""


def _causal_spans(queries: _Span, keys: _Span) -> Iterator[tuple[Visibility, _Span, _Span]]:
    """Cut causal attention into a rectangle that all queries see, and a square whose first query is its first key."""
    start, end = max(queries[0], keys[0]), queries[1]  # a query before the first key sees nothing
    yield Visibility.FULL, (start, end), (keys[0], min(keys[1], start))
    yield Visibility.CAUSAL, (start, end), (start, min(keys[1], end))


def _band_spans(queries: _Span, keys: _Span, window: int) -> Iterator[tuple[Visibility, _Span, _Span]]:
    """Cut banded attention into blocks of queries, each over the keys that some query of the block sees."""
    start, end = max(queries[0], keys[0]), min(queries[1], keys[1] + window - 1)  # every query here sees a key
    block_len = NARROW_BAND_BLOCK if window < 2 * BAND_MIDDLE else WIDE_BAND_BLOCK
    for block_start in range(start, end, block_len):
        block_end = min(block_start + block_len, end)
        block = (block_start, block_end)
        seen_by_some = (max(keys[0], block_start - window + 1), min(keys[1], block_end))
        seen_by_all = (max(keys[0], block_end - window), min(keys[1], block_start + 1))
        if seen_by_all == seen_by_some:
            yield Visibility.FULL, block, seen_by_all
        elif seen_by_all[1] - seen_by_all[0] >= BAND_MIDDLE:
            left_end, right_start = seen_by_all
            yield Visibility.FULL, block, seen_by_all
            yield Visibility.BAND, (block_start, min(block_end, left_end + window - 1)), (seen_by_some[0], left_end)
            yield from _causal_spans(block, (right_start, seen_by_some[1]))
        else:
            yield Visibility.BAND, block, seen_by_some


def hidden_keys(num_queries: int, num_keys: int, lead: int, window: int | None) -> Tensor:
    """Mask [t, s] bool: True where the key is newer than the query, or has left its window."""
    distance = torch.arange(lead, lead + num_queries)[:, None] - torch.arange(num_keys)[None, :]
    return distance < 0 if window is None else (distance < 0) | (distance >= window)


def run_piece(
    kernel: PieceKernel, q: Tensor, k: Tensor, v: Tensor, piece: Piece, params: AttentionParams
) -> tuple[Tensor, Tensor]:
    """Hand a piece's rows to a kernel.

    Args:
        kernel: kernel that takes this kind of piece.
        q: [T, H, D], contiguous in the last dimension.
        k: [Hkv, S, D].
        v: [Hkv, S, Dv].
        piece: rows of q, k and v.
        params: the layer's parameters.

    Returns:
        out and lse as the kernel returns them (`PieceKernel`).
    """
    num_heads, num_kv_heads = q.shape[1], k.shape[0]
    q = q[piece.query_row : piece.query_row + piece.num_queries]  # [t, H, D]
    q = q.view(piece.num_queries, num_kv_heads, num_heads // num_kv_heads, q.shape[2])  # [t, Hkv, G, D]
    k = k[:, piece.key_row : piece.key_row + piece.num_keys]  # [Hkv, s, D]
    v = v[:, piece.key_row : piece.key_row + piece.num_keys]  # [Hkv, s, Dv]
    return kernel(q, k, v, piece, params)


def run_only_piece(
    kernel: PieceKernel, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], params: AttentionParams
) -> PartialAttention | None:
    """Compute the usual decode, one piece with all rows of q, without a merge; None if the pieces are others."""
    num_rows, num_heads, _ = q.shape
    if len(pieces) != 1 or pieces[0].num_queries != num_rows:
        return None
    out, lse = run_piece(kernel, q, k, v, pieces[0], params)
    dtype = accumulation_dtype(q.dtype)
    return PartialAttention(out.reshape(num_rows, num_heads, -1).to(dtype), lse.reshape(num_rows, num_heads))


class RowMerger:
    """Partial of one call, built piece by piece: empty rows are written, others merged."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Start with empty rows.

        Args:
            q: [T, H, D].
            k: [Hkv, S, D].
            v: [Hkv, S, Dv].
        """
        self._q, self._k, self._v = q, k, v
        self.partial = empty_like_queries(q, v)
        """`out` [T, H, Dv] and `lse` [T, H] of the pieces computed so far."""
        self._filled = bytearray(q.shape[0])

    def are_empty(self, start: int, end: int) -> bool:
        """Whether no piece of rows [start, end) has come yet."""
        return self._filled.find(1, start, end) < 0

    def mark(self, start: int, end: int) -> None:
        """Note that rows [start, end) of `partial` are filled."""
        self._filled[start:end] = b"\x01" * (end - start)

    def run(self, kernel: PieceKernel, pieces: Sequence[Piece], params: AttentionParams) -> None:
        """Compute pieces, and merge them in this order."""
        num_kv_heads = self._k.shape[0]
        grouped = (num_kv_heads, self._q.shape[1] // num_kv_heads)
        acc = self.partial
        for piece in pieces:
            start, end = piece.query_row, piece.query_row + piece.num_queries
            out, lse = run_piece(kernel, self._q, self._k, self._v, piece, params)
            acc_out = acc.out[start:end].view(end - start, *grouped, -1)  # [t, Hkv, G, Dv]
            acc_lse = acc.lse[start:end].view(end - start, *grouped)
            if self.are_empty(start, end):
                acc_out.copy_(out)
                acc_lse.copy_(lse)
            else:
                merge_views_(acc_out, acc_lse, out.to(acc.out.dtype), lse)
            self.mark(start, end)
