"""vLLM's attention layers that the plugin knows, whichever worker runs them.

Holds their implementation's arguments, and the search for them in a model. Must not know steps, requests or ranks.
Read next: `longspan.integrations.vllm.backend`, and `longspan.integrations.vllm.runner.backend`, which compute them.
"""

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from torch import Tensor
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionType
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from longspan.errors import UnsupportedModelError


class PlainAttentionImpl(AttentionImpl[Any]):
    """Arguments of one layer's attention: causal, with at most a scale, a softcap, a sliding window and sinks."""

    rounded_dtypes: ClassVar[Collection[str]] = ()
    """vLLM's names of KV dtypes of 8 bits that the worker can store."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> None:
        """Keep what a layer needs; the arguments are vLLM's.

        Raises:
            UnsupportedModelError: the layer needs more.
        """
        needed = sorted(name for name, value in others.items() if value is not None)
        for wrong, what in (
            (alibi_slopes is not None, "ALiBi"),
            (attn_type != AttentionType.DECODER, f"attention of type {attn_type}"),
            (kv_sharing_target_layer_name is not None, "layers that share keys and values"),
            (
                is_quantized_kv_cache(kv_cache_dtype) and kv_cache_dtype not in self.rounded_dtypes,
                f"a KV cache of {kv_cache_dtype}",
            ),
            (bool(needed), ", ".join(needed)),
        ):
            if wrong:
                refuse_layer(what)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.softcap = logits_soft_cap or None
        self.window = sliding_window
        """Tokens that a query sees, its own included; None for all before it."""
        self.sinks = sinks
        """[H] logits that join the softmax without a value, loaded with the weights; None for none."""


def attention_layers(
    static_forward_context: dict[str, Any], classes: Sequence[type[Attention]] = (Attention,)
) -> dict[str, Any]:
    """Return the model's layers with KV by name, in the order in which it runs them.

    Args:
        static_forward_context: vLLM's register of layers, by name.
        classes: classes of vLLM's that the caller computes. Others, which have a prefix or another mask, are subclasses
            of `Attention`, share our implementation, and would be computed as causal.

    Raises:
        UnsupportedModelError: a layer is of another class, or the layers have no order.
    """
    found: dict[int, tuple[str, Any]] = {}
    for name, layer in static_forward_context.items():
        if not hasattr(layer, "get_kv_cache_spec"):
            continue  # fused MoE registers itself too
        if type(layer) not in classes or not isinstance(layer.impl, PlainAttentionImpl):
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


def refuse_layer(what: str) -> None:
    """Refuse a model for what one of its layers has.

    Raises:
        UnsupportedModelError: always.
    """
    raise UnsupportedModelError(f"model: a layer has {what}, which longspan does not support in vLLM")
