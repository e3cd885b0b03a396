"""Weight matrices of 8 or 4 bits, and products with them.

Holds the format, its packing and the binding of the compiled kernels `packed.c`. Must not know models or where weights
come from.
Read next: `longspan.models.packed_linear`, which calls it; `docs/decisions/0034-quantised-weights.md`.

A weight is `(number - zero) * scale`, with one scale for a group of weights of one output. Numbers of 8 bits are signed
and have no zero; numbers of 4 bits are 0 to 15, and lie as `packed.c` draws it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longspan.native.kernels import library

MAX_ROWS = 32
"""Rows from which on it is faster to unpack the matrix for a product of dense matrices."""

BLOCK = 32
"""Weights that the kernels unpack together; a group is a multiple of it."""


class PackedMatrix(NamedTuple):
    """Weight matrix [num_out, width] of 8 or 4 bits."""

    data: Tensor
    """[num_out, width] int8, or [num_out, width / 2] uint8; contiguous, as the others."""
    scale: Tensor
    """[num_out, groups] float32."""
    zero: Tensor | None
    """[num_out, groups] uint8 for 4 bits, else None."""

    @property
    def bits(self) -> int:
        return 8 if self.zero is None else 4

    @property
    def shape(self) -> tuple[int, int]:
        """Number of outputs and of inputs."""
        return self.data.shape[0], self.data.shape[1] * 8 // self.bits

    @property
    def group_size(self) -> int:
        """Consecutive weights of an output that share a scale."""
        return self.shape[1] // self.scale.shape[1]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self if tensor is not None)

    def rows(self, first: int, last: int) -> "PackedMatrix":
        """Return some outputs, without a copy."""
        zero = None if self.zero is None else self.zero[first:last]
        return PackedMatrix(self.data[first:last], self.scale[first:last], zero)


def pack(numbers: Tensor, scale: Tensor, zero: Tensor | None) -> PackedMatrix:
    """Pack a matrix of whole numbers.

    Args:
        numbers: [num_out, width] of any integer type: -128 to 127 without zeros, else 0 to 15.
        scale: [num_out, groups], or anything that broadcasts to it.
        zero: as scale, whole numbers of 0 to 255; None for 8 bits.

    Raises:
        ValueError: a group is no multiple of `BLOCK`.
    """
    num_out, width = numbers.shape
    groups = scale.shape[-1]
    if width % groups or (width // groups) % BLOCK:
        raise ValueError(f"{width} weights in {groups} groups: a group is no multiple of {BLOCK}")
    scales = scale.float().expand(num_out, groups).contiguous()
    if zero is None:
        return PackedMatrix(numbers.to(torch.int8).contiguous(), scales, None)
    blocks = numbers.to(torch.uint8).reshape(num_out, width // BLOCK, 2, BLOCK // 2)
    data = (blocks[:, :, 0] | (blocks[:, :, 1] << 4)).view(num_out, width // 2)
    return PackedMatrix(data.contiguous(), scales, zero.to(torch.uint8).expand(num_out, groups).contiguous())


def unpack(matrix: PackedMatrix) -> Tensor:
    """Return the matrix as [num_out, width] float32."""
    num_out, width = matrix.shape
    found = library()
    if found is None or not num_out:
        return _unpack_by_torch(matrix)
    out = torch.empty(num_out, width)
    status = found.longspan_unpack(
        *_addresses(matrix), width, matrix.group_size, matrix.bits, num_out, torch.get_num_threads(), out.data_ptr()
    )
    assert status == 0, f"unpacking refused {num_out} x {width} of {matrix.bits} bits"
    return out


def _unpack_by_torch(matrix: PackedMatrix) -> Tensor:
    num_out, width = matrix.shape
    numbers = matrix.data
    if matrix.zero is not None:
        blocks = numbers.view(num_out, width // BLOCK, 1, BLOCK // 2)
        numbers = torch.cat([blocks & 15, blocks >> 4], dim=2)
    grouped = numbers.reshape(num_out, -1, matrix.group_size).float()  # [num_out, groups, group]
    if matrix.zero is not None:
        grouped -= matrix.zero[..., None].float()
    return (grouped * matrix.scale[..., None]).view(num_out, width)


def can_multiply(num_rows: int) -> bool:
    """Whether `linear` takes this number of rows."""
    return 1 <= num_rows <= MAX_ROWS and library() is not None


def linear(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """Multiply a few rows by the transpose of a packed matrix, accumulating in float32.

    Args:
        x: [..., width] float32, with as many rows as `can_multiply` admits.
        matrix: matrix [num_out, width] on the CPU.

    Returns:
        [..., num_out] float32: to the last bit what `kernels.linear` makes of the unpacked matrix.
    """
    found = library()
    assert found is not None
    num_out, width = matrix.shape
    rows = x.contiguous()
    out = torch.empty(*x.shape[:-1], num_out)
    num_rows = rows.numel() // width
    status = found.longspan_packed_linear(
        rows.data_ptr(),
        *_addresses(matrix),
        *(width, matrix.group_size, matrix.bits, num_rows, num_out, torch.get_num_threads(), out.data_ptr()),
    )
    assert status == 0, f"packed kernel refused {num_rows} rows of {width} for {num_out} outputs"
    return out


def _addresses(matrix: PackedMatrix) -> tuple[int, int, int | None]:
    """Return where data, scales and zeros lie."""
    zero = None if matrix.zero is None else matrix.zero.data_ptr()
    return matrix.data.data_ptr(), matrix.scale.data_ptr(), zero
