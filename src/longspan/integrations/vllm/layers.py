"""vLLM's attention layers: what each caches and sees, in our words and in vLLM's.

Holds functions of one layer. Must not know requests, ranks or block tables.
Read next: `longspan.integrations.vllm.rank_model`.
"""

from typing import Any

from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)

from longspan.errors import UnsupportedModelError
from longspan.integrations.vllm.backend import StepAttentionImpl
from longspan.kv.layout import KVSpec
from longspan.types import AttentionParams


def attention_layers(static_forward_context: dict[str, Any]) -> dict[str, Any]:
    """Return the model's attention layers by name, in the order in which it runs them.

    Raises:
        UnsupportedModelError: a layer is of another class than `layer_spec` knows. Prefix and other masks are
            subclasses, which share our backend and would be computed as causal.
    """
    found: dict[int, tuple[str, Any]] = {}
    for name, layer in static_forward_context.items():
        if not hasattr(layer, "get_kv_cache_spec"):
            continue  # fused MoE registers itself too
        if not _is_known(layer):
            raise UnsupportedModelError(
                f"model: layer {name} is {type(layer).__name__}, which longspan does not support in vLLM"
            )
        index = extract_layer_index(name)
        if index in found:
            raise UnsupportedModelError(f"model: layers {found[index][0]} and {name} have one index")
        found[index] = (name, layer)
    if not found:
        raise UnsupportedModelError("model: it has no attention layers")
    return dict(found[index] for index in sorted(found))


def _is_known(layer: Any) -> bool:
    return type(layer) is Attention and isinstance(layer.impl, StepAttentionImpl)


def layer_spec(layer: Any, dtype: str) -> KVSpec:
    """Return what a layer caches and sees.

    Args:
        layer: a layer of `attention_layers`.
        dtype: the model's dtype.
    """
    return KVSpec.uniform(layer.num_kv_heads, layer.head_size, layer.head_size_v, dtype, layer.impl.window)


def layer_params(layer: Any) -> AttentionParams:
    """Return how a layer turns dot products into scores."""
    return AttentionParams(layer.impl.scale, layer.impl.logits_soft_cap, layer.impl.window)


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
        "dtype": vllm_config.model_config.dtype,
    }
    plain: KVCacheSpec
    if spec.window is not None:
        plain = SlidingWindowSpec(**fields, head_size_v=layout.v_width, sliding_window=spec.window)
    else:
        plain = FullAttentionSpec(**fields, head_size_v=layout.v_width)
    if own != plain:
        raise UnsupportedModelError(f"model: layer {name} needs {own}, legal with longspan in vLLM is {plain}")
    return plain.copy_with_new_block_size(vllm_config.cache_config.block_size)
