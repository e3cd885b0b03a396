"""Partial attention on a GPU, by vLLM's own FlashAttention. Not tried on any GPU: see `docs/vllm.md`.

Holds the calls of the kernel, and the backend that vLLM's model classes ask for on a GPU. Must not know plans, ranks or
requests.
Read next: `longspan.attention.dense`, which cuts segments into calls; `longspan.integrations.vllm.staging`.

Note [What FlashAttention does]
    `causal` is aligned to the bottom right: the last query sees the last key. Queries that see no key are in no call:
    FlashAttention 2 gives them a log-sum-exp of +inf. The log-sum-exp is natural and [H, T]; K and V are
    [keys, Hkv, D] with any strides but the last.
    Source: vllm-project/flash-attention, vllm_flash_attn/flash_attn_interface.py and csrc/flash_attn/flash_api.cpp.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from longspan.attention.base import AttentionBackend
from longspan.attention.dense import DenseBackend
from longspan.errors import UnsupportedModelError
from longspan.integrations.vllm.backend import StepAttentionImpl
from longspan.kv.layout import KVSpec
from longspan.types import AttentionParams

DTYPES = ("bfloat16", "float16")
"""Dtypes that the kernel computes in."""


class FlashStepBackend(FlashAttentionBackend):
    """Takes the place of vLLM's FlashAttention backend in a worker."""

    forward_includes_kv_cache_update = True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type[StepAttentionImpl]:
        return StepAttentionImpl


class VLLMFlash:
    """vLLM's FlashAttention as a `longspan.attention.dense.DenseKernel`."""

    name = "vllm_flash_attention"

    def __init__(self, flash_attn_varlen_func: Callable[..., Any], fa_version: int) -> None:
        """Keep the kernel.

        Args:
            flash_attn_varlen_func: vLLM's function.
            fa_version: version of FlashAttention that the function shall use.
        """
        self._flash, self._version = flash_attn_varlen_func, fa_version

    def unsupported(self, spec: KVSpec, params: AttentionParams) -> None:
        """Return None: `make_flash_backend` has asked vLLM already."""

    def dense_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        num_queries, num_keys = q.shape[0], k.shape[1]
        ends = torch.tensor([[0, num_queries], [0, num_keys]], dtype=torch.int32, device=q.device)
        out, lse = self._flash(
            q=q,
            k=k.transpose(0, 1),  # [S, Hkv, D]
            v=v.transpose(0, 1),
            cu_seqlens_q=ends[0],
            cu_seqlens_k=ends[1],
            max_seqlen_q=num_queries,
            max_seqlen_k=num_keys,
            softmax_scale=scale,
            causal=is_causal,
            softcap=softcap or 0.0,
            return_softmax_lse=True,
            fa_version=self._version,
        )
        return out, lse.transpose(0, 1)  # [H, T] to [T, H]


def make_flash_backend(spec: KVSpec, has_softcap: bool) -> AttentionBackend:
    """Make the backend of this process's GPU.

    Raises:
        UnsupportedModelError: vLLM has no FlashAttention for this model on this GPU.
    """
    layout, dtype = spec.layout, spec.compute_dtype
    if dtype not in DTYPES or layout.k_width != layout.v_width:
        raise UnsupportedModelError(
            f"model: keys of {layout.k_width} and values of {layout.v_width} {dtype}; "
            f"legal with longspan on a GPU are equal widths in {' or '.join(DTYPES)}"
        )
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version(head_size=layout.k_width, head_size_v=layout.v_width, requires_softcap=has_softcap)
    if version is None:
        raise UnsupportedModelError("model: vLLM has no FlashAttention for it on this GPU, which longspan needs")
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    return DenseBackend(VLLMFlash(flash_attn_varlen_func, version), None)
