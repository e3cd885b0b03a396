"""Binding of the compiled kernel `norm.c`: norms of rows by their root mean square.

Holds the call. Must not know Transformers.
Read next: `longspan.models.cpu_norms`, which calls it.
"""

import torch
from torch import Tensor

from longspan.native.kernels import LANES, library

GATES = (None, "silu", "sigmoid")
"""Activations of a gate, in the order of norm.c; None: there is no gate."""


def can_norm(width: int) -> bool:
    """Whether `rms_norm` takes rows of this width."""
    return width % LANES == 0 and width > 0 and library() is not None


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, gate: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Divide rows by their root mean square, and multiply by a weight and by the activation of a gate.

    Args:
        x: [..., width] float32, like all others, on the CPU; `can_norm` admits the width.
        weight: [width], contiguous.
        epsilon: added to the mean of squares.
        gate: [..., width], as many rows as `x`, or None.
        activation: one of `GATES`; None without a gate.

    Returns:
        As `x`, contiguous.
    """
    found = library()
    assert found is not None
    assert (gate is None) == (activation is None)
    x = x.contiguous()
    gate = None if gate is None else gate.contiguous()
    assert gate is None or gate.numel() == x.numel()
    out = torch.empty(x.shape)
    width = x.shape[-1]
    status = found.longspan_rms_norm(
        *(x.data_ptr(), weight.data_ptr(), None if gate is None else gate.data_ptr(), x.numel() // width, width),
        *(epsilon, GATES.index(activation), torch.get_num_threads(), out.data_ptr()),
    )
    assert status == 0, f"norm kernel refused rows of {width}"
    return out
