"""This machine's GPUs as NVIDIA's management library (NVML) reports them, in milliseconds and without a CUDA context.

Holds the calls. Must not know what the driver does with the answers; where they leave a doubt there is none, and
PyTorch is asked instead.
Read next: `longspan.engine.gpus`.

Note [Order of GPUs]
    NVML counts GPUs by their place on the bus, CUDA the fastest ones first. Where all GPUs of a machine are of one kind
    both orders have the same facts but for free memory; so a machine with several kinds is a doubt, and so is a
    CUDA_VISIBLE_DEVICES that is no list of numbers, or a GPU that is divided (MIG), of which CUDA sees a part.
    Source: NVML API reference, "Device Queries"; CUDA C++ Programming Guide, CUDA_DEVICE_ORDER.
"""

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

LIBRARY = "libnvidia-ml.so.1"
_NAME_BYTES = 96


class Found(NamedTuple):
    """One GPU."""

    name: str
    capability: tuple[int, int]
    """Compute capability, major and minor."""
    free_bytes: int


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _DoubtError(Exception):
    """NVML does not answer."""


def look(visible: str | None, load: Callable[[str], Any] = ctypes.CDLL) -> list[Found] | None:
    """Return the GPUs in CUDA's order, or None where NVML does not know them. See Note [Order of GPUs].

    Args:
        visible: the variable CUDA_VISIBLE_DEVICES, or None if it is not set.
        load: loads a library.
    """
    try:
        library = load(LIBRARY)
        _call(library.nvmlInit_v2)
    except (OSError, AttributeError, _DoubtError):
        return None
    try:
        count = ctypes.c_uint()
        _call(library.nvmlDeviceGetCount_v2, ctypes.byref(count))
        gpus = [_one(library, index) for index in range(count.value)]
    except (AttributeError, _DoubtError):
        return None
    finally:
        library.nvmlShutdown()
    if len({(gpu.name, gpu.capability) for gpu in gpus}) > 1:
        return None
    if visible is None:
        return gpus
    indices = [part.strip() for part in visible.split(",")]
    if not all(index.isdecimal() and int(index) < len(gpus) for index in indices) or len({*indices}) < len(indices):
        return None
    return [gpus[int(index)] for index in indices]


def _one(library: Any, index: int) -> Found:
    handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(_NAME_BYTES)
    major, minor, memory = ctypes.c_int(), ctypes.c_int(), _Memory()
    _call(library.nvmlDeviceGetHandleByIndex_v2, ctypes.c_uint(index), ctypes.byref(handle))
    divided, later = ctypes.c_uint(), ctypes.c_uint()
    is_known = library.nvmlDeviceGetMigMode(handle, ctypes.byref(divided), ctypes.byref(later)) == 0
    if is_known and divided.value:
        raise _DoubtError
    _call(library.nvmlDeviceGetName, handle, name, ctypes.c_uint(_NAME_BYTES))
    _call(library.nvmlDeviceGetCudaComputeCapability, handle, ctypes.byref(major), ctypes.byref(minor))
    _call(library.nvmlDeviceGetMemoryInfo, handle, ctypes.byref(memory))
    return Found(name.value.decode(), (major.value, minor.value), memory.free)


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments) != 0:
        raise _DoubtError
