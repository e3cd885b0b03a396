"""Test of an attention kernel against the reference on the machine where it will run.

Holds the comparison. Must not know which kernel it is.
Read next: `longspan.attention.reference`.
"""

import torch
from torch import Tensor

from longspan.attention.base import AttentionBackend, RowSegment
from longspan.attention.reference import ReferenceBackend
from longspan.errors import LongspanError
from longspan.kv.layout import KVGroup
from longspan.kv.stored import round_rows
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams

TOLERANCE = {"bfloat16": 0.02, "float16": 0.005, "float32": 1e-4}
"""Largest error of an output row, in parts of its length: several times the dtype's rounding. A row that lacks 3 of 100
keys errs by 0.17."""
LSE_TOLERANCE = {"bfloat16": 0.005, "float16": 0.005, "float32": 1e-4}
"""Largest error of a log-sum-exp. A row that lacks 3 of 100 keys errs by 0.03."""

NUM_KEYS = 1100
"""Keys of the test: enough that the kernel splits them for a lone query."""


def check_against_reference(
    backend: AttentionBackend, group: KVGroup, params: AttentionParams, device: torch.device | str
) -> None:
    """Compare a kernel with the reference on random tokens, once at start, since no test may have run on this GPU.

    Args:
        backend: this rank's attention kernel.
        group: heads, widths and dtype of the model.
        params: parameters of one of the model's layers.
        device: the GPU.

    Raises:
        LongspanError: outputs or log-sum-exps differ by more than `TOLERANCE` and `LSE_TOLERANCE`.
    """
    layout, generator = group.spec.layout, torch.Generator().manual_seed(1)
    dtype: torch.dtype = getattr(torch, group.spec.compute_dtype)
    q = torch.randn(150, group.num_query_heads, layout.k_width, generator=generator).to(device, dtype)
    k = torch.randn(layout.num_kv_heads, NUM_KEYS, layout.k_width, generator=generator).to(device, dtype)
    v = torch.randn(layout.num_kv_heads, NUM_KEYS, layout.v_width, generator=generator).to(device, dtype)
    k, v = (
        round_rows(rows, part) for rows, part in zip((k, v), (*layout.components, layout.components[0]), strict=False)
    )
    if layout.v_width_in_k is not None:
        v = k[:, :, : layout.v_width_in_k]
    edge = Visibility.CAUSAL if params.window is None else Visibility.BAND
    segments = [
        RowSegment(0, 6, 100, 0, 100, None, Visibility.FULL),
        RowSegment(0, 6, 100, 100, 6, 100, Visibility.CAUSAL),
        RowSegment(6, 1, 50, 110, 40, None, Visibility.FULL),
        RowSegment(7, 1, 120, 0, 40, 100, edge),
        # nothing for row 8; a chunk that is long enough for every kernel of prefill, and a decode for several splits
        RowSegment(9, 140, 800, 0, 170, None, Visibility.FULL),
        RowSegment(9, 140, 800, 300, 140, 800, Visibility.CAUSAL),
        RowSegment(149, 1, NUM_KEYS, 0, NUM_KEYS, None, Visibility.FULL),
    ]
    found = backend.partial_attention(q, k, v, segments, params)
    if k.dtype is dtype:
        k, v = k.float(), v.float()
    if layout.v_width_in_k is not None:
        v = k[:, :, : layout.v_width_in_k]
    expected = ReferenceBackend().partial_attention(q.float(), k, v, segments, params)
    what = f"the {backend.name} backend on {device}"
    check_rows(found.out, expected.out, group.spec.compute_dtype, what)
    if not torch.allclose(found.lse.float(), expected.lse, rtol=0.0, atol=LSE_TOLERANCE[group.spec.compute_dtype]):
        raise LongspanError(f"log-sum-exps of {what} are not those of the reference")


def check_rows(ours: Tensor, right: Tensor, dtype: str, what: str) -> None:
    """Compare outputs [T, H, Dv] row by row with those of the reference.

    Args:
        ours: outputs of `what`.
        right: outputs of the reference.
        dtype: dtype that `what` computes in.
        what: name of what is checked, for the error.

    Raises:
        LongspanError: they differ by more than `TOLERANCE`.
    """
    errors = (ours.float() - right.float()).norm(dim=-1)
    if not (errors <= TOLERANCE[dtype] * right.float().norm(dim=-1) + 1e-6).all():  # NaN is not, either
        raise LongspanError(f"outputs of {what} are not those of the reference")
