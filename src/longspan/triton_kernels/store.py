"""Store of new tokens' keys and values into their rows of the page pool, rounded if need be, in one launch.

Holds the kernel and its launch. Must not know pages or requests.
Read next: `longspan.kv.pool`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.kv.pool import are_in_keys
from longspan.triton_kernels.launch import on_device
from longspan.triton_kernels.stored import INT8, narrow, row_scale, scales_of, stored_kind


@triton.jit
def store_kernel(  # type: ignore[no-untyped-def]
    pool_k_ptr,
    pool_v_ptr,
    pool_k_scales_ptr,
    pool_v_scales_ptr,
    k_ptr,
    v_ptr,
    rows_ptr,
    pool_k_head_stride,
    pool_k_row_stride,
    pool_v_head_stride,
    pool_v_row_stride,
    pool_k_scale_head_stride,
    pool_k_scale_stride,
    pool_v_scale_head_stride,
    pool_v_scale_stride,
    k_head_stride,
    k_token_stride,
    v_head_stride,
    v_token_stride,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STORED: tl.constexpr,
):
    """Store one token's K and V of one KV head."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + token).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    is_k = lanes < tl.where(row >= 0, K_WIDTH, 0)  # tokens that only fill up a fixed shape go nowhere
    is_v = lanes < tl.where(row >= 0, V_WIDTH, 0)
    k = tl.load(k_ptr + head * k_head_stride + token * k_token_stride + lanes, mask=is_k, other=0.0)
    v = tl.load(v_ptr + head * v_head_stride + token * v_token_stride + lanes, mask=is_v, other=0.0)
    k_at, v_at = (
        head * pool_k_head_stride + row * pool_k_row_stride,
        head * pool_v_head_stride + row * pool_v_row_stride,
    )
    if STORED >= INT8:
        k = k.to(tl.float32)
        k_scale = row_scale(k, STORED)
        tl.store(
            pool_k_scales_ptr + head * pool_k_scale_head_stride + row * pool_k_scale_stride, k_scale, mask=row >= 0
        )
        k = narrow(k, k_scale, STORED)
        if V_WIDTH > 0:
            v = v.to(tl.float32)
            v_scale = row_scale(v, STORED)
            scales_at = head * pool_v_scale_head_stride + row * pool_v_scale_stride
            tl.store(pool_v_scales_ptr + scales_at, v_scale, mask=row >= 0)
            v = narrow(v, v_scale, STORED)
    tl.store(pool_k_ptr + k_at + lanes, k, mask=is_k)
    if V_WIDTH > 0:
        tl.store(pool_v_ptr + v_at + lanes, v, mask=is_v)


def store(pool_k: Tensor, pool_v: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> None:
    """Write new tokens into a pool.

    Args:
        pool_k: [Hkv, pool rows, stored D] as `longspan.kv.stored` describes rows, written.
        pool_v: [Hkv, pool rows, stored Dv], written, unless it is the first elements of `pool_k`, in the same memory.
        k: [Hkv, T, D], dtype of `pool_k` if that has no scales; contiguous in the last dimension, like the other three.
        v: [Hkv, T, Dv].
        rows: [T] int32 or int64, the pool row of every token; a token with a negative row is not written.
    """
    num_heads, num_tokens, k_width = k.shape
    v_width = 0 if v.shape[2] < k_width and are_in_keys(pool_v, pool_k) else v.shape[2]
    k_scales, v_scales = scales_of(pool_k), pool_k if v_width == 0 else scales_of(pool_v)
    assert rows.dtype in (torch.int32, torch.int64)
    assert rows.shape == (num_tokens,)
    assert k.stride(2) == v.stride(2) == pool_k.stride(2) == pool_v.stride(2) == 1
    if num_tokens == 0:
        return
    with on_device(k):
        store_kernel[(num_tokens, num_heads)](
            pool_k,
            pool_v,
            k_scales,
            v_scales,
            k,
            v,
            rows,
            pool_k.stride(0),
            pool_k.stride(1),
            pool_v.stride(0),
            pool_v.stride(1),
            k_scales.stride(0),
            k_scales.stride(1),
            v_scales.stride(0),
            v_scales.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            K_WIDTH=k_width,
            V_WIDTH=v_width,
            BLOCK=triton.next_power_of_2(max(k_width, v_width)),
            STORED=stored_kind(pool_k, k.dtype),
            num_warps=1,
        )
