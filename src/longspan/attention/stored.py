"""Attention over keys and values that are stored in another dtype than queries have, for kernels that do not read them.

Holds the conversion of the rows that a call sees, in blocks. Must not know pages, ranks or models.
Read next: `longspan.kv.stored`, Note [Stored rows]; `longspan.attention.key_blocks`; `longspan.attention.native_cpu`,
whose kernels read stored rows as they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longspan.attention.base import RowSegment, RowSegments
from longspan.attention.key_blocks import Work, divide
from longspan.attention.partial import PartialAttention, accumulation_dtype, merge_rows_
from longspan.kv.pool import are_in_keys
from longspan.kv.stored import exact_rows, row_width
from longspan.types import AttentionParams

CONVERTED_BYTES = 16 << 20
"""Most bytes of keys that are converted at a time, unless MIN_KEYS take more."""
MIN_KEYS = 128

Attend = Callable[[Tensor, Tensor, Tensor, Sequence[RowSegment], AttentionParams], PartialAttention]
"""`AttentionBackend.partial_attention` for keys and values in the dtype of queries."""


def are_stored(q: Tensor, k: Tensor) -> bool:
    """Whether keys must be converted before queries of another dtype meet them."""
    return k.dtype is not q.dtype


def attend_converted(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Sequence[RowSegment],
    params: AttentionParams,
    *,
    out_width: int | None = None,
) -> PartialAttention:
    """Compute `AttentionBackend.partial_attention` over stored keys and values.

    Args:
        attend: the same for keys and values in the dtype of `q`.
        q: [T, H, D].
        k: [Hkv, S, stored D], contiguous in the last dimension.
        v: [Hkv, S, stored Dv], or the first Dv elements of `k`, in the same memory.
        segments: which queries see which keys.
        params: the layer's parameters.
        out_width: elements of one output head; None for those of a value.
    """
    width, is_in_keys = row_width(k), are_in_keys(v, k)
    v_width = v.shape[2] if is_in_keys and v.shape[2] < k.shape[2] else row_width(v)
    acc = PartialAttention.empty(q.shape[0], q.shape[1], out_width or v_width, accumulation_dtype(q.dtype), q.device)
    for block in _blocks(k.shape[0] * (width + v_width) * q.element_size(), segments, params.window).blocks:
        keys = _convert(k, width, block.runs, q.dtype)
        values = keys[..., :v_width] if is_in_keys else _convert(v, v_width, block.runs, q.dtype)
        part = attend(q[block.first_row : block.last_row], keys, values, block.segments, params)
        merge_rows_(acc, block.first_row, part)
    return acc


def _blocks(token_bytes: int, segments: Sequence[RowSegment], window: int | None) -> Work:
    """Divide a call's segments, once for all layers of a step."""
    derived = segments.derived if isinstance(segments, RowSegments) else {}
    key = ("stored", token_bytes, window)
    if key not in derived:
        derived[key] = divide(segments, window, 1, max(MIN_KEYS, CONVERTED_BYTES // token_bytes))
    found = derived[key]
    assert isinstance(found, Work)
    return found


def _convert(stored: Tensor, width: int, runs: Sequence[tuple[int, int]], dtype: torch.dtype) -> Tensor:
    """Convert runs of rows [start, end), one behind the other: [Hkv, rows, width]."""
    rows = [exact_rows(stored[:, start:end], width, dtype) for start, end in runs]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
