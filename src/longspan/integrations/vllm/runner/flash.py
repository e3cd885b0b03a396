"""Kernels of a step's attention on GPUs: vLLM's FlashAttention and cache writer, our merge. Not tried on any GPU.

Holds the calls. Must not know ranks or requests.
Read next: `longspan.triton_kernels.merge`; `docs/vllm-gpu.md`, what to run first on a GPU.

Note [FlashAttention over a block table]
    With `block_table` and `seqused_k`, the keys of run i are the first `seqused_k[i]` rows of its blocks. `causal`
    is aligned to the bottom right: the last query sees the last key. The log-sum-exp is natural and [H, T]. A run
    with `seqused_k` 0 is legal; what comes out for it depends on the version (+inf or -inf), and is replaced by
    `RankedStep`.
    Source: vllm-project/flash-attention, vllm_flash_attn/flash_attn_interface.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longspan.errors import UnsupportedModelError
from longspan.integrations.vllm.runner.kernels import DeviceCall
from longspan.types import AttentionParams


class FlashKernels:
    """Kernels on vLLM's own KV tensors; nothing is copied or synchronised."""

    def __init__(
        self,
        attend: Callable[..., Any],
        store: Callable[..., None],
        merge: Callable[..., None],
        tidy: Callable[[Tensor], Tensor],
        fa_version: int,
        scale_of_one: Tensor,
    ) -> None:
        """Keep the functions.

        Args:
            attend: vLLM's `flash_attn_varlen_func`.
            store: vLLM's `reshape_and_cache_flash`.
            merge: `longspan.triton_kernels.merge.merge`.
            tidy: vLLM's `canonicalize_singleton_dim_strides`: the stride of a dimension of size 1 is arbitrary to
                torch, and not to the kernels of Hopper.
            fa_version: version of FlashAttention to use.
            scale_of_one: [1] float32 1.0 on the device: keys and values are stored as they are.
        """
        self._attend, self._store, self._merge, self._tidy = attend, store, merge, tidy
        self._version, self._one = fa_version, scale_of_one

    def store(self, k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        keys, values = _token_major(kv_cache, k.shape[-1])
        self._store(k, v, keys, values, slots, "auto", self._one, self._one)

    def attend(self, q: Tensor, kv_cache: Tensor, call: DeviceCall, params: AttentionParams, out: Tensor) -> Tensor:
        keys, values = _token_major(kv_cache, q.shape[-1])
        _, lse = self._attend(
            q=q,
            k=self._tidy(keys),
            v=self._tidy(values),
            out=out,
            cu_seqlens_q=call.query_starts,
            max_seqlen_q=call.max_query_len,
            seqused_k=call.key_lens,
            max_seqlen_k=call.max_key_len,
            block_table=call.block_table,
            softmax_scale=params.scale,
            softcap=params.softcap or 0.0,
            causal=call.is_causal,
            return_softmax_lse=True,
            fa_version=self._version,
        )
        found: Tensor = lse.transpose(0, 1)  # [H, T] to [T, H]
        return found

    def merge(self, parts: Tensor, lses: Tensor, out: Tensor) -> None:
        self._merge(parts, lses, out, lses.new_empty(lses.shape[1:]))


def _token_major(kv_cache: Tensor, width: int) -> tuple[Tensor, ...]:
    """Return keys and values [blocks, block_size, Hkv, D]: views of KV memory [blocks, Hkv, block_size, 2 * D]."""
    return kv_cache.transpose(1, 2).split_with_sizes((width, kv_cache.shape[-1] - width), dim=-1)


def make_flash_kernels(head_size: int, has_softcap: bool, device: torch.device) -> FlashKernels:
    """Make the kernels of this process's GPU.

    Raises:
        UnsupportedModelError: vLLM has no FlashAttention for such heads on this GPU.
    """
    from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version(head_size=head_size, requires_softcap=has_softcap)
    if version is None:
        raise UnsupportedModelError(
            f"model: vLLM has no FlashAttention for heads of {head_size} on this GPU, which longspan needs"
        )
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, reshape_and_cache_flash

    from longspan.triton_kernels.merge import merge

    one = torch.ones(1, device=device)
    return FlashKernels(
        flash_attn_varlen_func, reshape_and_cache_flash, merge, canonicalize_singleton_dim_strides, version, one
    )
