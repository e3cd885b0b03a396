"""Whether a kernel computes on this machine what it computes on ours.

Holds one comparison. Must not know which kernel it is.
Read next: `longspan.attention.reference`.
"""

import torch

from longspan.attention.base import AttentionBackend, RowSegment
from longspan.attention.reference import ReferenceBackend
from longspan.errors import LongspanError
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams, KVGroup

TOLERANCE = {"bfloat16": 0.05, "float16": 0.02, "float32": 0.001}
"""Of outputs and log-sum-exps of standard normal numbers, several times what the dtype rounds."""


def check_against_reference(
    backend: AttentionBackend, group: KVGroup, params: AttentionParams, device: torch.device | str
) -> None:
    """Compare a kernel with the reference on random tokens, once at start: nobody else has on this GPU.

    Args:
        backend: of this rank.
        group: heads, widths and dtype of the model.
        params: of one of its layers.
        device: the GPU.

    Raises:
        LongspanError: they differ by more than the dtype's rounding.
    """
    spec, generator = group.spec, torch.Generator().manual_seed(1)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    q = torch.randn(9, group.num_query_heads, spec.k_width, generator=generator).to(device, dtype)
    k = torch.randn(spec.num_kv_heads, 150, spec.k_width, generator=generator).to(device, dtype)
    v = torch.randn(spec.num_kv_heads, 150, spec.v_width, generator=generator).to(device, dtype)
    segments = [
        RowSegment(0, 6, 100, 0, 100, None, Visibility.FULL),
        RowSegment(0, 6, 100, 100, 6, 100, Visibility.CAUSAL),
        RowSegment(6, 1, 50, 110, 40, None, Visibility.FULL),
    ]  # and nothing for row 7
    if params.window is None:
        segments.append(RowSegment(8, 1, 120, 0, 40, 100, Visibility.CAUSAL))
    else:
        segments.append(RowSegment(8, 1, 120, 0, 40, 100, Visibility.BAND))
    found = backend.partial_attention(q, k, v, segments, params)
    expected = ReferenceBackend().partial_attention(q.float(), k.float(), v.float(), segments, params)
    for what, ours, right in (("outputs", found.out, expected.out), ("log-sum-exps", found.lse, expected.lse)):
        if not torch.allclose(ours.float(), right, rtol=0.0, atol=TOLERANCE[spec.dtype]):
            raise LongspanError(f"{what} of the {backend.name} backend on {device} are not those of the reference")
