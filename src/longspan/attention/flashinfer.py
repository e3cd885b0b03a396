"""FlashInfer's prefill kernels: on Hopper its template of FlashAttention-3.

Holds the library's edges; the only file that imports it. Must not know segments.
Read next: `longspan.attention.dense`, which calls it.

Note [Edges of FlashInfer's prefill kernel]
    `single_prefill_with_kv_cache` with `kv_layout="HND"` takes [T, H, D] and [Hkv, S, D]; its causal mask is aligned
    bottom right. `lse` [T, H] is in **base 2**. Rows without a key may be NaN (before 0.7.2), and no call here has one.
    Kernels are compiled on first use for minutes, unless `flashinfer-jit-cache` or modules built before are installed.
"""

import math

import flashinfer
from torch import Tensor

from longspan.kv.layout import KVSpec
from longspan.types import AttentionParams

WIDTHS = (64, 128, 256)


class FlashInferPrefill:
    """FlashInfer's prefill kernel as a `DenseKernel`. See Note [Edges of FlashInfer's prefill kernel]."""

    name = "flashinfer"

    def unsupported(self, spec: KVSpec, params: AttentionParams) -> str | None:
        if spec.compute_dtype not in ("bfloat16", "float16"):
            return f"dtype: got {spec.compute_dtype}, the flashinfer backend takes bfloat16 and float16"
        k_width, v_width = spec.layout.k_width, spec.layout.v_width
        if k_width != v_width or k_width not in WIDTHS:
            return (
                f"head size: got {k_width} of keys and {v_width} of values, the flashinfer backend takes one "
                f"size for both of {', '.join(map(str, WIDTHS))}"
            )
        return None

    def dense_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = flashinfer.single_prefill_with_kv_cache(
            q.contiguous(),
            k,
            v,
            causal=is_causal,
            kv_layout="HND",
            sm_scale=scale,
            logits_soft_cap=softcap,
            return_lse=True,
        )
        return out, lse * math.log(2.0)
