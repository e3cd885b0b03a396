"""Which attention kernel runs on a device.

Holds the table of names. Must not know what the kernels do.
Read next: `longspan.attention.base`.
"""

from __future__ import annotations

import torch

from longspan.attention.base import AttentionBackend
from longspan.attention.cpu import CPUBackend
from longspan.attention.reference import ReferenceBackend
from longspan.errors import ConfigError

BACKEND_NAMES = ("auto", "cpu", "reference")
"""Legal values of the option `attention_backend`."""


def make_backend(name: str, device: torch.device | str) -> AttentionBackend:
    """The backend called `name`, ready to run on `device`.

    Args:
        name: one of `BACKEND_NAMES`; "auto" is the fast backend of the device.
        device: where q, k and v will lie.

    Raises:
        ConfigError: the name is unknown, or the backend cannot run on the device.
    """
    device_type = torch.device(device).type
    if name not in BACKEND_NAMES:
        raise ConfigError(f"attention_backend: {name!r}; legal values: {', '.join(BACKEND_NAMES)}")
    if name == "reference":
        return ReferenceBackend()
    if device_type != "cpu":
        raise ConfigError(
            f"attention_backend: {name!r} on device {device_type!r}; legal values there: reference (dense, slow)"
        )
    return CPUBackend()
