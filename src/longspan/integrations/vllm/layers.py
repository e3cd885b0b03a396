"""vLLM's attention layers: what each caches and sees, in our words and in vLLM's.

Holds functions of one layer. Must not know requests, ranks or block tables.
Read next: `longspan.integrations.vllm.plain_attention`, `longspan.integrations.vllm.rank_model`.
"""

from dataclasses import replace
from typing import Any

from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    KVQuantMode,
    SlidingWindowSpec,
    get_kv_quant_mode,
)

from longspan.errors import UnsupportedModelError
from longspan.integrations.vllm.stored import STORED_AS
from longspan.kv.layout import KVSpec
from longspan.types import AttentionParams

CLASSES = (Attention, ChunkedLocalAttention)
"""Classes of layers that `layer_spec` knows."""


def layer_spec(layer: Any, dtype: str) -> KVSpec:
    """Return what a layer caches and sees.

    Args:
        layer: a layer of `CLASSES`.
        dtype: the model's dtype, which is stored unless the layer says another.
    """
    chunk = layer.attention_chunk_size if isinstance(layer, ChunkedLocalAttention) else None
    spec = KVSpec.uniform(layer.num_kv_heads, layer.head_size, layer.head_size_v, dtype, layer.impl.window, chunk)
    return spec.stored_as(STORED_AS.get(layer.kv_cache_dtype, dtype))


def layer_params(layer: Any) -> AttentionParams:
    """Return how a layer turns dot products into scores."""
    return AttentionParams(layer.impl.scale, layer.impl.softcap, layer.impl.window)


def check_kv_cache_spec(name: str, layer: Any, spec: KVSpec, vllm_config: Any) -> KVCacheSpec:
    """Return vLLM's spec of a layer's cache, in the block size of the cache.

    Args:
        name: name of the layer.
        layer: the layer.
        spec: what `layer_spec` says of it.
        vllm_config: vLLM's configuration.

    Raises:
        UnsupportedModelError: the layer asks for more than `spec` says.
    """
    own = layer.get_kv_cache_spec(vllm_config)
    layout = spec.layout
    fields = {
        "block_size": own.block_size,  # vLLM lets layers with windows choose; their blocks become like the others'
        "num_kv_heads": layout.num_kv_heads,
        "head_size": layout.k_width,
        "dtype": layer.kv_cache_torch_dtype,
        "kv_quant_mode": get_kv_quant_mode(layer.kv_cache_dtype),
    }
    plain: AttentionSpec
    if spec.window is not None:
        plain = SlidingWindowSpec(**fields, head_size_v=layout.v_width, sliding_window=spec.window)
    elif spec.chunk is not None:
        plain = ChunkedLocalAttentionSpec(**fields, head_size_v=layout.v_width, attention_chunk_size=spec.chunk)
    else:
        plain = FullAttentionSpec(**fields, head_size_v=layout.v_width)
    if own != plain:
        raise UnsupportedModelError(f"model: layer {name} needs {own}, legal with longspan in vLLM is {plain}")
    if plain.kv_quant_mode != KVQuantMode.NONE:
        # A row's scale lies behind it: vLLM lets every backend say the bytes of a token's key and value of one head.
        plain = replace(plain, state_content_bytes=layout.token_bytes // layout.num_kv_heads)
    return plain.copy_with_new_block_size(vllm_config.cache_config.block_size)
