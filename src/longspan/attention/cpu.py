"""Attention on a CPU: which of its drivers takes a call.

Holds `CPUBackend`. Must not know pages, ranks or models, nor how a driver computes.
Read next: `longspan.attention.native_cpu` (our compiled kernels), `longspan.attention.flash_cpu` (PyTorch's) and
`longspan.attention.softcap_cpu`; `longspan.attention.reference` is the meaning of all three.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.attention import flash_cpu, native_cpu, softcap_cpu
from longspan.attention.base import RowSegment, check_arguments, empty_like_queries
from longspan.attention.partial import PartialAttention
from longspan.attention.stored import are_stored, attend_converted
from longspan.kv.layout import KVSpec
from longspan.types import AttentionParams

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
"""Dtypes that the backend accepts and its tests cover."""


class CPUBackend:
    """Fast attention on CPUs in float32, bfloat16 and float64."""

    name = "cpu"

    def unsupported(self, spec: KVSpec, params: AttentionParams) -> str | None:
        """See `AttentionBackend.unsupported`."""
        names = [str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES]
        dtype = spec.compute_dtype
        return None if dtype in names else f"dtype: got {dtype}, the cpu backend takes {', '.join(names)}"

    def partial_attention(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Sequence[RowSegment], params: AttentionParams
    ) -> PartialAttention:
        """See `AttentionBackend.partial_attention`.

        Raises:
            ValueError: also for a dtype that is not in `KERNEL_DTYPES`, or k or v strided in the last dimension.
        """
        check_arguments(q, k, v, segments, params)
        if q.dtype not in KERNEL_DTYPES:
            raise ValueError(f"dtype: {q.dtype}; the cpu backend takes {', '.join(map(str, KERNEL_DTYPES))}")
        if (k.stride(2) != 1 and k.shape[2] > 1) or (v.stride(2) != 1 and v.shape[2] > 1):
            raise ValueError("k and v must be contiguous in the last dimension")
        if q.stride(2) != 1:
            q = q.contiguous()
        if q.shape[1] == 0:
            return empty_like_queries(q, v)
        if are_stored(q, k) and (params.softcap is not None or not native_cpu.takes(q, v)):
            return attend_converted(self.partial_attention, q, k, v, segments, params)
        if params.softcap is not None:
            return softcap_cpu.partial_attention(q, k, v, segments, params)
        if native_cpu.takes(q, v):
            return native_cpu.partial_attention(q, k, v, segments, params)
        return flash_cpu.partial_attention(q, k, v, segments, params)
