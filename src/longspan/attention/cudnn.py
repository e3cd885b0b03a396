"""cuDNN's attention as shipped with PyTorch, for prefill. No GPU has run it here; a rank checks it before it starts.

Holds the kernel's edges. Must not know segments.
Read next: `longspan.attention.dense`, which calls it.

Note [Edges of cuDNN's kernel]
    `torch.ops.aten._scaled_dot_product_cudnn_attention` on [1, H, T, D] and [1, Hkv, S, D] returns `lse` [1, H, T, 1],
    natural log. Its causal mask is aligned top left, so it serves squares alone: keys before the square are a second
    call, and both are merged. It takes bfloat16 and float16, one width of keys and values, a multiple of 8 up to 128 on
    all GPUs; no softcap, and no window here.
    Source: pytorch/pytorch, aten/src/ATen/native/cudnn/MHA.cpp and transformers/cuda/sdp_utils.cpp.
"""

import torch
from torch import Tensor

from longspan.attention.dense import unsupported_by
from longspan.attention.partial import PartialAttention, merge_rows_
from longspan.kv.layout import KVSpec
from longspan.types import AttentionParams

MAX_WIDTH = 128

cudnn_attention = torch.ops.aten._scaled_dot_product_cudnn_attention
"""PyTorch's call of cuDNN; its public callers return no `lse`."""


class CudnnPrefill:
    """cuDNN's kernel as a `DenseKernel`. See Note [Edges of cuDNN's kernel]."""

    name = "cudnn"

    def unsupported(self, spec: KVSpec, params: AttentionParams) -> str | None:
        return unsupported_by(self.name, spec, params, MAX_WIDTH)

    def dense_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        assert softcap is None
        before = k.shape[1] - q.shape[0] if is_causal else 0  # keys that every query sees
        found = _call(q, k[:, before:], v[:, before:], is_causal=is_causal, scale=scale)
        if before:
            found = PartialAttention(found.out.float().contiguous(), found.lse)
            merge_rows_(found, 0, _call(q, k[:, :before], v[:, :before], is_causal=False, scale=scale))
        return found.out, found.lse


def _call(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> PartialAttention:
    """Call the kernel with queries [T, H, D], and keys and values [Hkv, S, D]; as many of both, if causal."""
    out, lse, *_ = cudnn_attention(
        q.transpose(0, 1)[None], k[None], v[None], None, True, 0.0, is_causal, False, scale=scale
    )
    num_heads, num_queries = q.shape[1], q.shape[0]
    # [1, H, T, D] to [T, H, D], and [1, H, T, 1] to [T, H]
    return PartialAttention(out[0].transpose(0, 1), lse.reshape(num_heads, num_queries).t().contiguous())
