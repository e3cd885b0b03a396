"""Decoder layer around its attention on a CPU, of which this process has a part: the steps with sums between them.

Holds the order of the steps. Must not know Transformers, attention or other processes.
Read next: `longspan.models.tensor_parallel`, the parts and their sums; `longspan.models.fused_layer`, which proves and
calls this.

What comes before attention needs no sum, and is the kernels' own for a layer with fewer heads. Behind it a sum lies
between each product and what follows, so a layer is seven calls where a whole one is one; for few rows the products
read all of the weights, beside which calls take no time.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.models.fused_layer_gemm import blocks, product
from longspan.models.tensor_part import Joint
from longspan.native import kernels
from longspan.native.layer import FusedLayer
from longspan.native.matrix import Matrix


class Joints(NamedTuple):
    """Places of a layer where the parts of all processes are added."""

    attention: Joint
    """Behind the output projection; the layer's kernels add its bias."""
    mlp: Joint | None
    """Behind the MLP; None where the MLP is computed elsewhere, and adds its parts itself."""


def behind_attention(
    layer: FusedLayer, joints: Joints, attended: Tensor, x: Tensor, mlp: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Compute what lies behind attention, for any number of rows.

    Args:
        layer: part of a layer.
        joints: its sums.
        attended: [T, H, D] of this part's heads.
        x: [T, hidden] input of the layer.
        mlp: function from [T, hidden] to [T, hidden] of a layer without the MLP's weights, else None.

    Returns:
        [T, hidden], the same in all processes.

    Collective: all processes of the rank; two sums of [T, hidden], if there are rows.
    """
    y = torch.empty_like(x)
    if not len(x):
        return y
    added = joints.attention.peers.sum(_product(attended.flatten(1), layer.weights.o))
    normed = layer.add_attention_(added, x)
    layer.add_mlp(_mlp(layer, joints.mlp, normed) if mlp is None else mlp(normed), added, y)
    return y


def _mlp(layer: FusedLayer, joint: Joint | None, normed: Tensor) -> Tensor:
    """Compute the MLP's last product [T, hidden], whose parts are added."""
    assert joint is not None, "a dense MLP has parts"
    out = torch.empty_like(normed)
    for rows in blocks(len(normed)):
        gate = _product(normed[rows], layer.weights.gate)
        layer.gate_(gate, _product(normed[rows], layer.weights.up))
        out[rows] = _product(gate, layer.weights.down)
    return joint.peers.sum(out)


def _product(x: Tensor, weight: Matrix | None) -> Tensor:
    if isinstance(weight, Tensor) and kernels.can_multiply(len(x), weight.shape[1], weight.dtype):
        return kernels.linear(x, weight)
    return product(x, weight)
