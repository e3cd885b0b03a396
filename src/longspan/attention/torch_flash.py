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

from longspan.kv.layout import KVSpec
from longspan.types import AttentionParams

MAX_WIDTH = 256

flash_attention_forward = torch.ops.aten._flash_attention_forward
"""PyTorch's kernel; it has no public name, and its public callers return no `lse`."""


class TorchFlash:
    """PyTorch's flash kernel as a `DenseKernel`. See Note [Edges of PyTorch's flash kernel]."""

    name = "torch"

    def unsupported(self, spec: KVSpec, params: AttentionParams) -> str | None:
        if spec.compute_dtype not in ("bfloat16", "float16"):
            return f"dtype: got {spec.compute_dtype}, the torch backend takes bfloat16 and float16"
        k_width, v_width = spec.layout.k_width, spec.layout.v_width
        if k_width != v_width or k_width > MAX_WIDTH or k_width % 8:
            return (
                f"head size: got {k_width} of keys and {v_width} of values, the torch backend takes one "
                f"size for both, a multiple of 8 up to {MAX_WIDTH}"
            )
        if params.softcap is not None:
            return f"softcap: got {params.softcap}, the torch backend takes none"
        return None

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
