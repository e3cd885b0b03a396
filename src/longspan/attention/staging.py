"""Copies of small integer arrays to a device.

Holds the asynchronous copy. Must not know what the integers mean.
Read next: `longspan.attention.triton`, `longspan.cp.fixed`.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def staged(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return a host tensor of the array's shape and dtype that can be copied to `device` asynchronously.

    For a GPU its memory is pinned; PyTorch keeps that memory until the copy is done.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to the device, asynchronously."""
    return staged(array, device).to(device, non_blocking=True)
