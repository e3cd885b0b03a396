"""Attention on a CPU: PyTorch's flash kernel, with its edges corrected, and a slower path for softcaps.

Holds `CPUBackend`. Must not know pages, ranks or models. `longspan.attention.reference` is the meaning of this file.
Read next: `longspan.attention.partial` for the merge.

Note [Edges of the CPU flash kernel]
    `torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q [B, h, t, D], k [B, h, s, D], v [B, h, s, D])` returns
    (out [B, h, t, D] in q's dtype, lse [B, h, t] natural log, float32 or float64). What callers here must ensure:
    - t = 0 or s = 0 kills the process (SIGFPE);
    - a fully masked row returns lse 0 and out 0, so no call here has such a row;
    - `is_causal` aligns the first query with the first key (top left), whatever t and s are;
    - the mask must have q's dtype, and K and V one width (else pad with zeros);
    - there is no softcap, and no grouped heads (else fold or expand, below).

Note [Pieces]
    Every segment becomes pieces that one kernel call can do, and that have no empty row. Queries at 4..7, keys at 2..6,
    CAUSAL: one rectangle and one square, merged.

        key  2 3 | 4 5 6
        q4   x x | x . .        FULL rows 4..7 x keys 2..3
        q5   x x | x x .        CAUSAL rows 4..7 x keys 4..6, first query = first key
        q6   x x | x x x
        q7   x x | x x x

    A BAND is cut into blocks of queries; a block is one masked call, or, when the window is wide, a masked left edge,
    a FULL middle and a CAUSAL right edge.

Note [Fold or expand]
    A group of G query heads that share a KV head either becomes G times as many query rows (fold: the kernel reads each
    key once for the group; needs a copy of q, and no causality inside the call) or G heads on a stride-0 view of the
    KV head (expand: no copy). Measured on 2 threads of an AVX-512 machine, 8/2 heads of 64, 16k keys, matmul rate 140
    to 180: fold 153 GFLOP/s at 512 queries against 104; 135 against 143 at 2048; decode 10 GB/s against 6. So FULL
    folds, CAUSAL and BAND expand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.attention.base import RowSegment, check_arguments, empty_like_queries
from longspan.attention.partial import PartialAttention, accumulation_dtype, merge_views_
from longspan.kv.layout import KVSpec
from longspan.native import kernels
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
"""What the backend accepts, and its tests cover."""

NARROW_BAND_BLOCK, WIDE_BAND_BLOCK = 64, 256
"""Queries per block of a BAND. A masked call computes block + window keys per query, so that small blocks waste less:
GFLOP/s of one thread for a window of 128 tokens are 33, 27, 21, 13 at 64, 128, 256, 512 queries; of 4096 tokens 52,
57, 67, 64."""
BAND_MIDDLE = 1024
"""Keys that all queries of a block see, from which on they get a call of their own without a mask. This bounds a mask
to WIDE_BAND_BLOCK x (2 * WIDE_BAND_BLOCK + BAND_MIDDLE) elements."""
SOFTCAP_SCORES = 2 << 20
"""Scores held at a time by the softcap path, over all heads (8 MiB each for the scores and their temporaries)."""
SOFTCAP_KEYS = 1024
"""Keys per block of the softcap path."""
MAX_RUNS = 64
"""Runs of keys that a call is split into at most; each has at least MIN_RUN_KEYS keys, so that none is ever empty."""
MIN_RUN_KEYS = 512
"""A thread's share of the keys when a call is split over threads; the kernel's own key block is 512."""


class _Piece(NamedTuple):
    """What one kernel call does. See Note [Pieces]."""

    query_row: int
    num_queries: int
    key_row: int
    num_keys: int
    visibility: Visibility
    """FULL, CAUSAL or BAND."""
    lead: int
    """Position of the first query less that of the first key; 0 for FULL, where it means nothing."""


class CPUBackend:
    """The fast kernel for CPUs; float32, bfloat16 and float64."""

    name = "cpu"

    def unsupported(self, spec: KVSpec, params: AttentionParams) -> str | None:
        """See `AttentionBackend.unsupported`."""
        names = [str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES]
        dtype = spec.compute_dtype
        return None if dtype in names else f"dtype: got {dtype}, the cpu backend takes {', '.join(names)}"

    def partial_attention(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Sequence[RowSegment], params: AttentionParams
    ) -> PartialAttention:
        """See `AttentionBackend.partial_attention`.

        Raises:
            ValueError: also for a dtype that is not in `KERNEL_DTYPES`, or k or v strided in the last dimension.
        """
        check_arguments(q, k, v, segments, params)
        if q.dtype not in KERNEL_DTYPES:
            raise ValueError(f"dtype: {q.dtype}; the cpu backend takes {', '.join(map(str, KERNEL_DTYPES))}")
        if (k.stride(2) != 1 and k.shape[2] > 1) or (v.stride(2) != 1 and v.shape[2] > 1):
            raise ValueError("k and v must be contiguous in the last dimension")
        if q.stride(2) != 1:
            q = q.contiguous()
        num_rows, num_heads, _ = q.shape
        v_width = v.shape[2]
        if num_heads == 0:
            return empty_like_queries(q, v)

        if params.softcap is None and kernels.can_prefill(q.shape[2], v_width, q.dtype):
            return _by_query_runs(q, k, v, segments, params)
        pieces = [piece for segment in segments for piece in _pieces(segment, params.window)]
        if params.softcap is not None:
            pieces = [block for piece in pieces for block in _softcap_blocks(piece, num_heads)]
        if len(pieces) == 1 and pieces[0].num_queries == num_rows:  # the usual decode: nothing to merge
            return _one_piece(q, k, v, pieces[0], params)

        acc = empty_like_queries(q, v)
        touched = bytearray(num_rows)
        lone = [] if params.softcap is not None else _lone_queries(pieces, q, k, v)
        if lone:
            _decode_lone_queries(q, k, v, lone, params.scale, acc)
            if len(lone) == len(pieces):
                return acc
            for piece in lone:
                touched[piece.query_row] = 1
        for piece in pieces:
            if not (lone and _is_lone(piece)):
                _add_piece_(acc, touched, q, k, v, piece, params)
        return acc


def _one_piece(q: Tensor, k: Tensor, v: Tensor, piece: _Piece, params: AttentionParams) -> PartialAttention:
    """A piece with all rows of q."""
    num_rows, num_heads, _ = q.shape
    out, lse = _run(q, k, v, piece, params)
    dtype = accumulation_dtype(q.dtype)
    return PartialAttention(out.reshape(num_rows, num_heads, -1).to(dtype), lse.reshape(num_rows, num_heads))


def _add_piece_(
    acc: PartialAttention,
    touched: bytearray,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    piece: _Piece,
    params: AttentionParams,
) -> None:
    """Merge a piece into `acc`. Args: `touched`: which rows hold something already; changed."""
    num_heads, num_kv_heads = q.shape[1], k.shape[0]
    grouped = (num_kv_heads, num_heads // num_kv_heads)
    start, end = piece.query_row, piece.query_row + piece.num_queries
    out, lse = _run(q, k, v, piece, params)
    acc_out = acc.out[start:end].view(end - start, *grouped, -1)  # [t, Hkv, G, Dv]
    acc_lse = acc.lse[start:end].view(end - start, *grouped)
    if touched.find(1, start, end) >= 0:
        merge_views_(acc_out, acc_lse, out.to(acc.out.dtype), lse)
    else:
        acc_out.copy_(out)
        acc_lse.copy_(lse)
    touched[start:end] = b"\x01" * piece.num_queries


def _by_query_runs(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[RowSegment], params: AttentionParams
) -> PartialAttention:
    """All segments by the compiled kernels: one call for the keys that a run of queries sees, wherever they lie."""
    num_rows, num_heads, _ = q.shape
    few = kernels.MAX_ROWS * k.shape[0] // num_heads  # queries that the decode kernel takes
    pieces: list[_Piece] = []  # few queries: at the speed of memory
    runs: dict[tuple[int, int], list[kernels.SeenKeys]] = {}  # many, by (first row, rows)
    for s in segments:
        if s.num_queries == 0 or s.num_keys == 0 or s.visibility is Visibility.NONE:
            continue
        if s.visibility is Visibility.FULL and s.num_queries <= few:
            pieces.append(_Piece(s.query_row, s.num_queries, s.key_row, s.num_keys, Visibility.FULL, 0))
        else:
            runs.setdefault((s.query_row, s.num_queries), []).append(_seen_keys(s, params.window))
    if len(pieces) == 1 and not runs and pieces[0].num_queries == num_rows:  # the usual decode: nothing to merge
        return _one_piece(q, k, v, pieces[0], params)
    acc, touched = empty_like_queries(q, v), bytearray(num_rows)
    lone = _lone_queries(pieces, q, k, v)
    if lone:
        _decode_lone_queries(q, k, v, lone, params.scale, acc)
        for piece in lone:
            touched[piece.query_row] = 1
    for piece in pieces:
        if not (lone and _is_lone(piece)):
            _add_piece_(acc, touched, q, k, v, piece, params)
    for (start, num_queries), seen in runs.items():
        end = start + num_queries
        into = PartialAttention(acc.out[start:end], acc.lse[start:end])
        is_new = touched.find(1, start, end) < 0
        part = into if is_new else PartialAttention(torch.empty_like(into.out), torch.empty_like(into.lse))
        kernels.prefill(q[start:end], k, v, params.scale, seen, part.out, part.lse)
        if not is_new:
            merge_views_(into.out, into.lse, part.out, part.lse)
        touched[start:end] = b"\x01" * num_queries
    return acc


def _seen_keys(segment: RowSegment, window: int | None) -> kernels.SeenKeys:
    """A segment's keys, and who of its queries sees which."""
    if segment.visibility is Visibility.FULL:
        return kernels.SeenKeys(segment.key_row, segment.num_keys)
    assert segment.key_position is not None
    lead = segment.query_position - segment.key_position
    if segment.visibility is Visibility.CAUSAL:
        return kernels.SeenKeys(segment.key_row, segment.num_keys, lead)
    assert window is not None
    return kernels.SeenKeys(segment.key_row, segment.num_keys, lead, window)


