"""Linear layers whose weights stay at 8 or 4 bits, on a CPU.

Holds the module, the rounding of dense weights and the replacement of a model's linear layers. Must not know ranks,
plans or how repositories store weights.
Read next: `longspan.native.packed`, for the format and the kernel; `longspan.models.quantization`, for repositories.

A few rows meet the weights as they lie: a decode step reads a quarter or an eighth of float32's bytes. For more rows
some outputs at a time are unpacked, which a prompt's many rows pay for. Both compute in float32 with exactly the
weights that unpacking gives, so nothing depends on how many rows a step has.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longspan.models.latent import projections_of_latents
from longspan.native import onednn, packed
from longspan.native.packed import BLOCK, PackedMatrix

Bits = Literal[4, 8]

UNPACKED_BYTES = 2**23
"""Most bytes of float32 weights that are unpacked at once, unless one output has more."""

INT4_GROUP = 64
"""Weights of an output that share a scale when dense weights are rounded to 4 bits; a narrow layer has groups of 32."""


class PackedLinear(nn.Module):
    """`nn.Linear` over a packed matrix. Other dtypes than float32 are converted on the way in and out."""

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None) -> None:
        """Take over a matrix and a bias [num_out] or None."""
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.data = nn.Parameter(matrix.data, requires_grad=False)
        self.scale = nn.Parameter(matrix.scale, requires_grad=False)
        self.zero = None if matrix.zero is None else nn.Parameter(matrix.zero, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def matrix(self) -> PackedMatrix:
        """The weights."""
        return PackedMatrix(self.data.data, self.scale.data, None if self.zero is None else self.zero.data)

    def forward(self, hidden: Tensor) -> Tensor:
        """Multiply [..., width] and return [..., num_out] of the same dtype."""
        if hidden.is_meta:  # no kernel reads what is not there
            return hidden.new_empty(*hidden.shape[:-1], self.out_features)
        matrix = self.matrix
        rows = hidden.float()
        if packed.can_multiply(rows.numel() // rows.shape[-1]):
            out = packed.linear(rows, matrix)
        else:
            out = multiply_unpacked(rows, matrix)
        if self.bias is not None:
            out += self.bias
        return out.to(hidden.dtype)


def multiply_unpacked(rows: Tensor, matrix: PackedMatrix) -> Tensor:
    """Multiply many rows [..., width] float32, and unpack some outputs at a time."""
    num_out, width = matrix.shape
    out = rows.new_empty(*rows.shape[:-1], num_out)
    step = max(1, UNPACKED_BYTES // (4 * width))
    for first in range(0, num_out, step) if rows.numel() else ():
        weight = packed.unpack(matrix.rows(first, min(first + step, num_out)))
        is_fast = onednn.is_available()
        out[..., first : first + step] = onednn.linear(rows, weight, None) if is_fast else F.linear(rows, weight)
    return out


def rounded(weight: Tensor, bits: Bits) -> PackedMatrix:
    """Round a dense matrix.

    With 8 bits an output has one scale, and its largest weight is 127. With 4 bits a group reaches from its least to
    its largest weight, 0 included, and 0 stays 0.

    Args:
        weight: [num_out, width], of any float dtype; width a multiple of `BLOCK`.
        bits: of a weight.
    """
    num_out, width = weight.shape
    if bits == 8:
        dense = weight.float()
        scale = (dense.abs().amax(dim=1, keepdim=True) / 127).clamp_min_(torch.finfo(torch.float32).tiny)
        return packed.pack((dense / scale).round_().clamp_(-127, 127), scale, None)
    grouped = weight.float().view(num_out, -1, INT4_GROUP if width % INT4_GROUP == 0 else BLOCK)
    least, most = grouped.amin(dim=2).clamp_max_(0), grouped.amax(dim=2).clamp_min_(0)  # [num_out, groups]
    scale = ((most - least) / 15).clamp_min_(torch.finfo(torch.float32).tiny)
    zero = (-least / scale).round_()
    numbers = ((grouped / scale[..., None]).round_() + zero[..., None]).clamp_(0, 15)
    return packed.pack(numbers.view(num_out, width), scale, zero)


def linear_names(model: nn.Module) -> list[str]:
    """Names of a model's plain linear layers that can be packed."""
    taken = {id(module) for module in projections_of_latents(model)}
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and id(module) not in taken
        and module.in_features % BLOCK == 0
        and type(module.weight.data) is Tensor
    ]


def round_linears_(model: Any, bits: Bits) -> int:
    """Round all linear layers of a model that the kernels take; the layer of the logits has 8 bits.

    Embeddings keep their dtype, also where the layer of the logits shares their weights. One layer after the other is
    replaced, so that no more than one is there twice.

    Args:
        model: a Transformers model, which may be on the meta device.
        bits: of the weights of the other layers.

    Returns:
        Number of replaced layers.
    """
    names, output = linear_names(model), model.get_output_embeddings()
    for name in names:
        linear = model.get_submodule(name)
        replace_(model, name, rounded(linear.weight.data, 8 if linear is output else bits))
    return len(names)


def replace_(model: nn.Module, name: str, matrix: PackedMatrix) -> None:
    """Put a packed matrix in the place of a linear layer, whose bias stays."""
    bias: Any = model.get_submodule(name).bias
    model.set_submodule(name, PackedLinear(matrix, None if bias is None else bias.data).eval())
