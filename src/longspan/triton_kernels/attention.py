"""Attention of packed queries over keys in a page pool, in one launch, for decode and prefill.

Holds the kernel and its launch. Must not know segments, pages, ranks or how tables are made.
Read next: `longspan.attention.tiles`, which makes the tables; `longspan.triton_kernels.merge`, which merges splits.

Note [Tables]
    Queries are rows of `q` [T, H, D]. A query tile is a run of them that sees the same keys, up to the mask; all of its
    heads that share a KV head are computed together. Keys are cut into key tiles of at most BLOCK_N consecutive rows of
    the pool. Two int32 tables say which query tiles meet which key tiles, by global position, so that stripes, holes
    and pages in any order make no difference to the kernel:

        key_tiles    [n, 4]  first row, rows, position of the first key, visibility (0 all, 1 causal, 2 band)
        query_tiles  [m, 7]  first row, rows, position of the first query, a, b, c, d: key tiles [a, d) are looked at;
                             those of [b, c) are whole and seen by every query of the tile, so need no mask

    Where values are the first elements of their keys, in the same memory (VALUES_IN_KEYS, latent attention), a key tile
    is read once: its values, and the rest of its keys. A KV head with more query heads than fit a program is computed
    by several (HEAD_TILES).

    A split is an equal share of the key tiles of every query tile, found in the kernel: neither grid nor arguments
    depend on the number of keys, as CUDA graphs require. Every split writes a partial of its own.
    Keys and values that are stored smaller than queries are widened when they are loaded; their scales multiply scores
    and weights, of which there are fewer than elements (`longspan.triton_kernels.stored`).
    Source: split-KV decoding, and the online softmax of 2307.08691, in base 2; `lse` leaves in base e.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.kv.pool import are_in_keys
from longspan.kv.stored import row_width
from longspan.triton_kernels.launch import INTERPRETED, on_device, shared_bytes
from longspan.triton_kernels.stored import FP8, FP8_FACTOR, INT8, scales_of, stored_kind, widen

LOG2_E = 1.4426950408889634

MIN_WIDTH, MAX_WIDTH = 16, 256
"""Smallest and largest head size; sizes that are not powers of two waste lanes."""
MAX_LATENT_WIDTH, MAX_REST_WIDTH = 512, 64
"""Largest size of values that are the first elements of keys, and of what these have beside them."""


@triton.jit
def _load_rows(  # type: ignore[no-untyped-def]
    offsets,
    are_read,
    lanes,
    dtype: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    STORED: tl.constexpr,
):
    """Load a tile [rows, BLOCK] of keys or values, 0 from WIDTH on. Rows that are not read may hold NaN."""
    if MASKED:
        x = tl.load(offsets, mask=are_read[:, None] & (lanes < WIDTH)[None, :], other=0)
    elif WIDTH == BLOCK:
        x = tl.load(offsets)
    else:
        x = tl.load(offsets, mask=(lanes < WIDTH)[None, :], other=0)
    return widen(x, dtype, STORED)


@triton.jit
def _load_scales(offsets, are_read, MASKED: tl.constexpr, STORED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load the scales [rows] of stored rows, times what `widen` leaves out."""
    scales = tl.load(offsets, mask=are_read, other=0.0) if MASKED else tl.load(offsets)
    return scales * FP8_FACTOR if STORED == FP8 else scales


