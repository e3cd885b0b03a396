"""A decoder layer around its attention for many rows on a CPU: products by oneDNN, all between them by kernels.

Holds the order of the steps. Must not know Transformers or attention.
Read next: `longspan.models.fused_layer`, which proves and calls this; `longspan.native.layer`, the steps.

Norms, rotary embedding, activation and residuals of Transformers are thirty operators a layer, each of which reads and
writes all rows in memory. Here they are five, and rows come in blocks whose values are still in the cache.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.models import onednn
from longspan.native.layer import FusedLayer

BLOCK_ROWS = 512
"""Rows that go through the steps together: an MLP's inner values are the largest temporaries of a step. Products of 256
rows at a time take 4 % longer than those of 1,024 at once, of 512 hardly."""


def before_attention(layer: FusedLayer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `FusedLayer.before_attention`, for any number of rows."""
    num_rows = x.shape[0]
    q = torch.empty(num_rows, layer.num_heads, layer.width)
    k = torch.empty(layer.num_kv_heads, num_rows, layer.width)
    v = torch.empty(layer.num_kv_heads, num_rows, layer.width)
    weights = layer.weights
    for first in range(0, num_rows, BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        normed = layer.norm(x[rows])
        products = (_product(normed, weights.q), _product(normed, weights.k), _product(normed, weights.v))
        layer.finish_heads(products, cos[rows], sin[rows], q[rows], k[:, rows], v[:, rows])
    return q, k, v


def behind_attention(layer: FusedLayer, attended: Tensor, x: Tensor) -> Tensor:
    """As `FusedLayer.behind_attention`, for any number of rows."""
    y = torch.empty_like(x)
    weights = layer.weights
    for first in range(0, x.shape[0], BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        added = _product(attended[rows].flatten(1), weights.o)
        normed = layer.add_attention_(added, x[rows])
        gate = _product(normed, weights.gate)
        layer.gate_(gate, _product(normed, weights.up))
        layer.add_mlp(_product(gate, weights.down), added, y[rows])
    return y


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return onednn.linear(x, weight, None) if onednn.is_available() else F.linear(x, weight)
