"""Float32 matrix products by oneDNN.

Holds one call. Must not know attention, pages or plans.
Read next: `longspan.models.linear`, which calls it.

PyTorch gives float32 products on a CPU to MKL, which uses 256 of the 512 bits of an AMD core's registers: 105 to 110
GFLOP/s on one core of a Zen 5, where oneDNN reaches 230 to 250. It is as fast from 9 rows on as from 2048, and takes
the weights as they lie. On a core of a Zen 3, which has registers of 256 bits, it is 1.0 to 1.3 times as fast as MKL.
"""

from functools import cache

import torch
from torch import Tensor


@cache
def is_available() -> bool:
    """Whether this torch has oneDNN, and this CPU has registers that oneDNN uses better than MKL."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `F.linear` in float32 on a CPU.

    Args:
        x: [..., width].
        weight: [num_out, width], contiguous.
        bias: [num_out] or None.
    """
    # The operator that PyTorch's own compiler calls; it has no public name.
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
