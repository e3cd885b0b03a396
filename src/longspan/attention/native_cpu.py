"""Attention on a CPU by our compiled kernels: decodes at the speed of memory, prompts at that of wide registers.

Holds the assignment of segments to kernel calls. Must not know pages, ranks or models.
Read next: `longspan.native.kernels`, the kernels; `longspan.attention.cpu`, which chooses between the CPU's drivers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.attention.base import RowSegment
from longspan.attention.folding import count_key_runs, fold, merge_key_runs, unfold
from longspan.attention.partial import PartialAttention, merge_views_
from longspan.attention.pieces import Piece, RowMerger, run_only_piece
from longspan.kv.stored import row_width
from longspan.native import kernels
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels can compute every call without a softcap, given the head sizes, the dtypes and the CPU."""
    return kernels.can_prefill(q.shape[2], row_width(v), q.dtype, v.dtype)


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[RowSegment], params: AttentionParams
) -> PartialAttention:
    """Compute all segments, with one kernel call for the keys that a run of queries sees, wherever they lie.

    See `AttentionBackend.partial_attention` for the arguments; `takes` is true and `params` has no softcap.
    """
    few = kernels.MAX_ROWS * k.shape[0] // q.shape[1]  # queries that the decode kernel takes
    pieces: list[Piece] = []  # few queries: at the speed of memory
    runs: dict[tuple[int, int], list[kernels.SeenKeys]] = {}  # many, by (first row, rows)
    for s in segments:
        if s.num_queries == 0 or s.num_keys == 0 or s.visibility is Visibility.NONE:
            continue
        if s.visibility is Visibility.FULL and s.num_queries <= few:
            pieces.append(Piece(s.query_row, s.num_queries, s.key_row, s.num_keys, Visibility.FULL, 0))
        else:
            runs.setdefault((s.query_row, s.num_queries), []).append(_seen_keys(s, params.window))
    if not runs and (partial := run_only_piece(_decode_piece, q, k, v, pieces, params)) is not None:
        return partial
    merger = RowMerger(q, k, v)
    merger.run(_decode_piece, decode_lone_queries(merger, q, k, v, pieces, params), params)
    acc = merger.partial
    for (start, num_queries), seen in runs.items():
        end = start + num_queries
        into = PartialAttention(acc.out[start:end], acc.lse[start:end])
        is_new = merger.are_empty(start, end)
        part = into if is_new else PartialAttention(torch.empty_like(into.out), torch.empty_like(into.lse))
        kernels.prefill(q[start:end], k, v, params.scale, seen, part.out, part.lse)
        if not is_new:
            merge_views_(into.out, into.lse, part.out, part.lse)
        merger.mark(start, end)
    return acc


def _seen_keys(segment: RowSegment, window: int | None) -> kernels.SeenKeys:
    """Return a segment's keys, and which of its queries sees which."""
    if segment.visibility is Visibility.FULL:
        return kernels.SeenKeys(segment.key_row, segment.num_keys)
    assert segment.key_position is not None
    lead = segment.query_position - segment.key_position
    if segment.visibility is Visibility.CAUSAL:
        return kernels.SeenKeys(segment.key_row, segment.num_keys, lead)
    assert window is not None
    return kernels.SeenKeys(segment.key_row, segment.num_keys, lead, window)


def can_decode(q: Tensor, v: Tensor) -> bool:
    """Whether `decode` takes the queries [t, Hkv, G, D] and values [Hkv, s, Dv]."""
    num_queries, _, group_size, width = q.shape
    return kernels.can_decode(num_queries * group_size, width, row_width(v), v.dtype) and kernels.is_available()


def decode(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute a FULL piece of few queries, the heads of a group as rows. See Note [Fold or expand].

    Args:
        q: [t, Hkv, G, D]; `can_decode(q, v)` is true.
        k: [Hkv, s, stored D].
        v: [Hkv, s, stored Dv].
        scale: factor of the scores.

    Returns:
        out [t, Hkv, G, Dv] and lse [t, Hkv, G], float32.
    """
    rows = fold(q)
    num_kv_heads, num_rows, _ = rows.shape
    num_runs = count_key_runs(num_kv_heads, num_rows, k.shape[1], torch.get_num_threads())
    out, lse = merge_key_runs(*kernels.decode(rows, k, v, scale, num_runs))
    return unfold(out, lse, q)


def _decode_piece(q: Tensor, k: Tensor, v: Tensor, piece: Piece, params: AttentionParams) -> tuple[Tensor, Tensor]:
    """Compute a FULL piece of few queries (a `PieceKernel`)."""
    return decode(q, k, v, params.scale)


def decode_lone_queries(
    merger: RowMerger, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], params: AttentionParams
) -> Sequence[Piece]:
    """Compute the decodes of a batch in one call, if the kernel takes them and has work for every thread.

    Args:
        merger: the call's partial, still empty; the results are written into it.
        q: [T, H, D].
        k: [Hkv, S, stored D].
        v: [Hkv, S, stored Dv].
        pieces: all pieces of the call.
        params: the layer's parameters.

    Returns:
        The pieces that are left.
    """
    num_kv_heads, width = k.shape[0], q.shape[2]
    if num_kv_heads == 0 or not kernels.is_available() or q.dtype not in kernels.DTYPES:
        return pieces
    if not kernels.can_decode(q.shape[1] // num_kv_heads, width, row_width(v), k.dtype):
        return pieces
    lone = [piece for piece in pieces if _is_lone(piece)]
    keys_of: dict[int, list[tuple[int, int]]] = {}
    for piece in lone:
        keys_of.setdefault(piece.query_row, []).append((piece.key_row, piece.num_keys))
    if not lone or len(keys_of) * num_kv_heads < torch.get_num_threads():
        return pieces
    acc = merger.partial
    kernels.decode_batch(q.contiguous(), k, v, params.scale, kernels.DecodeBatch(keys_of), acc.out, acc.lse)
    for row in keys_of:
        merger.mark(row, row + 1)
    if len(lone) == len(pieces):
        return ()
    return [piece for piece in pieces if not _is_lone(piece)]


def _is_lone(piece: Piece) -> bool:
    return piece.num_queries == 1 and piece.visibility is Visibility.FULL
