"""Decoder layer around its attention on a CPU, some of whose rows have adapters: products and what adapters add to
them, with the kernels' steps between.

Holds the order of the steps. Must not know Transformers, attention, or which rows have which adapter.
Read next: `longspan.models.adapters`, what is added; `longspan.models.fused_layer`, which proves and calls this.

What an adapter adds comes between a product and the step that uses it, so a layer is ten calls where it is two without
adapters; its own modules would make forty.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longspan.models import fused_layer_gemm
from longspan.models.adapters import add_products_
from longspan.native import kernels, packed
from longspan.native.layer import FusedLayer
from longspan.native.matrix import Matrix
from longspan.native.packed import PackedMatrix


def before_attention(
    layer: FusedLayer, attention: Any, x: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute norm, projections and rotary embedding like `FusedLayer.before_attention`, for any number of rows.

    Args:
        layer: the layer's kernels.
        attention: its attention module, whose projections have the adapters.
        x: [T, hidden] float32, contiguous; T is at least 1.
        cos: [T, D] float32, contiguous.
        sin: [T, D] float32, contiguous.

    Returns:
        q [T, H, D], k [Hkv, T, D], v [Hkv, T, D].
    """
    num_rows, weights, normed = x.shape[0], layer.weights, layer.norm(x)
    products = (
        _product(attention.q_proj, normed, weights.q),
        _product(attention.k_proj, normed, weights.k),
        _product(attention.v_proj, normed, weights.v),
    )
    q = torch.empty(num_rows, layer.num_heads, layer.width)
    k = torch.empty(layer.num_kv_heads, num_rows, layer.width)
    v = torch.empty(layer.num_kv_heads, num_rows, layer.width)
    layer.finish_heads(products, cos, sin, q, k, v)
    return q, k, v


def behind_attention(
    layer: FusedLayer, modules: Any, attended: Tensor, x: Tensor, mlp: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Compute what lies behind attention, for any number of rows.

    Args:
        layer: the layer's kernels.
        modules: the layer itself, whose modules have the adapters.
        attended: [T, H, D].
        x: [T, hidden] input of the layer.
        mlp: function from [T, hidden] to [T, hidden] of a layer without the MLP's weights, else None.

    Returns:
        [T, hidden].
    """
    y, weights = torch.empty_like(x), layer.weights
    if not len(x):
        return y
    added = _product(modules.self_attn.o_proj, attended.flatten(1), weights.o)
    normed = layer.add_attention_(added, x)
    if mlp is not None:
        layer.add_mlp(mlp(normed), added, y)
        return y
    gate = _product(modules.mlp.gate_proj, normed, weights.gate)
    layer.gate_(gate, _product(modules.mlp.up_proj, normed, weights.up))
    layer.add_mlp(_product(modules.mlp.down_proj, gate, weights.down), added, y)
    return y


def _product(module: Any, rows: Tensor, weight: Matrix | None) -> Tensor:
    """Multiply rows [T, width] by a module's weight [out, width], without its bias, and add what adapters add."""
    if isinstance(weight, PackedMatrix):
        is_few = packed.can_multiply(len(rows))
        out = packed.linear(rows, weight) if is_few else fused_layer_gemm.product(rows, weight)
    elif weight is not None and kernels.can_multiply(len(rows), weight.shape[1], weight.dtype):
        out = kernels.linear(rows, weight)
    else:
        out = fused_layer_gemm.product(rows, weight)
    add_products_(module, rows, out)
    return out
