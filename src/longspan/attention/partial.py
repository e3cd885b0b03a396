"""Attention over part of the keys, and the law that merges such parts.

Holds `PartialAttention` and its merges. Must not know pages, ranks or how a partial came to be.
Read next: `longspan.attention.base`, which makes partials; `longspan.cp`, which moves them.

Note [The merge law]
    Softmax attention over two disjoint key sets is a weighted mean of the attention over each, weighted by the
    softmax denominators, whose logarithms are the `lse`:

        m = max(lse_a, lse_b);  w = exp(lse - m);  out = sum(w * out) / sum(w);  lse = m + log(sum(w))

    A query with scores log(1), log(3) on rank 0 and log(4) on rank 1 has `lse` log(4) and log(4): each side weighs 1/2,
    and the merged `lse` is log(8). A row that saw no key has `lse = -inf`, weight 0 and `out = 0`; its `out` is never
    multiplied but replaced, because 0 * NaN is NaN, and two such rows merge into such a row, because
    `-inf - -inf` is never used. `lse` is a natural logarithm everywhere; a kernel that returns another base, or
    0 or +inf for an empty row, is corrected where it is called.
    Source: 2305.19370 section 3; FlashInfer, 2501.01005 section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.native import kernels


@dataclass(slots=True)
class PartialAttention:
    """Attention of T query rows over some of the keys that they may see. See Note [The merge law]."""

    out: Tensor
    """[T, H, Dv] float32 (float64 for float64 queries): softmax-weighted mean of the values; 0 for an empty row."""
    lse: Tensor
    """[T, H], dtype of `out`: natural log of the softmax denominator (scaled scores); -inf for an empty row."""

    @classmethod
    def empty(
        cls, num_rows: int, num_heads: int, v_width: int, dtype: torch.dtype, device: torch.device | str
    ) -> PartialAttention:
        """Return rows that saw no key: the neutral element of the merge."""
        return cls(
            out=torch.zeros(num_rows, num_heads, v_width, dtype=dtype, device=device),
            lse=torch.full((num_rows, num_heads), -torch.inf, dtype=dtype, device=device),
        )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which partials of queries of `dtype` are kept and merged: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_partials(*partials: PartialAttention) -> PartialAttention:
    """Merge partials into attention over the union of their key sets, which must be disjoint.

    Associative and commutative up to rounding. See Note [The merge law].

    Args:
        partials: one or more, of the same shape. `out` may have a lower dtype than `lse` (a partial off the wire) and
            may hold anything, NaN included, in rows whose `lse` is -inf.

    Returns:
        A new partial in the dtype of the first `lse`; rows that are empty in every argument are empty.

    Raises:
        ValueError: no partial was given, or their shapes differ.
    """
    if not partials:
        raise ValueError("merge_partials needs at least one partial, got none")
    first = partials[0]
    for part in partials[1:]:
        if part.out.shape != first.out.shape or part.lse.shape != first.lse.shape:
            raise ValueError(f"partials differ in shape: {tuple(first.out.shape)} and {tuple(part.out.shape)}")
    dtype = first.lse.dtype
    lses = torch.stack([part.lse.to(dtype) for part in partials])  # [num_partials, T, H]
    top = lses.amax(dim=0)
    weights = torch.exp(lses - top.masked_fill(torch.isneginf(top), 0.0))  # an all-empty row weighs 0, not NaN
    total = weights.sum(dim=0)  # 0 for a row that is empty everywhere, else at least 1
    shares = (weights / torch.where(total == 0, 1.0, total)).unsqueeze(-1)  # [num_partials, T, H, 1]
    out = torch.zeros(first.out.shape, dtype=dtype, device=first.out.device)
    for share, part in zip(shares, partials, strict=True):
        out += torch.where(share > 0, part.out.to(dtype) * share, 0.0)
    return PartialAttention(out=out, lse=top + torch.log(total))


def merge_rows_(acc: PartialAttention, row: int, part: PartialAttention) -> None:
    """Merge `part` in place into rows `[row, row + len(part))` of `acc`; their key sets must be disjoint.

    Args:
        acc: changed in place.
        row: first row of `acc` that `part` covers.
        part: [num_rows, H, Dv]; `out` may have a lower dtype than `acc.out`; NaN in empty rows is harmless.

    Raises:
        ValueError: the rows are not all in `acc`.
    """
    num_rows = part.lse.shape[0]
    if row < 0 or row + num_rows > acc.lse.shape[0]:
        raise ValueError(f"rows [{row}, {row + num_rows}) are not in a partial of {acc.lse.shape[0]} rows")
    acc_out, acc_lse = acc.out[row : row + num_rows], acc.lse[row : row + num_rows]
    if kernels.can_merge(acc_out, acc_lse, part.out, part.lse):
        kernels.merge_rows(acc_out, acc_lse, part.out, part.lse)
        return
    is_plain = acc_out.is_contiguous() and acc_lse.is_contiguous() and acc_out.dtype is torch.float32
    if acc_out.is_cuda and is_plain and _has_triton():
        from longspan.triton_kernels.merge import accumulate_  # imports Triton, which a CPU does not need

        accumulate_(acc_out, acc_lse, part.out.contiguous(), part.lse.float().contiguous())
        return
    merge_views_(acc_out, acc_lse, _clean(part.out.to(acc_out.dtype), part.lse), part.lse.to(acc_lse.dtype))


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def merge_views_(acc_out: Tensor, acc_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge like `merge_rows_`, for views of any leading shape and parts whose empty rows are known to be finite.

    One pass over `out` and `acc_out` together (`lerp_`), the rest touches only `lse`. Measured for 1024 rows of 8 heads
    of 64, one thread: 0.12 ms, against 0.22 ms for scale, scale and add; `torch.logaddexp` alone costs 0.17 ms.

    Args:
        acc_out: [..., Dv], changed in place. NaN in its empty rows is harmless.
        acc_lse: [...], changed in place.
        out: [..., Dv], dtype of `acc_out`, finite.
        lse: [...], dtype of `acc_lse`.
    """
    acc_empty = torch.isneginf(acc_lse)
    if acc_out.device.type == "cpu":  # elsewhere a look at the data would stop the device
        if acc_empty.all():
            acc_out.copy_(out)
            acc_lse.copy_(lse)
            return
        if acc_empty.any():
            acc_out[acc_empty] = 0.0
    else:
        acc_out.masked_fill_(acc_empty.unsqueeze(-1), 0.0)
    lead = lse - acc_lse  # NaN where both are empty
    part_empty = torch.isneginf(lse)
    share = torch.sigmoid(lead).masked_fill_(part_empty, 0.0)  # exact for huge lse: only their difference is rounded
    gain = F.logsigmoid(lead.abs()).masked_fill_(part_empty, 0.0)  # -log(1 + exp(-|lead|))
    acc_out.lerp_(out, share.unsqueeze(-1))
    torch.sub(torch.maximum(acc_lse, lse), gain, out=acc_lse)


