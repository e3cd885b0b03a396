"""Launches of kernels: on a GPU, or, for tests, in Triton's interpreter on a CPU.

Holds the difference between the two. Must not know what the kernels compute.
Read next: `longspan.triton_kernels.attention`.

Note [Interpreter]
    With TRITON_INTERPRET=1 in the environment when these modules are imported, kernels run in NumPy on CPU tensors. It
    patches Triton's language while a kernel runs, so ranks that are threads take turns. Its `tl.dot` of bfloat16 is
    silently wrong (seen in Triton 3.6 and 3.7), so kernels convert to float32 there first: `UPCAST`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in the interpreter; fixed when this module is imported."""

_TURN = threading.Lock()


@contextmanager
def on_device(tensor: torch.Tensor) -> Iterator[None]:
    """Make the tensor's GPU the current one, where Triton launches. Surrounds every launch."""
    if INTERPRETED:
        with _TURN:
            yield
        return
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        yield


def shared_bytes(device: torch.device) -> int:
    """Bytes of shared memory that one block of threads can have; in the interpreter those of compute capability 9.0."""
    if device.type != "cuda":
        return 232_448
    return _shared_bytes(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _shared_bytes(index: int) -> int:
    found: int = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]  # Triton's own bound
    return found


def can_run(device: torch.device) -> bool:
    """Whether kernels can run on tensors of a device."""
    return device.type == "cuda" or (INTERPRETED and device.type == "cpu")
