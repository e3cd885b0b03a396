"""Attention on a CPU by PyTorch's flash kernel, with its edges corrected: for what our own kernels do not take.

Holds the calls of that kernel. Must not know pages, ranks or models.
Read next: `longspan.attention.pieces`, which cuts; `longspan.attention.cpu`, which chooses between the CPU's drivers.

Note [Edges of the CPU flash kernel]
    `torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q [B, h, t, D], k [B, h, s, D], v [B, h, s, D])` returns
    (out [B, h, t, D] in q's dtype, lse [B, h, t] natural log, float32 or float64). `torch.nn.functional` has no way to
    it that returns the lse. What callers here must ensure:
    - t = 0 or s = 0 kills the process (SIGFPE);
    - a fully masked row returns lse 0 and out 0, so no call here has such a row;
    - `is_causal` aligns the first query with the first key (top left), whatever t and s are;
    - the mask must have q's dtype, and K and V one width (else pad with zeros);
    - there is no softcap, and no grouped heads (else fold or expand, Note [Fold or expand]).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from longspan.attention import native_cpu
from longspan.attention.base import RowSegment
from longspan.attention.folding import count_key_runs, fold, merge_key_runs, pad_to_one_width, unfold
from longspan.attention.partial import PartialAttention
from longspan.attention.pieces import Piece, RowMerger, cut_segment, hidden_keys, run_only_piece
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[RowSegment], params: AttentionParams
) -> PartialAttention:
    """Compute all segments; few queries go to our decode kernel where it takes them.

    See `AttentionBackend.partial_attention` for the arguments; `params` has no softcap.
    """
    pieces = [piece for segment in segments for piece in cut_segment(segment, params.window)]
    if (partial := run_only_piece(_attend_piece, q, k, v, pieces, params)) is not None:
        return partial
    merger = RowMerger(q, k, v)
    merger.run(_attend_piece, native_cpu.decode_lone_queries(merger, q, k, v, pieces, params), params)
    return merger.partial


def _attend_piece(q: Tensor, k: Tensor, v: Tensor, piece: Piece, params: AttentionParams) -> tuple[Tensor, Tensor]:
    """Compute any piece (a `PieceKernel`)."""
    if piece.visibility is Visibility.FULL and native_cpu.can_decode(q, v):
        return native_cpu.decode(q, k, v, params.scale)
    v_width = v.shape[2]
    q, k, v = pad_to_one_width(q, k, v)
    if piece.visibility is not Visibility.FULL:
        out, lse = _expanded(q, k, v, piece, params)
    else:
        out, lse = _folded(q, k, v, params.scale)
    return (out, lse) if out.shape[3] == v_width else (out[..., :v_width], lse)


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Call the flash kernel on [B, h, t, D] and [B, h, s, D]. See Note [Edges of the CPU flash kernel]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return out, lse


def _folded(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute a FULL piece, the heads of a group as rows. See Note [Fold or expand]."""
    rows = fold(q).unsqueeze(0)  # [1, Hkv, t * G, D]
    _, num_kv_heads, num_rows, _ = rows.shape
    num_runs = count_key_runs(num_kv_heads, num_rows, k.shape[1], torch.get_num_threads())
    if num_runs == 1:
        out, lse = _kernel(rows, k.unsqueeze(0), v.unsqueeze(0), scale)
    else:
        out, lse = _key_runs(rows, k, v, scale, num_runs)
    return unfold(out, lse, q)


def _key_runs(rows: Tensor, k: Tensor, v: Tensor, scale: float, num_runs: int) -> tuple[Tensor, Tensor]:
    """Call `_kernel` on equal runs of the keys as a batch, without a copy, and merge the runs.

    Args:
        rows: [1, Hkv, r, D].
        k: [Hkv, s, D] with s >= num_runs.
        v: [Hkv, s, D].
        scale: factor of the scores.
        num_runs: runs of keys, 2 or more.

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
    return merge_key_runs(out, lse)


def _expanded(q: Tensor, k: Tensor, v: Tensor, piece: Piece, params: AttentionParams) -> tuple[Tensor, Tensor]:
    """Compute a CAUSAL or BAND piece, KV heads repeated by stride-0 views. See Note [Fold or expand]."""
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
    """Additive mask [t, s]: 0 where query i, at `lead + i` from the first key, sees key j, else -inf. Read only."""
    return torch.zeros(num_queries, num_keys, dtype=dtype).masked_fill_(
        hidden_keys(num_queries, num_keys, lead, window), -torch.inf
    )
