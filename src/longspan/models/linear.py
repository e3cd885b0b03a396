"""Fast linear layers on a CPU, for few rows and for many.

Holds the replacement of `nn.Linear`. Must not know attention, pages or plans.
Read next: `longspan.native.kernels` for few rows, `longspan.native.onednn` for many.

A decode step multiplies every weight by one row per request, for which BLAS reads weights at a third of the memory
bandwidth: 88 MB of a 22 M parameter model took 8 ms on one thread and on two, and take 3.2 and 2.5 with the kernel.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longspan.native import kernels, onednn


class CPULinear(nn.Linear):
    """`nn.Linear` that uses the compiled kernel if `kernels.can_multiply` holds, and oneDNN for more float32 rows."""

    def forward(self, input: Tensor) -> Tensor:  # the argument's name is that of nn.Linear
        weight = self.weight
        num_rows = input.numel() // input.shape[-1]
        if input.dtype is weight.dtype:
            if kernels.is_available() and kernels.can_multiply(num_rows, weight.shape[1], weight.dtype):
                out = kernels.linear(input, weight)
                return out if self.bias is None else out.add_(self.bias)
            if num_rows and weight.dtype is torch.float32 and onednn.is_available():
                return onednn.linear(input, weight, self.bias)
        return F.linear(input, weight, self.bias)


def replace_linears_(model: nn.Module) -> int:
    """Let linear layers of a model on a CPU use the compiled kernel and oneDNN; return how many layers.

    Weights stay as they are. Layers of another class, or whose weights are no plain contiguous tensors, are left alone.
    """
    count = 0
    for module in model.modules():
        if type(module) is nn.Linear and type(module.weight.data) is Tensor and module.weight.is_contiguous():
            module.__class__ = CPULinear
            count += 1
    return count
