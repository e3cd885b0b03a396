"""Store of new tokens' keys and values into their rows of the page pool, in one launch.

Holds the kernel and its launch. Must not know pages or requests.
Read next: `longspan.kv.pool`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.kv.pool import are_in_keys
from longspan.triton_kernels.launch import on_device


@triton.jit
def store_kernel(  # type: ignore[no-untyped-def]
    pool_k_ptr,
    pool_v_ptr,
    k_ptr,
    v_ptr,
    rows_ptr,
    pool_k_head_stride,
    pool_k_row_stride,
    pool_v_head_stride,
    pool_v_row_stride,
    k_head_stride,
    k_token_stride,
    v_head_stride,
    v_token_stride,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
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
    tl.store(pool_k_ptr + head * pool_k_head_stride + row * pool_k_row_stride + lanes, k, mask=is_k)
    tl.store(pool_v_ptr + head * pool_v_head_stride + row * pool_v_row_stride + lanes, v, mask=is_v)


def store(pool_k: Tensor, pool_v: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> None:
    """Write new tokens into a pool.

    Args:
        pool_k: [Hkv, pool rows, D], written.
        pool_v: [Hkv, pool rows, Dv], written, unless it is the first elements of `pool_k`, in the same memory.
        k: [Hkv, T, D], dtype of `pool_k`; contiguous in the last dimension, like the other three tensors.
        v: [Hkv, T, Dv].
        rows: [T] int32 or int64, the pool row of every token; a token with a negative row is not written.
    """
    num_heads, num_tokens, k_width = k.shape
    v_width = 0 if v.shape[2] < k_width and are_in_keys(pool_v, pool_k) else v.shape[2]
    assert rows.dtype in (torch.int32, torch.int64)
    assert rows.shape == (num_tokens,)
    assert k.stride(2) == v.stride(2) == pool_k.stride(2) == pool_v.stride(2) == 1
    if num_tokens == 0:
        return
    with on_device(k):
        store_kernel[(num_tokens, num_heads)](
            pool_k,
            pool_v,
            k,
            v,
            rows,
            pool_k.stride(0),
            pool_k.stride(1),
            pool_v.stride(0),
            pool_v.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            K_WIDTH=k_width,
            V_WIDTH=v_width,
            BLOCK=triton.next_power_of_2(max(k_width, v_width)),
            num_warps=1,
        )