@triton.jit
def _over_key_tiles(  # type: ignore[no-untyped-def]
    acc,
    total,
    top,
    q,
    q_rest,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    key_tiles,
    k_row_stride,
    v_row_stride,
    k_scale_stride,
    v_scale_stride,
    positions,
    first_tile,
    num_tiles,
    scale_log2,
    softcap,
    window,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    STORED: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    VALUES_IN_KEYS: tl.constexpr,
):
    """Add some key tiles to a running softmax. `top` is in base 2, and -inf as long as no key was seen."""
    # What is read as `k` is the rest of a key behind its value, where that is a part of it.
    k_start: tl.constexpr = V_WIDTH if VALUES_IN_KEYS else 0
    k_width: tl.constexpr = K_WIDTH - k_start
    columns = tl.arange(0, BLOCK_N)
    k_lanes = tl.arange(0, K_BLOCK)
    v_lanes = tl.arange(0, V_BLOCK)
    for i in tl.range(0, num_tiles, num_stages=NUM_STAGES):
        tile = key_tiles + (first_tile + i) * 4
        rows = tl.load(tile).to(tl.int64) + columns
        k_offsets = k_ptr + rows[:, None] * k_row_stride + (k_start + k_lanes)[None, :]
        v_offsets = v_ptr + rows[:, None] * v_row_stride + v_lanes[None, :]
        count = BLOCK_N
        if MASKED:
            count = tl.load(tile + 1)
        are_read = columns < count
        k = _load_rows(k_offsets, are_read, k_lanes, q.dtype, k_width, K_BLOCK, MASKED, STORED)
        if VALUES_IN_KEYS:
            v = _load_rows(v_offsets, are_read, v_lanes, q.dtype, V_WIDTH, V_BLOCK, MASKED, STORED)
            scores = tl.dot(q, tl.trans(v), input_precision=PRECISION)
            scores = tl.dot(q_rest, tl.trans(k), scores, input_precision=PRECISION)
        else:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N] float32
        if STORED >= INT8:
            k_scales = _load_scales(k_scales_ptr + rows * k_scale_stride, are_read, MASKED, STORED)
            scores = scores * k_scales[None, :]
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (1 + exp(2 x)); exact at both ends, where exp is 0 or infinite
            capped = 2.0 / (1.0 + tl.exp2(scores * (scale_log2 * 2.0 / softcap)))
            scores = (softcap * 1.4426950408889634) * (1.0 - capped)
        else:
            scores = scores * scale_log2
        if MASKED:
            seen = tl.load(tile + 3)
            distances = positions[:, None] - (tl.load(tile + 2) + columns)[None, :]
            visible = (distances >= 0) | (seen == 0)
            visible = visible & ((distances < window) | (seen != 2))
            visible = visible & are_read[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        if MASKED:  # a row may have seen nothing yet: -inf - -inf is NaN
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        else:
            base = new_top
        weights = tl.exp2(scores - base[:, None])
        keep = tl.exp2(top - base)
        total = total * keep + tl.sum(weights, 1)
        if not VALUES_IN_KEYS:
            v = _load_rows(v_offsets, are_read, v_lanes, q.dtype, V_WIDTH, V_BLOCK, MASKED, STORED)
        if STORED >= INT8:
            if VALUES_IN_KEYS:
                weights = weights * k_scales[None, :]
            else:
                v_scales = _load_scales(v_scales_ptr + rows * v_scale_stride, are_read, MASKED, STORED)
                weights = weights * v_scales[None, :]
        acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["num_splits", "lse_split_stride", "window"])
