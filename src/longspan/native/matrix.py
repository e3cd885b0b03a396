"""Weight matrices of any kind as the kernels see them: the structure `longspan_matrix` of `linear.h`.

Holds the conversion. Must not know layers or mixtures.
Read next: `longspan.native.packed`, the matrices of 8 and 4 bits; `longspan.native.layer` and
`longspan.native.experts`, whose kernels take matrices.
"""

import ctypes

import torch
from torch import Tensor

from longspan.native.packed import PackedMatrix

Matrix = Tensor | PackedMatrix
"""Weight matrix [num_out, width] that a kernel takes: float32 or packed."""


class CMatrix(ctypes.Structure):
    """Matrix as `linear.h` declares it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "scale", "zero")),
        *((name, ctypes.c_long) for name in ("group", "bits")),
    ]


def is_taken(weight: Tensor) -> bool:
    """Whether kernels can read a dense tensor where it lies."""
    return weight.dtype is torch.float32 and weight.is_contiguous() and weight.device.type == "cpu"


def c_matrix(weight: Matrix | None) -> CMatrix:
    """Describe a matrix, which must stay in memory; None is a matrix that no kernel reads.

    Raises:
        ValueError: kernels do not take the tensor.
    """
    if isinstance(weight, PackedMatrix):
        zero = None if weight.zero is None else weight.zero.data_ptr()
        return CMatrix(weight.data.data_ptr(), weight.scale.data_ptr(), zero, weight.group_size, weight.bits)
    if weight is not None and not is_taken(weight):
        raise ValueError(f"no kernel for a matrix of {weight.dtype} on {weight.device.type}")
    return CMatrix(None if weight is None else weight.data_ptr(), None, None, 0, 32)