def merge_sinks_(acc: PartialAttention, sinks: Tensor) -> None:
    """Merge attention sinks in place: one more partial with `lse = sink` and `out = 0`.

    Call it once per query row, on whatever rank does the last merge: a sink merged once per shard is counted P times.

    Args:
        acc: changed in place; empty rows get `lse = sink` and keep `out = 0`.
        sinks: [H] logits in natural log, any floating dtype; -inf means no sink.
    """
    sink = sinks.to(device=acc.lse.device, dtype=acc.lse.dtype)  # [H], the same for every row
    empty = torch.isneginf(acc.lse)
    keep = torch.sigmoid(acc.lse - sink).masked_fill_(empty, 0.0)
    clean = _clean(acc.out, acc.lse)
    if clean is not acc.out:
        acc.out.copy_(clean)
    acc.out.mul_(keep.unsqueeze(-1))
    acc.lse.copy_(torch.logaddexp(acc.lse, sink.expand_as(acc.lse)))


def _clean(out: Tensor, lse: Tensor) -> Tensor:
    """Return `out` with 0 in the rows whose `lse` is -inf; on a CPU without a copy when there are none."""
    empty = torch.isneginf(lse)
    if out.device.type == "cpu" and not empty.any():
        return out
    return torch.where(empty.unsqueeze(-1), 0.0, out)
