"""Multi-head latent attention as its latents: what a layer hands to attention, and the weights that project it.

Holds the change of a model's attention modules. Must not know plans, ranks or strategies, nor what is done with the
weights.
Read next: `longspan.attention.latent`, which computes with them; `longspan.kv.layout`, Note [Latents].

Modules of these families compute a latent and a rotated part per token, and a method `expand_kv` makes keys and values
of all heads of them just before attention is called. It is replaced by one that hands both over as they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longspan.attention.latent import LatentParams, LatentWeights
from longspan.errors import UnsupportedModelError
from longspan.kv.layout import KVSpec
from longspan.types import AttentionParams, ModelSpec

WEIGHTS = "longspan_latent"
"""Attribute of an attention module that holds its `LatentWeights`."""


def hand_over_latents_(model: Any) -> int:
    """Let attention receive latents instead of keys and values of all heads, in modules that have them.

    Returns:
        Number of changed modules.

    Raises:
        UnsupportedModelError: a projection is no plain matrix, whose parts cannot be taken.
    """
    modules = _modules(model)
    for module in modules:
        setattr(module, WEIGHTS, _weights(module))
        module.expand_kv = _hand_over
    return len(modules)


def projections_of_latents(model: Any) -> list[nn.Module]:
    """Linear layers whose parts attention takes as plain matrices, before or after latents are handed over."""
    return [module.kv_b_proj for module in _modules(model)]


def _modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "expand_kv")]


def _weights(module: Any) -> LatentWeights:
    """Parts of the projection that keys and values of all heads are expanded with, as views of its weight."""
    projection = module.kv_b_proj
    weight: Tensor = projection.weight
    nope, width, rank = int(module.qk_nope_head_dim), int(module.v_head_dim), int(module.kv_lora_rank)
    is_plain = type(weight.data) is Tensor and weight.is_floating_point() and weight.ndim == 2
    if not is_plain or getattr(projection, "bias", None) is not None or weight.shape[1] != rank:
        raise UnsupportedModelError(
            f"kv_b_proj: got {type(projection).__name__} with a weight {tuple(weight.shape)} of {weight.dtype}, proven "
            f"is a plain matrix of {rank} columns without a bias"
        )
    heads = weight.detach().view(-1, nope + width, rank)  # [H, nope + Dv, rank]
    return LatentWeights(heads[:, :nope], heads[:, nope:])


def _hand_over(kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """Stand in for `expand_kv`: latents [1, 1, T, rank] and rotated parts [1, 1, T, rotated] as one key and value."""
    keys = torch.cat((kv_nope, k_rot), dim=-1)
    return keys, keys[..., : kv_nope.shape[-1]]


def latent_spec(weights: LatentWeights, q: Tensor, k: Tensor, dtype: str) -> KVSpec:
    """Spec of a layer.

    Args:
        weights: the layer's projections.
        q: [T, H, nope + rotated], its queries.
        k: [1, T, rank + rotated], what it caches.
        dtype: name of the torch dtype of both.
    """
    rank = weights.w_v.shape[2]
    return KVSpec.latents(rank, k.shape[2] - rank, q.shape[2], weights.w_v.shape[1], dtype)


def params_with_weights(spec: ModelSpec, model: nn.Module) -> Sequence[AttentionParams | None]:
    """Attention parameters of every layer, with a loaded model's weights where attention needs them.

    A rank needs them also for layers that it only joins.
    """
    modules: list[Any] = [module for module in model.modules() if hasattr(module, WEIGHTS)]
    found: dict[int, LatentWeights] = {module.layer_idx: getattr(module, WEIGHTS) for module in modules}
    params: list[AttentionParams | None] = list(spec.layer_params)
    for group in spec.kv_groups:
        for layer in group.layers if group.spec.latent is not None else ():
            one = params[layer]
            assert one is not None, f"layer {layer} has no attention"
            params[layer] = LatentParams(one.scale, one.softcap, one.window, weights=found[layer], spec=group.spec)
    return params
