"""FlashAttention as shipped with PyTorch: the backend where Triton is not installed, and a cross-check where it is.

Holds the kernel's edges. Must not know segments.
Read next: `longspan.attention.dense`, which calls it.

Note [Edges of PyTorch's flash kernel]
    `torch.ops.aten._flash_attention_forward` on [1, T, H, D] returns `lse` [1, H, T], natural log. Its causal mask is
    aligned bottom right. It takes bfloat16 and float16, one width of keys and values up to 256, fewer KV heads than
    query heads, no softcap; rows without a key come back with `lse` +inf, and no call here has one.
"""

import torch
from torch import Tensor

from longspan.attention.dense import unsupported_by
from longspan.kv.layout import KVSpec
from longspan.types import AttentionParams

MAX_WIDTH = 256

flash_attention_forward = torch.ops.aten._flash_attention_forward
"""PyTorch's kernel; it has no public name, and its public callers return no `lse`."""


class TorchFlash:
    """PyTorch's flash kernel as a `DenseKernel`. See Note [Edges of PyTorch's flash kernel]."""

    name = "torch"

    def unsupported(self, spec: KVSpec, params: AttentionParams) -> str | None:
        return unsupported_by(self.name, spec, params, MAX_WIDTH)

    def dense_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        assert softcap is None
        out, lse, *_ = flash_attention_forward(
            q[None],
            k.transpose(0, 1)[None],  # [1, S, Hkv, D]
            v.transpose(0, 1)[None],
            None,
            None,
            q.shape[0],
            k.shape[1],
            0.0,
            is_causal,
            False,
            scale=scale,
        )
        return out[0], lse[0].transpose(0, 1)  # [T, H, D], [H, T] -> [T, H]
