"""Attention backend of the V2 model runner: hands queries, keys and values to the step's attention.

Holds what vLLM's attention layers ask for. Must not know requests, ranks or messages.
Read next: `longspan.integrations.vllm.runner.step`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from longspan.integrations.vllm.plain_attention import PlainAttentionImpl, refuse_layer
from longspan.integrations.vllm.runner.kernels import Kernels
from longspan.integrations.vllm.runner.manager import OwnerManager
from longspan.integrations.vllm.runner.step import RankedStep
from longspan.types import AttentionParams


class RankedAttentionImpl(PlainAttentionImpl):
    """Attention of one layer."""

    supports_pcp = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check that the layer is causal attention with at most a scale and a softcap; the arguments are vLLM's.

        Raises:
            UnsupportedModelError: the layer needs more.
        """
        super().__init__(*args, **kwargs)
        if self.window is not None:
            refuse_layer("a sliding window (with prefill_context_parallel_size)")
        if self.sinks is not None:
            refuse_layer("sinks (with prefill_context_parallel_size)")
        self.params = AttentionParams(self.scale, self.softcap)
        self.kernels: Kernels | None = None  # the runner chooses them when it knows the device

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: RankedStep | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write attention of `query` [T, H, D], `key` and `value` [T, Hkv, D], after RoPE, to `output` [T, H, D].

        Without metadata, in a profile or dummy run, no KV is stored, and attention gives zeros.
        """
        assert output_scale is None, "no fused quantisation of outputs"
        assert output_block_scale is None, "no fused quantisation of outputs"
        if attn_metadata is None:
            return output.zero_()
        assert self.kernels is not None, "the runner has chosen kernels"
        attn_metadata.attend(self.kernels, self.params, query, key, value, kv_cache, output)
        return output


class RankedMetadataBuilder(AttentionMetadataBuilder[RankedStep]):
    """Gives every layer the attention of the step that the manager has prepared."""

    _cudagraph_support = AttentionCGSupport.NEVER  # vLLM captures what is between attention layers
    manager: OwnerManager | None = None
    """Set by the runner."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> RankedStep | None:
        """Return the step's attention; None in a dummy run."""
        assert self.manager is not None, "the runner names its manager"
        return self.manager.step


class RankedBackend(FlashAttentionBackend):
    """vLLM's FlashAttention backend, whose KV memory and limits are ours, less what is not proven here."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = True
    supports_kv_cache_update_bypass = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[RankedAttentionImpl]:
        return RankedAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[RankedMetadataBuilder]:
        return RankedMetadataBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return bool(attn_type == AttentionType.DECODER)


def install_backend(device_type: str) -> None:
    """Register our backend for this process: as the custom one, or as the only one that vLLM's CPU platform takes."""
    name = AttentionBackendEnum.CPU_ATTN if device_type == "cpu" else AttentionBackendEnum.CUSTOM
    register_backend(name, f"{__name__}.{RankedBackend.__qualname__}")
