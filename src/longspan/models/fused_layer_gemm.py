"""Decoder layer around its attention for many rows on a CPU: products by oneDNN, the steps between them by kernels.

Holds the order of the steps. Must not know Transformers or attention.
Read next: `longspan.models.fused_layer`, which proves and calls this; `longspan.native.layer`, the steps.

Norms, rotary embedding, activation and residuals of Transformers are thirty operators a layer, each of which reads and
writes all rows in memory. Here they are five, and the rows of a long chunk are processed in blocks.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.models.packed_linear import multiply_unpacked
from longspan.native import onednn
from longspan.native.layer import FusedLayer
from longspan.native.matrix import Matrix
from longspan.native.packed import PackedMatrix

BLOCK_ROWS = 1024
"""Most rows that go through the steps together: an MLP's inner values are the largest temporaries of a step. A product
prepares its weights in every call: 512 rows at a time took 3 % longer than 1,024, and 256 another 5 %.
"""


def before_attention(layer: FusedLayer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute norm, projections and rotary embedding like `FusedLayer.before_attention`, for any number of rows."""
    num_rows = x.shape[0]
    q = torch.empty(num_rows, layer.num_heads, layer.width)
    k = torch.empty(layer.num_kv_heads, num_rows, layer.width)
    v = torch.empty(layer.num_kv_heads, num_rows, layer.width)
    weights = layer.weights
    for rows in blocks(num_rows):
        normed = layer.norm(x[rows])
        products = (product(normed, weights.q), product(normed, weights.k), product(normed, weights.v))
        layer.finish_heads(products, cos[rows], sin[rows], q[rows], k[:, rows], v[:, rows])
    return q, k, v


def behind_attention(layer: FusedLayer, attended: Tensor, x: Tensor) -> Tensor:
    """Compute output projection and MLP like `FusedLayer.behind_attention`, for any number of rows."""
    y = torch.empty_like(x)
    weights = layer.weights
    for rows in blocks(x.shape[0]):
        added = product(attended[rows].flatten(1), weights.o)
        normed = layer.add_attention_(added, x[rows])
        gate = product(normed, weights.gate)
        layer.gate_(gate, product(normed, weights.up))
        layer.add_mlp(product(gate, weights.down), added, y[rows])
    return y


def project_attention(layer: FusedLayer, attended: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute output projection and norm like `FusedLayer.project_attention`, for any number of rows."""
    added = product(attended.flatten(1), layer.weights.o)
    return added, layer.add_attention_(added, x) if len(x) else torch.empty_like(x)


def blocks(num_rows: int) -> Iterator[slice]:
    """Cut all rows into few blocks of about equal size."""
    num_blocks = -(-num_rows // BLOCK_ROWS)
    for i in range(num_blocks):
        yield slice(num_rows * i // num_blocks, num_rows * (i + 1) // num_blocks)


def product(x: Tensor, weight: Matrix | None) -> Tensor:
    """Multiply rows [T, width] by the transpose of a weight [out, width]."""
    assert weight is not None, "the MLP is computed elsewhere"
    if isinstance(weight, PackedMatrix):
        return multiply_unpacked(x, weight)
    return onednn.linear(x, weight, None) if onednn.is_available() else F.linear(x, weight)
