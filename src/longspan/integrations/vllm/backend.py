"""Attention backend that runs longspan's attention in vLLM's layers.

Holds the backend that vLLM's model classes ask for on a CPU. Must not know schedulers, requests or communicators: a
step arrives as vLLM's "attention metadata".
Read next: `longspan.cp.step`.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from longspan.cp.step import StepAttention
from longspan.integrations.vllm.plain_attention import PlainAttentionImpl
from longspan.integrations.vllm.stored import STORED_AS


@dataclass(frozen=True)
class StepMetadata:
    """Attention metadata that vLLM hands to every attention layer of a step."""

    attention: StepAttention
    index_of_layer: dict[str, int]
    """Index of every layer, from 0 in the model's order, by vLLM's layer name."""


class WarmUp:
    """Metadata in place of `StepMetadata` while a model is compiled: no KV is stored, and attention gives zeros."""


class StepAttentionImpl(PlainAttentionImpl):
    """Attention of one layer, which hands queries, keys and values to the step."""

    rounded_dtypes = tuple(STORED_AS)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: StepMetadata | WarmUp,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write attention of `query` [T, H, D], `key` and `value` [T, Hkv, D], after RoPE, to `output` [T, H, Dv]."""
        assert output_scale is None, "no fused quantisation of outputs"
        assert output_block_scale is None, "no fused quantisation of outputs"
        if isinstance(attn_metadata, WarmUp):
            return output.zero_()
        index = attn_metadata.index_of_layer[layer.layer_name]
        keys, values = key.transpose(0, 1), value.transpose(0, 1)
        out = attn_metadata.attention.attend(index, query, keys, values, sinks=self.sinks)
        output.copy_(out)
        return output


class StepAttentionBackend(CPUAttentionBackend):
    """Takes the place of vLLM's CPU backend in a worker."""

    forward_includes_kv_cache_update = True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        return kv_cache_dtype in STORED_AS or bool(super().supports_kv_cache_dtype(kv_cache_dtype))

    @staticmethod
    def get_impl_cls() -> type[StepAttentionImpl]:
        return StepAttentionImpl


def install_backend() -> None:
    """Register our backend for this process; under vLLM's own name, as its CPU platform takes no other."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{StepAttentionBackend.__qualname__}")
