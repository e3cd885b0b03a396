"""Choice of the attention backend of a device.

Holds the table of names. Must not know how kernels compute; imports Triton and FlashInfer only where they are used.
Read next: `longspan.attention.base`.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from longspan.attention.base import AttentionBackend
from longspan.attention.cpu import CPUBackend
from longspan.attention.cudnn import CudnnPrefill
from longspan.attention.dense import DenseBackend
from longspan.attention.reference import ReferenceBackend
from longspan.attention.torch_flash import TorchFlash
from longspan.errors import ConfigError

BACKEND_NAMES = ("auto", "cpu", "reference", "triton", "flashinfer", "cudnn", "torch")
"""Legal values of the option `attention_backend`."""

ON_CUDA = ("triton", "flashinfer", "cudnn", "torch", "reference")
"""Names of the backends that run on a GPU."""

MIN_CAPABILITY = (8, 0)
"""Lowest CUDA compute capability of a GPU: older ones have no bfloat16."""


def make_backend(name: str, device: torch.device | str) -> AttentionBackend:
    """Make the backend called `name`, ready to run on `device`.

    Args:
        name: one of `BACKEND_NAMES`; "auto" is the fast backend of the device: on a GPU `triton`, or `torch` where
            Triton is not installed.
        device: device of q, k and v.

    Raises:
        ConfigError: the name is unknown, or the backend is not installed or cannot run on the device.
    """
    device_type = torch.device(device).type
    if name not in BACKEND_NAMES:
        raise ConfigError(f"attention_backend: got {name!r}, legal is one of {', '.join(BACKEND_NAMES)}")
    if name == "reference":
        return ReferenceBackend()
    if device_type == "cpu":
        if name in ("auto", "cpu"):
            return CPUBackend()
        if name == "triton" and _is_installed("triton"):
            from longspan.attention.triton import TritonBackend
            from longspan.triton_kernels.launch import INTERPRETED

            if INTERPRETED:
                return TritonBackend()
        raise ConfigError(
            f"attention_backend: got {name!r} on a CPU, legal there is auto, cpu or reference (dense, slow), or triton "
            "with TRITON_INTERPRET=1 in the environment (for tests, slow)"
        )
    if name == "cpu" or device_type != "cuda":
        raise ConfigError(
            f"attention_backend: got {name!r} on device {device_type!r}, legal is device cpu with auto, cpu or "
            f"reference, and device cuda with auto, {', '.join(ON_CUDA)}"
        )
    return _on_cuda(name)


def _on_cuda(name: str) -> AttentionBackend:
    if name == "auto":
        name = "triton" if _is_installed("triton") else "torch"
    if name == "torch":
        return DenseBackend(TorchFlash(), None)
    if not _is_installed("triton"):
        raise ConfigError(f"attention_backend: got {name!r} without Triton, legal is torch, or pip install triton")
    from longspan.attention.triton import TritonBackend

    if name == "triton":
        return TritonBackend()
    if name == "cudnn":
        return DenseBackend(CudnnPrefill(), TritonBackend())
    if not _is_installed("flashinfer"):
        raise ConfigError(
            f"attention_backend: got {name!r}, which is not installed, legal is pip install 'longspan[flashinfer]'"
        )
    from longspan.attention.flashinfer import FlashInferPrefill

    return DenseBackend(FlashInferPrefill(), TritonBackend())


def _is_installed(module: str) -> bool:
    return find_spec(module) is not None