def attention_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    query_tiles,
    key_tiles,
    scale_log2,
    softcap,
    window,
    num_splits,
    q_row_stride,
    q_head_stride,
    k_head_stride,
    k_row_stride,
    v_head_stride,
    v_row_stride,
    k_scale_head_stride,
    k_scale_stride,
    v_scale_head_stride,
    v_scale_stride,
    out_split_stride,
    out_row_stride,
    out_head_stride,
    lse_split_stride,
    lse_row_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_TILES: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    STORED: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    VALUES_IN_KEYS: tl.constexpr,
):
    """Compute one query tile, GROUP_SIZE heads of a KV head and split. See Note [Tables]."""
    program = tl.program_id(0)
    split = program % num_splits
    head_tile = (program // num_splits) % (NUM_KV_HEADS * HEAD_TILES)
    tile = query_tiles + (program // (num_splits * NUM_KV_HEADS * HEAD_TILES)) * 7
    first_row = tl.load(tile).to(tl.int64)
    num_rows = tl.load(tile + 1)
    position = tl.load(tile + 2)
    a = tl.load(tile + 3)
    b = tl.load(tile + 4)
    c = tl.load(tile + 5)
    d = tl.load(tile + 6)

    lanes_m = tl.arange(0, BLOCK_M)
    queries = lanes_m // GROUP_SIZE  # the heads of a query are neighbours
    heads = head_tile * GROUP_SIZE + lanes_m % GROUP_SIZE
    is_row = queries < num_rows
    rows = first_row + queries
    k_lanes = tl.arange(0, K_BLOCK)
    q_offsets = q_ptr + rows[:, None] * q_row_stride + heads[:, None] * q_head_stride
    if VALUES_IN_KEYS:
        v_lanes = tl.arange(0, V_BLOCK)
        q = tl.load(q_offsets + v_lanes[None, :], mask=is_row[:, None] & (v_lanes < V_WIDTH)[None, :], other=0.0)
        is_rest = is_row[:, None] & (k_lanes < K_WIDTH - V_WIDTH)[None, :]
        q_rest = tl.load(q_offsets + V_WIDTH + k_lanes[None, :], mask=is_rest, other=0.0)
    else:
        q = tl.load(q_offsets + k_lanes[None, :], mask=is_row[:, None] & (k_lanes < K_WIDTH)[None, :], other=0.0)
        q_rest = q
    if UPCAST:
        q = q.to(tl.float32)
        q_rest = q_rest.to(tl.float32)
    kv_head = head_tile // HEAD_TILES
    if STORED >= INT8:  # strides in units of 4 elements, so that the compiler knows how rows are aligned
        k_row_stride = k_row_stride * 4
        v_row_stride = v_row_stride * 4
        k_head_stride = k_head_stride * 4
        v_head_stride = v_head_stride * 4
        k_scales_ptr += kv_head.to(tl.int64) * k_scale_head_stride
        v_scales_ptr += kv_head.to(tl.int64) * v_scale_head_stride
    k_ptr += kv_head.to(tl.int64) * k_head_stride
    v_ptr += kv_head.to(tl.int64) * v_head_stride
    positions = position + queries

    acc = tl.zeros([BLOCK_M, V_BLOCK], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)

    # This split's share of [a, d), in 64 bits: tiles times splits may pass 2 ** 31.
    share = (d - a).to(tl.int64)
    begin = a + (share * split // num_splits).to(tl.int32)
    end = a + (share * (split + 1) // num_splits).to(tl.int32)
    acc, total, top = _over_key_tiles(
        acc, total, top, q, q_rest, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, key_tiles, k_row_stride, v_row_stride,
        k_scale_stride, v_scale_stride, positions,
        tl.maximum(begin, b), tl.minimum(end, c) - tl.maximum(begin, b), scale_log2, softcap, window,
        K_WIDTH, V_WIDTH, K_BLOCK, V_BLOCK, BLOCK_N, HAS_SOFTCAP, False, STORED, PRECISION, NUM_STAGES,
        VALUES_IN_KEYS,
    )  # fmt: skip
    acc, total, top = _over_key_tiles(
        acc, total, top, q, q_rest, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, key_tiles, k_row_stride, v_row_stride,
        k_scale_stride, v_scale_stride, positions,
        begin, tl.minimum(end, b) - begin, scale_log2, softcap, window,
        K_WIDTH, V_WIDTH, K_BLOCK, V_BLOCK, BLOCK_N, HAS_SOFTCAP, True, STORED, PRECISION, 1, VALUES_IN_KEYS,
    )  # fmt: skip
    acc, total, top = _over_key_tiles(
        acc, total, top, q, q_rest, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, key_tiles, k_row_stride, v_row_stride,
        k_scale_stride, v_scale_stride, positions,
        tl.maximum(begin, c), end - tl.maximum(begin, c), scale_log2, softcap, window,
        K_WIDTH, V_WIDTH, K_BLOCK, V_BLOCK, BLOCK_N, HAS_SOFTCAP, True, STORED, PRECISION, 1, VALUES_IN_KEYS,
    )  # fmt: skip

    is_empty = total == 0.0
    acc = acc / tl.where(is_empty, 1.0, total)[:, None]
    lse = tl.where(is_empty, float("-inf"), top + tl.log2(tl.where(is_empty, 1.0, total))) * 0.6931471805599453
    v_lanes = tl.arange(0, V_BLOCK)
    tl.store(
        out_ptr
        + split.to(tl.int64) * out_split_stride
        + rows[:, None] * out_row_stride
        + heads[:, None] * out_head_stride
        + v_lanes[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & (v_lanes < V_WIDTH)[None, :],
    )
    tl.store(lse_ptr + split.to(tl.int64) * lse_split_stride + rows * lse_row_stride + heads, lse, mask=is_row)


class Tiling(NamedTuple):
    """Sizes that fit into registers and shared memory; see docs/decisions/0021-triton-kernels.md."""

    most_rows: int
    """Most rows of a query tile: its queries times the heads that share a KV head."""
    keys: int
    """Most keys of a key tile; page sizes that are multiples of it avoid shorter tiles."""
    num_stages: int
    """Stages of the load pipeline. Triton gives the table's load one, and one more before the keys that it leads to:
    with 5, more keys are on their way while a tile is computed; with 3 or 4 none are, as the compiled waits show."""


_TILINGS: dict[tuple[int, bool], Sequence[tuple[int, Tiling]]] = {
    (128, False): [(0, Tiling(128, 64, 5))],
    (256, False): [(229_384, Tiling(64, 64, 5)), (131_080, Tiling(64, 32, 5)), (0, Tiling(32, 32, 5))],
    # Of latents; 64 rows of 512 sums spill.
    (MAX_LATENT_WIDTH + MAX_REST_WIDTH, False): [
        (188_424, Tiling(32, 64, 5)),
        (112_648, Tiling(32, 32, 5)),
        (0, Tiling(16, 32, 5)),
    ],
    (64, True): [(0, Tiling(64, 32, 2))],
    (128, True): [(0, Tiling(16, 32, 1))],
    (256, True): [(0, Tiling(16, 16, 1))],
    (MAX_LATENT_WIDTH + MAX_REST_WIDTH, True): [(0, Tiling(16, 16, 1))],
}
"""By largest head size, and whether its dtype is float32: sizes in order of preference, each with the bytes of shared
memory from which on it fits. The last one fits the 101,376 bytes of compute capability 8.6, 8.9 and 12.0, the least
that a GPU has here. `tests/triton_kernels/test_compile_kernels.py` holds them to it."""


def tiling(width: int, dtype: torch.dtype, shared_bytes: int) -> Tiling:
    """Sizes for some heads on a GPU.

    Args:
        width: larger of the head sizes of keys and values.
        dtype: dtype of queries, keys and values.
        shared_bytes: shared memory of a block (`longspan.triton_kernels.launch.shared_bytes`).
    """
    is_float32 = dtype is torch.float32
    largest = min(most for most, is_wide in _TILINGS if is_wide == is_float32 and width <= most)
    return next(sizes for least, sizes in _TILINGS[largest, is_float32] if least <= shared_bytes)


def head_tiles(group_size: int, most_rows: int) -> int:
    """Number of programs that share the query heads of one KV head: 1 unless these are more than `most_rows`."""
    return next(n for n in range(1, group_size + 1) if group_size % n == 0 and group_size // n <= most_rows)


def most_queries(group_size: int, num_queries: int, most_rows: int) -> int:
    """Most queries of a tile, whose rows are the queries times the heads of a group.

    Args:
        group_size: query heads of a program.
        num_queries: length of the longest run of queries.
        most_rows: `Tiling.most_rows`.
    """
    rows: int = min(most_rows, triton.next_power_of_2(group_size * num_queries))
    return max(1, rows // group_size)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    queries_per_tile: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> None:
    """Compute attention of all query tiles, with a partial per split of the keys.

    Args:
        q: [T, H, D] bfloat16, float16 or float32; contiguous in the last dimension.
        k: [Hkv, rows, stored D], dtype of `q` or as `longspan.kv.stored` has rows; contiguous in the last dimension.
        v: [Hkv, rows, stored Dv], stored as `k`; contiguous in the last dimension; may be the first elements of `k`.
        query_tiles: [m, 7] int32, see Note [Tables]; at most `queries_per_tile` queries each.
        key_tiles: [n, 4] int32, see Note [Tables]; at most `Tiling.keys` keys each on this GPU.
        out: [splits, T, H, Dv] float32, written in the rows of query tiles: 0 where a split saw no key.
        lse: [splits, T, H] float32, natural log, written in the rows of query tiles: -inf where a split saw no key.
        queries_per_tile: most queries of a tile; times the query heads of a program and rounded up to a power of two,
            rows of a program.
        scale: factor of the scores.
        softcap: bound of the scores, or None.
        window: window in tokens, for BAND key tiles, or None.
    """
    num_splits, _, num_heads, v_width = out.shape
    num_kv_heads, k_width, stored = k.shape[0], row_width(k), stored_kind(k, q.dtype)
    width, values_in_keys = max(k_width, v_width), v_width < k_width and are_in_keys(v, k)
    k_scales, v_scales = scales_of(k), k if values_in_keys else scales_of(v)
    unit = 4 if stored >= INT8.value else 1
    sizes = tiling(width, q.dtype, shared_bytes(q.device))
    tiles = head_tiles(num_heads // num_kv_heads, sizes.most_rows)
    group_size = num_heads // (num_kv_heads * tiles)
    assert q.stride(2) == k.stride(2) == v.stride(2) == out.stride(3) == lse.stride(2) == 1
    assert query_tiles.dtype == key_tiles.dtype == torch.int32
    if query_tiles.shape[0] == 0:
        return
    k_block, v_block = blocks(k_width, v_width, values_in_keys=values_in_keys)
    with on_device(q):
        attention_kernel[(query_tiles.shape[0] * num_kv_heads * tiles * num_splits,)](
            out,
            lse,
            q,
            k,
            v,
            k_scales,
            v_scales,
            query_tiles,
            key_tiles,
            scale * LOG2_E,
            1.0 if softcap is None else softcap,
            0 if window is None else window,
            num_splits,
            q.stride(0),
            q.stride(1),
            k.stride(0) // unit,
            k.stride(1) // unit,
            v.stride(0) // unit,
            v.stride(1) // unit,
            k_scales.stride(0),
            k_scales.stride(1),
            v_scales.stride(0),
            v_scales.stride(1),
            out.stride(0),
            out.stride(1),
            out.stride(2),
            lse.stride(0),
            lse.stride(1),
            NUM_KV_HEADS=num_kv_heads,
            GROUP_SIZE=group_size,
            HEAD_TILES=tiles,
            K_WIDTH=k_width,
            V_WIDTH=v_width,
            K_BLOCK=k_block,
            V_BLOCK=v_block,
            HAS_SOFTCAP=softcap is not None,
            UPCAST=INTERPRETED and q.dtype is not torch.float32,
            STORED=stored,
            VALUES_IN_KEYS=values_in_keys,
            **compile_options(queries_per_tile, group_size, width, q.dtype, sizes),
        )


def blocks(k_width: int, v_width: int, *, values_in_keys: bool) -> tuple[int, int]:
    """Padded sizes of a tile's keys, or of what they have beside values that lie in them, and of its values."""
    rest = max(MIN_WIDTH, k_width - v_width) if values_in_keys else k_width
    return triton.next_power_of_2(rest), triton.next_power_of_2(v_width)


def compile_options(
    queries_per_tile: int, group_size: int, width: int, dtype: torch.dtype, sizes: Tiling
) -> dict[str, Any]:
    """Compile-time options of a launch: block sizes, precision, stages and warps.

    Args:
        queries_per_tile: most queries of a query tile.
        group_size: query heads of a program.
        width: larger of the head sizes of keys and values.
        dtype: dtype of queries, keys and values.
        sizes: sizes for these heads on the GPU.
    """
    rows = max(16, triton.next_power_of_2(queries_per_tile * group_size))
    thrice = "tf32x3" if width <= MAX_WIDTH else "ieee"  # of latents it takes more registers than there are
    return {
        "BLOCK_M": rows,
        "BLOCK_N": sizes.keys,
        "PRECISION": thrice if dtype is torch.float32 else "tf32",  # says nothing for 16 bits
        "NUM_STAGES": sizes.num_stages,
        "num_warps": 8 if rows >= 128 or width * dtype.itemsize * rows >= 2**14 else 4,
    }
