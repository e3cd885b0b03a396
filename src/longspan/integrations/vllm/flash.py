"""Partial attention on a GPU, by vLLM's own FlashAttention. No GPU has run it: see `docs/vllm.md`.

Holds the cut of segments into calls, the kernel's edges, and the backend that vLLM's model classes ask for there. Must
not know plans, ranks or requests.
Read next: `longspan.attention.base`, which says what it must do; `longspan.integrations.vllm.staging`.

Note: what FlashAttention does
    `causal` is aligned to the bottom right: the last query sees the last key. So a causal call is made only for queries
    and keys that end at one position, and queries past the last key get a call of their own, which sees all. Queries
    that see no key are in no call: FlashAttention 2 gives them a log-sum-exp of +inf. The log-sum-exp is natural and
    [H, T]; K and V are [keys, Hkv, D] with any strides but the last.
    Source: vllm-project/flash-attention, vllm_flash_attn/flash_attn_interface.py and csrc/flash_attn/flash_api.cpp.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from longspan.attention.base import AttentionBackend, RowSegment, check_arguments, empty_like_queries
from longspan.attention.partial import PartialAttention, merge_rows_
from longspan.attention.reference import ReferenceBackend
from longspan.errors import LongspanError, UnsupportedModelError
from longspan.integrations.vllm.backend import StepAttentionImpl
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams, KVGroup, KVSpec

DTYPES = ("bfloat16", "float16")
"""What the kernel computes in."""
TOLERANCE = 0.05
"""Of outputs and log-sum-exps of standard normal numbers, several times what bfloat16 rounds."""


class FlashStepBackend(FlashAttentionBackend):
    """Takes the place of vLLM's FlashAttention backend in a worker."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[StepAttentionImpl]:
        return StepAttentionImpl


@dataclass(frozen=True, slots=True)
class FlashCall:
    """Rows that meet in one call: every query sees at least one key."""

    query_row: int
    num_queries: int
    key_row: int
    num_keys: int
    causal: bool
    """Query i sees the keys up to `i + num_keys - num_queries`; else all."""


def calls_of(segment: RowSegment) -> Iterator[FlashCall]:
    """What to call for a segment. See Note: what FlashAttention does.

    Raises:
        LongspanError: a sliding window, which the plugin refuses at start.
    """
    if segment.visibility is Visibility.NONE or not segment.num_queries or not segment.num_keys:
        return
    if segment.visibility is Visibility.FULL:
        yield FlashCall(segment.query_row, segment.num_queries, segment.key_row, segment.num_keys, False)
        return
    if segment.visibility is not Visibility.CAUSAL:
        raise LongspanError(f"{segment.visibility} attention is not supported on a GPU")
    assert segment.key_position is not None
    query_end, key_end = segment.query_position + segment.num_queries, segment.key_position + segment.num_keys
    first = max(segment.query_position, segment.key_position)  # the first query that sees a key
    cut = min(query_end, key_end)  # queries from here on see all keys
    if first < cut:
        row = segment.query_row + first - segment.query_position
        yield FlashCall(row, cut - first, segment.key_row, cut - segment.key_position, True)
    first = max(first, cut)
    if first < query_end:
        row = segment.query_row + first - segment.query_position
        yield FlashCall(row, query_end - first, segment.key_row, segment.num_keys, False)


class FlashBackend:
    """`longspan.attention.base.AttentionBackend`, one kernel call per segment."""

    name = "vllm_flash_attention"

    def __init__(self, flash_attn_varlen_func: Callable[..., Any], fa_version: int) -> None:
        """Args: vLLM's function and the version of FlashAttention that it shall take."""
        self._flash, self._version = flash_attn_varlen_func, fa_version

    def partial_attention(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Sequence[RowSegment], params: AttentionParams
    ) -> PartialAttention:
        """See `longspan.attention.base`."""
        check_arguments(q, k, v, segments, params)
        acc = empty_like_queries(q, v)
        for segment in segments:
            for call in calls_of(segment):
                keys = slice(call.key_row, call.key_row + call.num_keys)
                ends = torch.tensor([[0, call.num_queries], [0, call.num_keys]], dtype=torch.int32, device=q.device)
                out, lse = self._flash(
                    q=q[call.query_row : call.query_row + call.num_queries],
                    k=k[:, keys].transpose(0, 1),  # [keys, Hkv, D]
                    v=v[:, keys].transpose(0, 1),
                    cu_seqlens_q=ends[0],
                    cu_seqlens_k=ends[1],
                    max_seqlen_q=call.num_queries,
                    max_seqlen_k=call.num_keys,
                    softmax_scale=params.scale,
                    causal=call.causal,
                    softcap=params.softcap or 0.0,
                    return_softmax_lse=True,
                    fa_version=self._version,
                )
                merge_rows_(acc, call.query_row, PartialAttention(out, lse.transpose(0, 1)))  # lse: [H, T] to [T, H]
        return acc


def make_flash_backend(spec: KVSpec, has_softcap: bool) -> FlashBackend:
    """The backend of this process's GPU.

    Raises:
        UnsupportedModelError: vLLM has no FlashAttention for this model on this GPU.
    """
    if spec.dtype not in DTYPES or spec.k_width != spec.v_width:
        raise UnsupportedModelError(
            f"model: keys of {spec.k_width} and values of {spec.v_width} {spec.dtype}; "
            f"legal with longspan on a GPU are equal widths in {' or '.join(DTYPES)}"
        )
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version(head_size=spec.k_width, head_size_v=spec.v_width, requires_softcap=has_softcap)
    if version is None:
        raise UnsupportedModelError("model: vLLM has no FlashAttention for it on this GPU, which longspan needs")
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    return FlashBackend(flash_attn_varlen_func, version)


def check_against_reference(backend: AttentionBackend, group: KVGroup, params: AttentionParams, device: Any) -> None:
    """Compare the kernel with the reference on random tokens, once at start: nobody else has.

    Args:
        backend: of this process.
        group: heads, widths and dtype of the model.
        params: of one of its layers.
        device: the GPU.

    Raises:
        LongspanError: they differ by more than the dtype's rounding.
    """
    spec, generator = group.spec, torch.Generator().manual_seed(1)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    q = torch.randn(8, group.num_query_heads, spec.k_width, generator=generator).to(device, dtype)
    k = torch.randn(spec.num_kv_heads, 150, spec.k_width, generator=generator).to(device, dtype)
    v = torch.randn(spec.num_kv_heads, 150, spec.v_width, generator=generator).to(device, dtype)
    segments = [
        RowSegment(0, 6, 100, 0, 100, None, Visibility.FULL),
        RowSegment(0, 6, 100, 100, 6, 100, Visibility.CAUSAL),
        RowSegment(6, 1, 50, 110, 40, None, Visibility.FULL),
    ]  # and nothing for the last row
    found = backend.partial_attention(q, k, v, segments, params)
    expected = ReferenceBackend().partial_attention(q.float(), k.float(), v.float(), segments, params)
    for what, ours, right in (("outputs", found.out, expected.out), ("log-sum-exps", found.lse, expected.lse)):
        if not torch.allclose(ours.float(), right, rtol=0.0, atol=TOLERANCE):
            raise LongspanError(f"{what} of vLLM's FlashAttention on {device} are not those of the reference")
