"""Small integer arrays on their way to a device.

Holds the copy that nobody waits for. Must not know what the integers mean.
Read next: `longspan.attention.triton`, `longspan.cp.fixed`.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def staged(array: NDArray[Any], device: torch.device) -> Tensor:
    """A tensor on the host, of the array's shape and dtype, from which a copy to `device` need not be waited for.

    For a GPU it is pinned; PyTorch keeps that memory until the copy is done.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device."""
    return staged(array, device).to(device, non_blocking=True)
