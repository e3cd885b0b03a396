"""Attention as in a textbook: every score, one mask, one softmax.

Holds the oracle of the tests. Must not know how to be fast: memory and time are T * S per head, on any device.
Read next: `longspan.attention.cpu`, which must agree with this file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.attention.base import RowSegment, check_arguments, empty_like_queries
from longspan.attention.partial import PartialAttention, accumulation_dtype
from longspan.attention.stored import are_stored, attend_converted
from longspan.kv.layout import KVSpec
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams


class ReferenceBackend:
    """Dense attention in the accumulation dtype: float64 for float64 queries, else float32."""

    name = "reference"

    def unsupported(self, spec: KVSpec, params: AttentionParams) -> None:
        """Return None: everything is supported."""

    def partial_attention(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Sequence[RowSegment], params: AttentionParams
    ) -> PartialAttention:
        """See `AttentionBackend.partial_attention`.

        Raises:
            ValueError: also if two segments show one key to one query twice.
        """
        check_arguments(q, k, v, segments, params)
        if are_stored(q, k):
            return attend_converted(self.partial_attention, q, k, v, segments, params)
        num_rows, num_heads, _ = q.shape
        num_kv_heads, num_keys, _ = k.shape
        if num_rows == 0 or num_keys == 0 or num_heads == 0:
            return empty_like_queries(q, v)
        visible = visible_pairs(num_rows, num_keys, segments, params.window, q.device)  # [T, S]

        dtype = accumulation_dtype(q.dtype)
        seen = visible.any(dim=0)[:, None]  # [S, 1]; rows that no query sees may hold NaN
        group_size = num_heads // num_kv_heads
        keys = torch.where(seen, k, 0).to(dtype).repeat_interleave(group_size, dim=0)  # [H, S, D]
        values = torch.where(seen, v, 0).to(dtype).repeat_interleave(group_size, dim=0)  # [H, S, Dv]

        scores = torch.einsum("thd,hsd->ths", q.to(dtype), keys) * params.scale  # [T, H, S]
        if params.softcap is not None:
            scores = params.softcap * torch.tanh(scores / params.softcap)
        scores = scores.masked_fill(~visible[:, None, :], -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)  # [T, H], -inf for a row without keys
        # softmax and not exp(scores - lse), whose weights add up to 0.9995 at scores of 1e4; NaN for a row without keys
        weights = torch.softmax(scores, dim=-1).masked_fill(torch.isneginf(lse)[..., None], 0.0)
        return PartialAttention(out=torch.einsum("ths,hsd->thd", weights, values), lse=lse)


def visible_pairs(
    num_rows: int, num_keys: int, segments: Sequence[RowSegment], window: int | None, device: torch.device
) -> Tensor:
    """Mask of the query rows and the key rows they see, by global positions.

    Returns:
        [T, S] bool.

    Raises:
        ValueError: two segments show one key to one query.
    """
    visible = torch.zeros(num_rows, num_keys, dtype=torch.bool, device=device)
    for segment in segments:
        rows = slice(segment.query_row, segment.query_row + segment.num_queries)
        keys = slice(segment.key_row, segment.key_row + segment.num_keys)
        pairs = torch.full(
            (segment.num_queries, segment.num_keys), segment.visibility is not Visibility.NONE, device=device
        )
        if segment.key_position is not None and segment.visibility in (Visibility.CAUSAL, Visibility.BAND):
            query_positions = segment.query_position + torch.arange(segment.num_queries, device=device)[:, None]
            key_positions = segment.key_position + torch.arange(segment.num_keys, device=device)[None, :]
            pairs &= key_positions <= query_positions
            if segment.visibility is Visibility.BAND and window is not None:
                pairs &= key_positions > query_positions - window
        if (visible[rows, keys] & pairs).any():
            raise ValueError(f"a query sees a key twice; the second time through {segment}")
        visible[rows, keys] |= pairs
    return visible
