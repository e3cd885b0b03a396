"""Attention with capped scores on a CPU: plain matrix products over small blocks, because no CPU kernel caps scores.

Holds the blocks and their arithmetic. Must not know pages, ranks or models.
Read next: `longspan.attention.pieces`, which cuts; `longspan.attention.cpu`, which chooses between the CPU's drivers.

Passes over the scores in memory cost time: 33 to 47 GFLOP/s where the flash kernel reaches 75.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longspan.attention.base import RowSegment
from longspan.attention.folding import fold
from longspan.attention.partial import PartialAttention, accumulation_dtype
from longspan.attention.pieces import Piece, RowMerger, cut_segment, hidden_keys, run_only_piece
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams

MAX_SCORES = 2 << 20
"""Scores held at a time, over all heads (8 MiB each for the scores and their temporaries)."""
BLOCK_KEYS = 1024
"""Keys per block."""


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[RowSegment], params: AttentionParams
) -> PartialAttention:
    """Compute all segments. See `AttentionBackend.partial_attention` for the arguments; `params` has a softcap."""
    blocks = [
        block
        for segment in segments
        for piece in cut_segment(segment, params.window)
        for block in _blocks(piece, q.shape[1])
    ]
    if (partial := run_only_piece(_attend_block, q, k, v, blocks, params)) is not None:
        return partial
    merger = RowMerger(q, k, v)
    merger.run(_attend_block, blocks, params)
    return merger.partial


def _blocks(piece: Piece, num_heads: int) -> Iterator[Piece]:
    """Cut a piece into blocks of at most about MAX_SCORES scores over all heads; blocks may have empty rows."""
    block_keys = min(BLOCK_KEYS, piece.num_keys)
    block_queries = max(1, MAX_SCORES // (num_heads * block_keys))
    for query in range(0, piece.num_queries, block_queries):
        num_queries = min(block_queries, piece.num_queries - query)
        for key in range(0, piece.num_keys, block_keys):
            num_keys = min(block_keys, piece.num_keys - key)
            lead = piece.lead + query - key
            if piece.visibility is not Visibility.FULL and lead + num_queries <= 0:
                break  # this block and the next ones are newer than every query
            yield Piece(piece.query_row + query, num_queries, piece.key_row + key, num_keys, piece.visibility, lead)


def _attend_block(q: Tensor, k: Tensor, v: Tensor, piece: Piece, params: AttentionParams) -> tuple[Tensor, Tensor]:
    """Compute a block (a `PieceKernel`) in the accumulation dtype; rows may be empty."""
    assert params.softcap is not None
    num_queries, num_kv_heads, group_size, _ = q.shape
    dtype = accumulation_dtype(q.dtype)
    rows = fold(q).to(dtype)  # [Hkv, t * G, D]
    scores = torch.bmm(rows * (params.scale / params.softcap), k.to(dtype).transpose(1, 2))  # [Hkv, t * G, s]
    scores.tanh_().mul_(params.softcap)
    grid = scores.view(num_kv_heads, num_queries, group_size, -1)  # [Hkv, t, G, s]
    if piece.visibility is not Visibility.FULL:
        window = params.window if piece.visibility is Visibility.BAND else None
        hidden = hidden_keys(piece.num_queries, piece.num_keys, piece.lead, window)
        grid.masked_fill_(hidden[None, :, None, :], -torch.inf)
    top = grid.amax(dim=-1, keepdim=True)  # [Hkv, t, G, 1], -inf for an empty row
    grid.sub_(top.masked_fill(torch.isneginf(top), 0.0)).exp_()
    total = grid.sum(dim=-1, keepdim=True)  # 0 for an empty row, else at least 1
    out = torch.bmm(scores, v.to(dtype)).view(num_kv_heads, num_queries, group_size, -1)  # [Hkv, t, G, Dv]
    out.div_(torch.where(total == 0, 1.0, total))
    lse = (top + torch.log(total)).squeeze(-1)  # [Hkv, t, G]
    return out.transpose(0, 1), lse.transpose(0, 1)
