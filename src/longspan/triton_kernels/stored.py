"""Rows of keys and values that are stored in another dtype than is computed with, as kernels read and write them.

Holds the conversions inside kernels, and the places of scales. Must not know pools, queries or how kernels use them.
Read next: `longspan.kv.stored`, Note [Stored rows], whose roundings these are, bit by bit.

Note [8-bit floats]
    Compute capability 8.0 and 8.6 have no instructions for 8-bit floats, so their bits are moved: e4m3 has the sign and
    4 bits of exponent of bias 7, float16 5 bits of bias 15. The bits of e4m3, moved to where float16 has its exponent,
    are the number over 2 ** 8, subnormal numbers included. That factor goes to the row's scale.

        e4m3       s eeee mmm              1 0111 100 = -1.5
        float16    s 0eeee mmm0000000      1 00111 1000000000 = -1.5 / 256
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.kv.stored import HELD_IN, LARGEST, SCALE_BYTES

SAME, INT8, FP8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Ways to store: in the dtype of computing; in 8 bits, as whole numbers or floats, with a scale for each row."""

FP8_FACTOR = tl.constexpr(256.0)
"""What an 8-bit float's bits, read as those of a float16, are smaller by. See Note [8-bit floats]."""

_LARGEST_INT8, _LARGEST_FP8 = tl.constexpr(LARGEST["int8"]), tl.constexpr(LARGEST["float8_e4m3fn"])


def stored_kind(rows: Tensor, dtype: torch.dtype) -> int:
    """Way in which rows are stored, where `dtype` is computed with."""
    found: int = {HELD_IN["int8"]: INT8, HELD_IN["float8_e4m3fn"]: FP8, dtype: SAME}[rows.dtype].value
    return found


def scales_of(rows: Tensor) -> Tensor:
    """Scales [Hkv, S] float32 of stored rows [Hkv, S, stored D], a view; without scales, any tensor."""
    if rows.dtype not in HELD_IN.values():
        return rows
    assert rows.shape[2] % SCALE_BYTES == 0, "rows with scales are whole words"
    return rows.view(torch.float32)[:, :, -1]


@triton.jit
def widen(x, dtype: tl.constexpr, STORED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Convert loaded elements to the dtype of computing: 8-bit ones without scales, floats of them over FP8_FACTOR."""
    if STORED == FP8:
        bits = x.to(tl.uint16)
        x = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return x.to(dtype)


@triton.jit
def row_scale(x, STORED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale of one row of float32."""
    largest = tl.max(tl.abs(x), 0)
    return tl.math.div_rn(largest, _LARGEST_INT8 if STORED == INT8 else _LARGEST_FP8)


@triton.jit
def _whole(x):  # type: ignore[no-untyped-def]
    """Round float32 numbers below 2 ** 22 to the nearest whole ones, halves to even ones."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def narrow(x, scale, STORED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round one row of float32 to the 8 bits in which it is stored, as int8 or as the bits of an 8-bit float."""
    numbers = tl.where(scale > 0.0, tl.math.div_rn(x, tl.where(scale > 0.0, scale, 1.0) + tl.zeros_like(x)), 0.0)
    if STORED == INT8:
        found = tl.minimum(tl.maximum(_whole(numbers), -127.0), 127.0).to(tl.int8)
    else:
        size = tl.abs(numbers)
        bits = size.to(tl.int32, bitcast=True)
        # 3 bits of mantissa are left of 23, and the exponent's bias falls by 120.
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        below = _whole(size * 512.0).to(tl.int32)  # subnormal ones are multiples of 2 ** -9
        code = tl.where(size < 0.015625, below, normal)
        sign = (numbers.to(tl.int32, bitcast=True) >> 24) & 0x80
        found = (code | sign).to(tl.uint8)
    return found
