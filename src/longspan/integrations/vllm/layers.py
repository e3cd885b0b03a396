"""vLLM's attention layers: what each caches and sees, in our words and in vLLM's, and how latent ones reach a step.

Holds functions of one layer. Must not know requests, ranks or block tables.
Read next: `longspan.integrations.vllm.rank_model`; `longspan.kv.layout`, Note [Latents].

Note [Latent layers]
    vLLM's `MLAAttention` projects queries and outputs itself, around an implementation per kernel. The core does both
    between ranks, as it wants queries and outputs in the widths of heads: so its `forward_impl`, which vLLM's operator
    calls with all that is needed, is replaced in every such layer of the model. vLLM's implementation stays unused.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from longspan.attention.latent import LatentParams, LatentWeights
from longspan.errors import UnsupportedModelError
from longspan.integrations.vllm.backend import StepAttentionImpl, StepMetadata, WarmUp
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
    if type(layer) is MLAAttention:
        return True
    return type(layer) in (Attention, ChunkedLocalAttention) and isinstance(layer.impl, StepAttentionImpl)


def layer_spec(layer: Any, dtype: str) -> KVSpec:
    """Return what a layer caches and sees.

    Args:
        layer: a layer of `attention_layers`.
        dtype: the model's dtype.
    """
    if isinstance(layer, MLAAttention):
        q_width = layer.qk_nope_head_dim + layer.qk_rope_head_dim
        return KVSpec.latents(layer.kv_lora_rank, layer.qk_rope_head_dim, q_width, layer.v_head_dim, dtype)
    chunk = layer.attention_chunk_size if isinstance(layer, ChunkedLocalAttention) else None
    return KVSpec.uniform(layer.num_kv_heads, layer.head_size, layer.head_size_v, dtype, layer.impl.window, chunk)


def layer_params(layer: Any, spec: KVSpec) -> AttentionParams:
    """Return how a layer, whose weights are loaded, turns dot products into scores.

    Raises:
        UnsupportedModelError: a latent layer has its projections in a format of the processor's.
    """
    if spec.latent is None:
        return AttentionParams(layer.impl.scale, layer.impl.logits_soft_cap, layer.impl.window)
    if layer.is_amx_bmm_enabled:
        raise UnsupportedModelError(
            "model: vLLM packs latent projections for AMX, legal with longspan is --attention-backend CPU_MLA"
        )
    weights = LatentWeights(layer.W_UK_T.detach(), layer.W_UV.detach().transpose(1, 2))
    return LatentParams(layer.scale, weights=weights, spec=spec)


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
    if spec.latent is not None:
        plain = MLAAttentionSpec(**fields, max_tp_shards=1, cache_dtype_str=layer.kv_cache_dtype)
    elif spec.window is not None:
        plain = SlidingWindowSpec(**fields, head_size_v=layout.v_width, sliding_window=spec.window)
    elif spec.chunk is not None:
        plain = ChunkedLocalAttentionSpec(**fields, head_size_v=layout.v_width, attention_chunk_size=spec.chunk)
    else:
        plain = FullAttentionSpec(**fields, head_size_v=layout.v_width)
    if own != plain:
        raise UnsupportedModelError(f"model: layer {name} needs {own}, legal with longspan in vLLM is {plain}")
    return plain.copy_with_new_block_size(vllm_config.cache_config.block_size)


def redirect_latent_layers_(layers: dict[str, Any]) -> None:
    """Let latent layers hand queries and latents to the step. See Note [Latent layers]."""
    for layer in layers.values():
        if isinstance(layer, MLAAttention):
            layer.forward_impl = partial(_attend_latents, layer)


def _attend_latents(
    layer: Any,
    q: Tensor,
    latents: Tensor,
    rotated: Tensor,
    kv_cache: Tensor,
    attn_metadata: StepMetadata | WarmUp,
    output: Tensor,
    **quantised: Any,
) -> Tensor:
    """Write attention to `output` [T, H * Dv].

    Args:
        layer: vLLM's layer.
        q: [T, H, nope + rope] queries, after RoPE.
        latents: [T, rank], normalised.
        rotated: [T, 1, rope] part of the keys that carries the position, after RoPE.
        kv_cache: not used.
        attn_metadata: the step.
        output: changed in place.
        quantised: scales of fused quantisation, all None.
    """
    assert all(value is None for value in quantised.values()), "no fused quantisation of outputs"
    if isinstance(attn_metadata, WarmUp):
        return output.zero_()
    key = torch.cat((latents, rotated.reshape(len(latents), -1)), dim=1)[None]  # [1, T, rank + rope]
    index = attn_metadata.index_of_layer[layer.layer_name]
    out = attn_metadata.attention.attend(index, q, key, key[:, :, : latents.shape[1]])  # [T, H, Dv]
    output.copy_(out.reshape(output.shape))
    return output
