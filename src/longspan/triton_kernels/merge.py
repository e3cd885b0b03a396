"""Merge of several partials into one, with sinks, in one launch.

Holds the kernel and its launch. Must not know where partials come from.
Read next: `longspan.attention.partial`, Note [The merge law], which this computes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.triton_kernels.launch import on_device


@triton.jit
def merge_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    out_lse_ptr,
    part_ptr,
    part_lse_ptr,
    sinks_ptr,
    num_rows,
    part_stride,
    part_lse_stride,
    out_group_stride,
    out_lse_group_stride,
    group_rows,
    NUM_PARTS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Some rows; a row is a query and a head."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = rows < num_rows
    lanes = tl.arange(0, WIDTH_BLOCK)
    mask = is_row[:, None] & (lanes < WIDTH)[None, :]

    top = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
    for i in range(NUM_PARTS):
        top = tl.maximum(top, tl.load(part_lse_ptr + i * part_lse_stride + rows, mask=is_row, other=float("-inf")))
    if HAS_SINKS:
        sinks = tl.load(sinks_ptr + rows % NUM_HEADS, mask=is_row, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, sinks)
    base = tl.where(top == float("-inf"), 0.0, top)  # a row that is empty everywhere weighs 0, not NaN

    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    acc = tl.zeros([BLOCK_ROWS, WIDTH_BLOCK], dtype=tl.float32)
    for i in range(NUM_PARTS):
        lse = tl.load(part_lse_ptr + i * part_lse_stride + rows, mask=is_row, other=float("-inf"))
        weight = tl.exp(lse - base)
        part = tl.load(part_ptr + i * part_stride + rows[:, None] * WIDTH + lanes[None, :], mask=mask, other=0.0)
        # An empty row may hold anything: 0 * NaN is NaN.
        acc += tl.where((weight > 0.0)[:, None], part.to(tl.float32) * weight[:, None], 0.0)
        total += weight
    if HAS_SINKS:
        total += tl.exp(sinks - base)
    is_empty = total == 0.0
    acc = acc / tl.where(is_empty, 1.0, total)[:, None]
    lse = tl.where(is_empty, float("-inf"), base + tl.log(tl.where(is_empty, 1.0, total)))

    groups, places = rows // group_rows, rows % group_rows
    tl.store(
        out_ptr + groups[:, None] * out_group_stride + places[:, None] * WIDTH + lanes[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=mask,
    )
    tl.store(out_lse_ptr + groups * out_lse_group_stride + places, lse, mask=is_row)


def merge(parts: Tensor, part_lses: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None = None) -> None:
    """Attention over the union of disjoint key sets.

    Args:
        parts: [n, T, H, Dv] of any floating dtype; each [T, H, Dv] contiguous. NaN in empty rows is harmless.
        part_lses: [n, T, H] float32, natural log, -inf for empty rows; each [T, H] contiguous.
        out: [T, H, Dv], or [g, T / g, H, Dv] whose groups may lie apart, of any floating dtype: written; 0 in rows that
            are empty everywhere.
        lse: [T, H] or [g, T / g, H] float32, likewise; -inf in such rows.
        sinks: [H] logits in natural log, merged once more, or None.
    """
    num_parts, num_queries, num_heads, width = parts.shape
    num_groups = out.shape[0] if out.dim() == 4 else 1
    num_rows = num_queries * num_heads
    assert out.numel() == num_rows * width
    assert lse.numel() == num_rows
    assert lse.dtype == part_lses.dtype == torch.float32
    if num_rows == 0:
        return
    width_block = triton.next_power_of_2(width)
    block_rows = max(1, 2048 // width_block)
    with on_device(parts):
        merge_kernel[(triton.cdiv(num_rows, block_rows),)](
            out,
            lse,
            parts,
            part_lses,
            lse if sinks is None else sinks,
            num_rows,
            parts.stride(0),
            part_lses.stride(0),
            out.stride(0) if num_groups > 1 else 0,
            lse.stride(0) if num_groups > 1 else 0,
            num_rows // num_groups,
            NUM_PARTS=num_parts,
            NUM_HEADS=num_heads,
            WIDTH=width,
            WIDTH_BLOCK=width_block,
            BLOCK_ROWS=block_rows,
            HAS_SINKS=sinks is not None,
            num_warps=4,
        )
