"""Experts of a mixture whose weights stay at 8 or 4 bits, on a CPU.

Holds the module, the rounding of dense experts and their replacement in a model. Must not know ranks or plans.
Read next: `longspan.models.packed_linear`, the same for linear layers; `longspan.native.experts`, the kernel for few
tokens.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longspan.models.cpu_experts import is_plain, mixtures_of, sum_by_expert
from longspan.models.packed_linear import Bits, multiply_unpacked, rounded
from longspan.models.same_result import activation_name
from longspan.native import kernels
from longspan.native.experts import NativeExperts
from longspan.native.packed import BLOCK, PackedMatrix


class PackedExperts(nn.Module):
    """Gated MLPs over packed matrices in the place of Transformers' experts, computed in float32."""

    def __init__(self, gate_up: PackedMatrix, down: PackedMatrix, num_experts: int, act_fn: Any) -> None:
        """Take over the weights.

        Args:
            gate_up: [experts * 2 * inner, hidden], an expert's gate, then its up.
            down: [experts * hidden, inner].
            num_experts: number of experts.
            act_fn: activation function, one that `activation_name` knows.
        """
        super().__init__()
        self.num_experts, self.act_fn = num_experts, act_fn
        for name, matrix in (("gate_up", gate_up), ("down", down)):
            for part, tensor in zip(PackedMatrix._fields, matrix, strict=True):
                weight = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                self.register_parameter(f"{name}_{part}", weight)
        self._kernel: NativeExperts | None = None

    def matrix(self, name: str) -> PackedMatrix:
        """Return the weights `gate_up` or `down` of all experts."""
        data, scale, zero = (getattr(self, f"{name}_{part}") for part in PackedMatrix._fields)
        return PackedMatrix(data.data, scale.data, None if zero is None else zero.data)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum [T, width] of what the chosen experts [T, k] make of the tokens [T, width], scaled by scores [T, k]."""
        rows, scores = hidden_states.float(), top_k_weights.float()
        kernel = self._found_kernel()
        if kernel is not None and 0 < len(rows) <= kernel.max_tokens:
            return kernel(rows, top_k_index, scores).to(hidden_states.dtype)
        gate_up, down = self.matrix("gate_up"), self.matrix("down")
        compute = partial(self._expert, gate_up, down)
        return sum_by_expert(compute, self.num_experts, rows, top_k_index, scores).to(hidden_states.dtype)

    def _found_kernel(self) -> NativeExperts | None:
        if self._kernel is None and kernels.is_available():  # weights are where they stay when the first step comes
            gate_up, down = self.matrix("gate_up"), self.matrix("down")
            self._kernel = NativeExperts(gate_up, down, self.num_experts, activation_name(self.act_fn))
        return self._kernel

    def _expert(self, gate_up: PackedMatrix, down: PackedMatrix, expert: int, rows: Tensor) -> Tensor:
        """Compute one expert's output [n, width] for rows [n, width]."""
        each = gate_up.shape[0] // self.num_experts
        gate, up = multiply_unpacked(rows, gate_up.rows(expert * each, (expert + 1) * each)).chunk(2, dim=-1)
        each = down.shape[0] // self.num_experts
        inner = self.act_fn(gate) * up
        return multiply_unpacked(inner, down.rows(expert * each, (expert + 1) * each))


def can_round(experts: Any) -> bool:
    """Whether experts, which may be on the meta device, can be packed: gated MLPs whose widths the kernel takes."""
    if not is_plain(experts):
        return False
    try:
        activation_name(experts.act_fn)
    except ValueError:
        return False
    shape: torch.Size = experts.down_proj.shape  # [experts, hidden, inner]
    return shape[1] % BLOCK == 0 and shape[2] % BLOCK == 0


def round_experts_(model: nn.Module, bits: Bits) -> int:
    """Round the experts of a model, all of which `can_round`; return the number of replaced modules.

    One mixture after the other is replaced, so that no more than one is there twice.
    """
    found = mixtures_of(model)
    for name, experts in found:
        gate_up = _rounded(experts.gate_up_proj.data, bits)
        down = _rounded(experts.down_proj.data, bits)
        model.set_submodule(name, PackedExperts(gate_up, down, len(experts.down_proj), experts.act_fn).eval())
    return len(found)


def _rounded(weights: Tensor, bits: Bits) -> PackedMatrix:
    """Round [experts, num_out, width] to a matrix [experts * num_out, width], one expert at a time."""
    data, scale, zero = zip(*(rounded(weight, bits) for weight in weights), strict=True)
    return PackedMatrix(torch.cat(data), torch.cat(scale), None if zero[0] is None else torch.cat(zero))
