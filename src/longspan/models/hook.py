"""Connection to Transformers: an attention function and a mask builder named `longspan`.

Holds the registration and the record of one attention call. Must not know plans, ranks or strategies: the caller of the
model passes a callable as the forward keyword argument `longspan_attend`, and every layer calls it.
Read next: `longspan.models.inspect`, which passes a recorder; `longspan.worker.forward`, which passes real attention.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from longspan.attention.latent import LatentWeights
from longspan.errors import UnsupportedModelError
from longspan.models.last_layer import READ_ROWS
from longspan.models.latent import WEIGHTS

ATTENTION_NAME = "longspan"

HARMLESS_ARGUMENTS = frozenset(
    {
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "cache_position",
        READ_ROWS,  # for what comes behind the last layer's attention
    }
)
"""Keyword arguments that reach attention functions and do not change what attention computes."""


@dataclass(frozen=True, slots=True)
class MaskRule:
    """Mask rule that the model asked for, passed in place of a mask."""

    mask_function: Callable[..., Any]
    """Function of (batch, head, query position, key position), 0-dim integer tensors: whether the key is seen."""
    local_size: int | None = None
    """Tokens of the window or chunk that whoever made the rule names, or None."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """Call of the attention function by one layer."""

    layer: int
    q: Tensor
    """[T, H, D] after RoPE."""
    k: Tensor
    """[Hkv, T, D] after RoPE; [1, T, rank + rotated] if there are `latent` weights."""
    v: Tensor
    """[Hkv, T, Dv]; the first elements of `k` if there are `latent` weights."""
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    """[H] attention sinks, natural-log logits, or None."""
    mask: MaskRule | None
    is_causal: bool
    other_arguments: Mapping[str, object]
    """Keyword arguments that are not known to be harmless."""
    latent: LatentWeights | None = None
    """Projections of the heads where `k` holds latents, else None."""

    @property
    def out_width(self) -> int:
        """Elements of one output head."""
        return self.v.shape[-1] if self.latent is None else self.latent.w_v.shape[1]


AttendFunction = Callable[[AttentionCall], Tensor]
"""Function that computes attention [T, H, Dout] of a call."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskRule | Tensor | None,
    *,
    longspan_attend: AttendFunction | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention function for Transformers: q, k, v are [1, heads, T, D], the output is [1, T, H, Dout]."""
    if longspan_attend is None:
        raise UnsupportedModelError(f"{type(module).__name__} does not pass forward keyword arguments to its attention")
    call = AttentionCall(
        layer=getattr(module, "layer_idx", -1),
        q=query[0].transpose(0, 1),  # [H, T, D] -> [T, H, D]
        k=key[0],
        v=value[0],
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        mask=attention_mask if isinstance(attention_mask, MaskRule) else None,
        is_causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        other_arguments={
            name: argument
            for name, argument in others.items()
            if argument is not None and name not in HARMLESS_ARGUMENTS
        },
        latent=getattr(module, WEIGHTS, None),
    )
    return longspan_attend(call)[None], None


def _mask(*, mask_function: Callable[..., Any], local_size: int | None = None, **_: object) -> MaskRule:
    """Mask builder for Transformers. It builds no mask, since our attention masks by global positions."""
    return MaskRule(mask_function, local_size)


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _mask)
