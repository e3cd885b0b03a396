"""Merge of several partials into one, with sinks, or of one into another, in one launch.

Holds the kernels and their launches. Must not know where partials come from.
Read next: `longspan.attention.partial`, Note [The merge law], which this computes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.triton_kernels.launch import on_device

MIN_PROGRAMS = {"cuda": 256, "cpu": 1}
"""Programs that a merge is cut into at least, if it has as many rows, by kind of device: a decode has few rows of many
partials, and must not leave most of a GPU idle. In the interpreter every program takes milliseconds."""

_MOST_ELEMENTS = 2048
"""Most elements that a program holds at a time."""


class _Blocks(NamedTuple):
    """Sizes of one program."""

    width: int
    """Padded width of a row."""
    rows: int
    parts: int
    """Partials of these rows that are loaded together."""


def _blocks(num_rows: int, num_parts: int, width: int, device: torch.device) -> _Blocks:
    width_block = triton.next_power_of_2(width)
    share = max(1, num_rows // MIN_PROGRAMS[device.type])
    rows = min(max(1, _MOST_ELEMENTS // width_block), 1 << (share.bit_length() - 1))
    parts = min(triton.next_power_of_2(num_parts), max(1, _MOST_ELEMENTS // (rows * width_block)))
    return _Blocks(width_block, rows, parts)


@triton.jit(do_not_specialize=["num_rows", "num_parts", "part_lse_stride", "out_lse_group_stride", "group_rows"])
def merge_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    out_lse_ptr,
    part_ptr,
    part_lse_ptr,
    sinks_ptr,
    num_rows,
    num_parts,
    part_stride,
    part_lse_stride,
    out_group_stride,
    out_lse_group_stride,
    group_rows,
    NUM_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Merge the rows of one program, BLOCK_PARTS partials at a time; a row is a query and a head."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = rows < num_rows
    lanes = tl.arange(0, WIDTH_BLOCK)
    mask = is_row[:, None] & (lanes < WIDTH)[None, :]

    top = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
    for first in range(0, num_parts, BLOCK_PARTS):
        parts = first + tl.arange(0, BLOCK_PARTS).to(tl.int64)
        lse_offsets = parts[None, :] * part_lse_stride + rows[:, None]
        is_lse = is_row[:, None] & (parts < num_parts)[None, :]
        top = tl.maximum(top, tl.max(tl.load(part_lse_ptr + lse_offsets, mask=is_lse, other=float("-inf")), 1))
    if HAS_SINKS:
        sinks = tl.load(sinks_ptr + rows % NUM_HEADS, mask=is_row, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, sinks)
    base = tl.where(top == float("-inf"), 0.0, top)  # a row that is empty everywhere weighs 0, not NaN

    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    acc = tl.zeros([BLOCK_ROWS, WIDTH_BLOCK], dtype=tl.float32)
    for first in range(0, num_parts, BLOCK_PARTS):
        parts = first + tl.arange(0, BLOCK_PARTS).to(tl.int64)
        lse_offsets = parts[None, :] * part_lse_stride + rows[:, None]
        is_lse = is_row[:, None] & (parts < num_parts)[None, :]
        lses = tl.load(part_lse_ptr + lse_offsets, mask=is_lse, other=float("-inf"))
        weights = tl.exp(lses - base[:, None])  # [BLOCK_ROWS, BLOCK_PARTS]
        offsets = parts[None, :, None] * part_stride + rows[:, None, None] * WIDTH + lanes[None, None, :]
        # An empty row may hold anything: it is not loaded, as 0 * NaN is NaN.
        is_read = (weights > 0.0)[:, :, None] & (lanes < WIDTH)[None, None, :]
        part = tl.load(part_ptr + offsets, mask=is_read, other=0.0).to(tl.float32)
        acc += tl.sum(part * weights[:, :, None], 1)
        total += tl.sum(weights, 1)
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
    """Merge partials over disjoint key sets into attention over their union.

    Args:
        parts: [n, T, H, Dv] of any floating dtype; each [T, H, Dv] contiguous. NaN in empty rows is harmless.
        part_lses: [n, T, H] float32, natural log, -inf for empty rows; each [T, H] contiguous.
        out: [T, H, Dv], or [g, T / g, H, Dv] whose groups may lie apart, of any floating dtype: written; 0 in rows that
            are empty everywhere.
        lse: [T, H], or [g, T / g, H] whose groups may lie apart, grouped as `out`, float32: written; -inf in rows that
            are empty everywhere.
        sinks: [H] sink logits in natural log, merged once into every row, or None.
    """
    num_parts, num_queries, num_heads, width = parts.shape
    num_groups = out.shape[0] if out.dim() == 4 else 1
    num_rows = num_queries * num_heads
    assert out.numel() == num_rows * width
    assert out.shape[:-1] == lse.shape, "the groups of both lie apart, or of neither"
    assert lse.dtype == part_lses.dtype == torch.float32
    if num_rows == 0:
        return
    blocks = _blocks(num_rows, num_parts, width, parts.device)
    with on_device(parts):
        merge_kernel[(triton.cdiv(num_rows, blocks.rows),)](
            out,
            lse,
            parts,
            part_lses,
            lse if sinks is None else sinks,
            num_rows,
            num_parts,
            parts.stride(0),
            part_lses.stride(0),
            out.stride(0) if num_groups > 1 else 0,
            lse.stride(0) if num_groups > 1 else 0,
            num_rows // num_groups,
            NUM_HEADS=num_heads,
            WIDTH=width,
            WIDTH_BLOCK=blocks.width,
            BLOCK_ROWS=blocks.rows,
            BLOCK_PARTS=blocks.parts,
            HAS_SINKS=sinks is not None,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["num_rows"])
def accumulate_kernel(  # type: ignore[no-untyped-def]
    acc_ptr,
    acc_lse_ptr,
    part_ptr,
    part_lse_ptr,
    num_rows,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Merge the rows of one program; a row is a query and a head."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = rows < num_rows
    lanes = tl.arange(0, WIDTH_BLOCK)
    mask = is_row[:, None] & (lanes < WIDTH)[None, :]
    places = rows[:, None] * WIDTH + lanes[None, :]
    acc_lse = tl.load(acc_lse_ptr + rows, mask=is_row, other=float("-inf"))
    part_lse = tl.load(part_lse_ptr + rows, mask=is_row, other=float("-inf"))
    top = tl.maximum(acc_lse, part_lse)
    base = tl.where(top == float("-inf"), 0.0, top)
    acc_weight, part_weight = tl.exp(acc_lse - base), tl.exp(part_lse - base)
    total = acc_weight + part_weight
    divisor = tl.where(total == 0.0, 1.0, total)
    acc = tl.load(acc_ptr + places, mask=mask, other=0.0)
    part = tl.load(part_ptr + places, mask=mask, other=0.0).to(tl.float32)
    merged = tl.where((acc_weight > 0.0)[:, None], acc * acc_weight[:, None], 0.0)
    merged += tl.where((part_weight > 0.0)[:, None], part * part_weight[:, None], 0.0)
    tl.store(acc_ptr + places, merged / divisor[:, None], mask=mask)
    lse = tl.where(total == 0.0, float("-inf"), base + tl.log(divisor))
    tl.store(acc_lse_ptr + rows, lse, mask=is_row)


def accumulate_(acc_out: Tensor, acc_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge a partial into another one, in place, in one pass.

    Args:
        acc_out: [T, H, Dv] float32, contiguous. NaN in empty rows is harmless, here and in `out`.
        acc_lse: [T, H] float32, contiguous.
        out: [T, H, Dv] of any floating dtype, contiguous.
        lse: [T, H] float32, contiguous.
    """
    num_rows, width = acc_lse.numel(), acc_out.shape[2]
    assert all(tensor.is_contiguous() for tensor in (acc_out, acc_lse, out, lse))
    assert acc_out.dtype == acc_lse.dtype == lse.dtype == torch.float32
    assert out.shape == acc_out.shape
    if num_rows == 0:
        return
    blocks = _blocks(num_rows, 1, width, acc_out.device)
    with on_device(acc_out):
        accumulate_kernel[(triton.cdiv(num_rows, blocks.rows),)](
            acc_out,
            acc_lse,
            out,
            lse,
            num_rows,
            WIDTH=width,
            WIDTH_BLOCK=blocks.width,
            BLOCK_ROWS=blocks.rows,
            num_warps=4,
        )