def _is_lone(piece: _Piece) -> bool:
    return piece.num_queries == 1 and piece.visibility is Visibility.FULL


def _lone_queries(pieces: Sequence[_Piece], q: Tensor, k: Tensor, v: Tensor) -> list[_Piece]:
    """The pieces of a batch's decodes, if the compiled kernel takes them at once and has work for every thread."""
    num_kv_heads, width = k.shape[0], k.shape[2]
    if v.shape[2] != width or k.dtype is not q.dtype or num_kv_heads == 0 or not kernels.is_available():
        return []
    if not kernels.can_decode(q.shape[1] // num_kv_heads, width, q.dtype):
        return []
    lone = [piece for piece in pieces if _is_lone(piece)]
    return lone if len({piece.query_row for piece in lone}) * num_kv_heads >= torch.get_num_threads() else []


def _decode_lone_queries(
    q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[_Piece], scale: float, acc: PartialAttention
) -> None:
    """Fill the rows of `acc` that the pieces are about."""
    keys_of: dict[int, list[tuple[int, int]]] = {}
    for piece in pieces:
        keys_of.setdefault(piece.query_row, []).append((piece.key_row, piece.num_keys))
    kernels.decode_batch(q.contiguous(), k, v, scale, kernels.DecodeBatch(keys_of), acc.out, acc.lse)


def _pieces(segment: RowSegment, window: int | None) -> Iterator[_Piece]:
    """The segment as pieces, in any order, without those that see nothing. See Note [Pieces]."""
    if segment.num_queries == 0 or segment.num_keys == 0 or segment.visibility is Visibility.NONE:
        return
    if segment.visibility is Visibility.FULL:
        yield _Piece(segment.query_row, segment.num_queries, segment.key_row, segment.num_keys, Visibility.FULL, lead=0)
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
            yield _Piece(
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
    """Causal attention as a rectangle that all queries see, and a square whose first query is its first key."""
    start, end = max(queries[0], keys[0]), queries[1]  # a query before the first key sees nothing
    yield Visibility.FULL, (start, end), (keys[0], min(keys[1], start))
    yield Visibility.CAUSAL, (start, end), (start, min(keys[1], end))


def _band_spans(queries: _Span, keys: _Span, window: int) -> Iterator[tuple[Visibility, _Span, _Span]]:
    """Banded attention in blocks of queries, each over the keys that some query of the block sees."""
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


def _run(q: Tensor, k: Tensor, v: Tensor, piece: _Piece, params: AttentionParams) -> tuple[Tensor, Tensor]:
    """One piece.

    Returns:
        out [num_queries, Hkv, G, Dv] in q's or the accumulation dtype, lse [num_queries, Hkv, G] in the accumulation
        dtype; views of any strides, all finite except for lse -inf (and out 0) where the softcap path met an empty row.
    """
    num_heads, num_kv_heads = q.shape[1], k.shape[0]
    q = q[piece.query_row : piece.query_row + piece.num_queries]  # [t, H, D]
    q = q.view(piece.num_queries, num_kv_heads, num_heads // num_kv_heads, q.shape[2])  # [t, Hkv, G, D], any strides
    k = k[:, piece.key_row : piece.key_row + piece.num_keys]  # [Hkv, s, D]
    v = v[:, piece.key_row : piece.key_row + piece.num_keys]  # [Hkv, s, Dv]
    if params.softcap is not None:
        return _softcap(q, k, v, piece, params)
    v_width = v.shape[2]
    if v_width != q.shape[3]:  # zeros change no score and no value; the copy is the price of unequal widths
        width = max(v_width, q.shape[3])
        q, k, v = (F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in (q, k, v))
    if piece.visibility is Visibility.FULL:
        out, lse = _folded(q, k, v, params.scale)
    else:
        out, lse = _expanded(q, k, v, piece, params)
    return (out, lse) if out.shape[3] == v_width else (out[..., :v_width], lse)


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The flash kernel on [B, h, t, D] and [B, h, s, D]. See Note [Edges of the CPU flash kernel]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return out, lse


def _folded(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A FULL piece: the heads of a group become rows. See Note [Fold or expand]."""
    num_queries, num_kv_heads, group_size, width = q.shape
    num_rows, num_keys = num_queries * group_size, k.shape[1]
    rows = q.transpose(0, 1).reshape(1, num_kv_heads, num_rows, width)  # [1, Hkv, t * G, D], a view for one query
    num_runs = _num_runs(num_kv_heads, num_rows, num_keys, torch.get_num_threads())
    if kernels.can_decode(num_rows, width, q.dtype) and kernels.is_available():
        out, lse = _merged_runs(*kernels.decode(rows[0], k, v, scale, num_runs))
    elif num_runs == 1:
        out, lse = _kernel(rows, k.unsqueeze(0), v.unsqueeze(0), scale)
    else:
        out, lse = _key_runs(rows, k, v, scale, num_runs)
    grouped = (num_kv_heads, num_queries, group_size)
    return out.reshape(*grouped, width).transpose(0, 1), lse.reshape(grouped).transpose(0, 1)


def _num_runs(num_kv_heads: int, num_rows: int, num_keys: int, num_threads: int) -> int:
    """Into how many runs of keys a call is cut so that every thread works.

    The kernel gives a thread whole (head, block of rows) pairs; a decode with one KV head would leave all but one idle.
    """
    if num_threads == 1:
        return 1
    block_rows = 256 if num_rows >= 768 else 64 if num_rows >= 192 else 32  # the kernel's own choice
    units = num_kv_heads * -(-num_rows // block_rows)
    if units >= 4 * num_threads:
        return 1
    return max(1, min(num_threads // gcd(units, num_threads), num_keys // MIN_RUN_KEYS, MAX_RUNS))


def _key_runs(rows: Tensor, k: Tensor, v: Tensor, scale: float, num_runs: int) -> tuple[Tensor, Tensor]:
    """`_kernel` over equal runs of the keys as a batch, without a copy, and the merge of the runs.

    Args:
        rows: [1, Hkv, r, D].
        k: [Hkv, s, D] with s >= num_runs.
        v: [Hkv, s, D].
        scale: of the scores.
        num_runs: 2 or more.

    Returns:
        out [Hkv, r, D] and lse [Hkv, r] in the accumulation dtype.
    """
    num_kv_heads, num_keys, width = k.shape
    run_len = num_keys // num_runs
    even = num_runs * run_len
    as_runs = (num_kv_heads, num_runs, run_len, width)
    out, lse = _kernel(
        rows.expand(num_runs, -1, -1, -1),
        k[:, :even].view(as_runs).transpose(0, 1),  # [runs, Hkv, run_len, D]
        v[:, :even].view(as_runs).transpose(0, 1),
        scale,
    )  # [runs, Hkv, r, D], [runs, Hkv, r]
    if even < num_keys:  # fewer than num_runs keys
        tail_out, tail_lse = _kernel(rows, k[None, :, even:], v[None, :, even:], scale)
        out, lse = torch.cat((out, tail_out)), torch.cat((lse, tail_lse))
    return _merged_runs(out, lse)


def _merged_runs(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The merge law over a first dimension of runs, none of them empty: [runs, Hkv, r, D] and [runs, Hkv, r]."""
    if out.shape[0] == 1:
        return out[0], lse[0]
    shares = torch.softmax(lse, dim=0).unsqueeze(-1)
    return (out * shares).sum(dim=0), torch.logsumexp(lse, dim=0)


def _expanded(q: Tensor, k: Tensor, v: Tensor, piece: _Piece, params: AttentionParams) -> tuple[Tensor, Tensor]:
    """A CAUSAL or BAND piece: KV heads repeated by stride-0 views. See Note [Fold or expand]."""
    group_size = q.shape[2]
    heads = q.permute(1, 2, 0, 3)  # [Hkv, G, t, D]
    keys = k.unsqueeze(1).expand(-1, group_size, -1, -1)  # [Hkv, G, s, D]
    values = v.unsqueeze(1).expand(-1, group_size, -1, -1)
    if piece.visibility is Visibility.CAUSAL:
        assert piece.lead == 0
        out, lse = _kernel(heads, keys, values, params.scale, is_causal=True)
    else:
        assert params.window is not None
        mask = _band_mask(piece.num_queries, piece.num_keys, piece.lead, params.window, q.dtype)
        out, lse = _kernel(heads, keys, values, params.scale, mask=mask)
    return out.permute(2, 0, 1, 3), lse.permute(2, 0, 1)


@lru_cache(maxsize=8)  # the blocks of a long band, and the layers of a step, repeat few masks of at most 1.5 MiB
def _band_mask(num_queries: int, num_keys: int, lead: int, window: int, dtype: torch.dtype) -> Tensor:
    """[t, s] additive mask: 0 where query i, at `lead + i` from the first key, sees key j, else -inf. Read only."""
    return torch.zeros(num_queries, num_keys, dtype=dtype).masked_fill_(
        _hidden(num_queries, num_keys, lead, window), -torch.inf
    )


def _hidden(num_queries: int, num_keys: int, lead: int, window: int | None) -> Tensor:
    """[t, s] bool: True where the key is newer than the query, or has left its window."""
    distance = torch.arange(lead, lead + num_queries)[:, None] - torch.arange(num_keys)[None, :]
    return distance < 0 if window is None else (distance < 0) | (distance >= window)


def _softcap_blocks(piece: _Piece, num_heads: int) -> Iterator[_Piece]:
    """The piece in blocks of at most about SOFTCAP_SCORES scores over all heads; blocks may have empty rows."""
    block_keys = min(SOFTCAP_KEYS, piece.num_keys)
    block_queries = max(1, SOFTCAP_SCORES // (num_heads * block_keys))
    for query in range(0, piece.num_queries, block_queries):
        num_queries = min(block_queries, piece.num_queries - query)
        for key in range(0, piece.num_keys, block_keys):
            num_keys = min(block_keys, piece.num_keys - key)
            lead = piece.lead + query - key
            if piece.visibility is not Visibility.FULL and lead + num_queries <= 0:
                break  # this block and the next ones are newer than every query
            yield _Piece(piece.query_row + query, num_queries, piece.key_row + key, num_keys, piece.visibility, lead)


def _softcap(q: Tensor, k: Tensor, v: Tensor, piece: _Piece, params: AttentionParams) -> tuple[Tensor, Tensor]:
    """Attention with capped scores over one small block, by plain matrix products in the accumulation dtype.

    No CPU kernel caps scores. Passes over the scores in memory cost time: 33 to 47 GFLOP/s where the kernel reaches 75.

    Args:
        q: [t, Hkv, G, D].
        k: [Hkv, s, D].
        v: [Hkv, s, Dv].
        piece: what q, k and v are; masked by `lead` unless FULL.
        params: with a softcap.

    Returns:
        As `_run`; rows may be empty.
    """
    assert params.softcap is not None
    num_queries, num_kv_heads, group_size, width = q.shape
    dtype = accumulation_dtype(q.dtype)
    rows = q.transpose(0, 1).reshape(num_kv_heads, -1, width).to(dtype)  # [Hkv, t * G, D]
    scores = torch.bmm(rows * (params.scale / params.softcap), k.to(dtype).transpose(1, 2))  # [Hkv, t * G, s]
    scores.tanh_().mul_(params.softcap)
    grid = scores.view(num_kv_heads, num_queries, group_size, -1)  # [Hkv, t, G, s]
    if piece.visibility is not Visibility.FULL:
        window = params.window if piece.visibility is Visibility.BAND else None
        grid.masked_fill_(_hidden(piece.num_queries, piece.num_keys, piece.lead, window)[None, :, None, :], -torch.inf)
    top = grid.amax(dim=-1, keepdim=True)  # [Hkv, t, G, 1], -inf for an empty row
    grid.sub_(top.masked_fill(torch.isneginf(top), 0.0)).exp_()
    total = grid.sum(dim=-1, keepdim=True)  # 0 for an empty row, else at least 1
    out = torch.bmm(scores, v.to(dtype)).view(num_kv_heads, num_queries, group_size, -1)  # [Hkv, t, G, Dv]
    out.div_(torch.where(total == 0, 1.0, total))
    lse = (top + torch.log(total)).squeeze(-1)  # [Hkv, t, G]
    return out.transpose(0, 1), lse.transpose(0, 1)
