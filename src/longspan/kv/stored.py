"""Rows of keys and values as they lie in memory and travel: rounded elements, and behind them the row's scale.

Holds the rounding of rows and its inverse. Must not know pages, ranks or attention.
Read next: `longspan.kv.layout`, Note [Dtypes]; `longspan.kv.pool`, which writes rows; `longspan.attention.stored`,
which reads them where no kernel does.

Note [Stored rows]
    One head of one token is a row. A row whose dtype needs a scale holds it in float32 behind its elements:

        int8, 4 elements of width       | e0 | e1 | e2 | e3 | scale, 4 bytes |       element i is e_i * scale

    The scale is the largest element's absolute value over the dtype's largest number. So a row is whole wherever it
    goes: pages, copies and messages move rows and do not know of scales. Rows are rounded once, before anything moves,
    so that any number of ranks computes with the same numbers.

    PyTorch computes nothing with 8-bit floats on a CPU and lacks operators for them, so their bytes lie in tensors of
    uint8; int8 lies in int8. The dtype of a tensor tells them apart (`holds`).
"""

import torch
from torch import Tensor

from longspan.kv.layout import KVComponent

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""Largest number of a dtype with scales."""
HELD_IN = {"int8": torch.int8, "float8_e4m3fn": torch.uint8}
SCALE_BYTES = 4


def holds(component: KVComponent) -> torch.dtype:
    """Dtype of the tensors that hold a component's rows."""
    found = HELD_IN.get(component.dtype)
    return getattr(torch, component.dtype) if found is None else found


def round_rows(rows: Tensor, component: KVComponent) -> Tensor:
    """Return rows as they are stored.

    Args:
        rows: [..., width] of any float dtype.
        component: how rows are stored.

    Returns:
        [..., stored_width] of `holds(component)`; `rows` itself where nothing changes. A row of zeros has scale 0.
    """
    if component.scale_dtype is None:
        return rows.to(holds(component))
    exact = rows.float()
    scale = exact.abs().amax(dim=-1, keepdim=True) / LARGEST[component.dtype]
    numbers = torch.where(scale > 0, exact / scale, 0.0)
    if component.dtype == "int8":
        numbers = numbers.round_().clamp_(-127, 127)
    elements = numbers.to(getattr(torch, component.dtype)).view(holds(component))
    return torch.cat((elements, scale.view(holds(component))), dim=-1)


def exact_rows(stored: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return rows as kernels compute with them.

    Args:
        stored: [..., stored_width] of a stored dtype, contiguous in the last dimension.
        width: elements of a row, which may be fewer than are stored.
        dtype: dtype of the result.

    Returns:
        [..., width].
    """
    if stored.dtype not in HELD_IN.values():
        return stored[..., :width].to(dtype)
    elements = stored[..., :width]
    if stored.dtype is torch.uint8:
        elements = elements.contiguous().view(torch.float8_e4m3fn)
    scale = stored[..., -SCALE_BYTES:].contiguous().view(torch.float32)  # [..., 1]
    return (elements.float() * scale).to(dtype)


def stored_dtype(stored: Tensor) -> str:
    """Name of the dtype of a tensor's stored elements, as layouts have it."""
    names = {held: name for name, held in HELD_IN.items()}
    return names.get(stored.dtype, str(stored.dtype).removeprefix("torch."))


def row_width(stored: Tensor) -> int:
    """Elements of a row [..., stored_width], its scale not counted."""
    return stored.shape[-1] - (SCALE_BYTES if stored.dtype in HELD_IN.values() else 0)
