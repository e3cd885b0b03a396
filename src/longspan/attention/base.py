"""Interface of attention kernels.

Holds the protocol and its argument types. Must not know pages, ranks, models or any particular kernel.
Read next: `longspan.attention.reference` for the meaning, `longspan.attention.cpu` for speed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from longspan.attention.partial import PartialAttention, accumulation_dtype
from longspan.errors import UnsupportedModelError
from longspan.kv.layout import SCALED_DTYPES, KVComponent, KVLayout, KVSpec
from longspan.kv.pool import are_in_keys
from longspan.kv.stored import row_width, stored_dtype
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams


@dataclass(frozen=True, slots=True)
class RowSegment:
    """A run of query rows meets a run of key rows of the same request.

    Query row `query_row + i` is the token at position `query_position + i`; under CAUSAL and BAND, key row
    `key_row + j` is the token at position `key_position + j`. Rows index the tensors of one call, never a request.
    """

    query_row: int
    """First row of the packed queries."""
    num_queries: int
    """Number of query rows; 0 means that the segment does nothing."""
    query_position: int
    """Global position of the first query; the others follow consecutively."""
    key_row: int
    """First row of the key and value tensors."""
    num_keys: int
    """Number of key rows; 0 means that the segment does nothing."""
    key_position: int | None
    """Global position of the first key, the others following; None where only FULL or NONE makes sense of the rows."""
    visibility: Visibility
    """Mask between queries and keys; FULL ignores positions, so that its rows may be in any order."""

    def __post_init__(self) -> None:
        if self.key_position is None and self.visibility in (Visibility.CAUSAL, Visibility.BAND):
            raise ValueError(f"key_position: None; {self.visibility} needs the position of the first key")
        if min(self.query_row, self.num_queries, self.key_row, self.num_keys) < 0:
            raise ValueError(f"a row or a count is negative: {self}")


class RowSegments(list[RowSegment]):
    """Segments that every layer of a step uses again, so that a backend can keep what it derives from them."""

    def __init__(self, segments: Iterable[RowSegment] = ()) -> None:
        super().__init__(segments)
        self.derived: dict[Hashable, object] = {}
        """Results that backends derived from the segments, by the backends' own keys. The list must not change then."""


class AttentionBackend(Protocol):
    """Attention kernel of one rank."""

    @property
    def name(self) -> str:
        """The name under which `longspan.attention.select` knows the backend."""
        ...

    def unsupported(self, spec: KVSpec, params: AttentionParams) -> str | None:
        """Reason why layers cannot be computed, as `field: got value, the backend takes ...`; None if they can."""
        ...

    def partial_attention(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Sequence[RowSegment], params: AttentionParams
    ) -> PartialAttention:
        """Attention of every query row over the keys that the segments let it see.

        Args:
            q: [T, H, D], any strides, T may be 0.
            k: [Hkv, S, stored D], contiguous in the last dimension; a view of a page pool or a received buffer, of the
                dtype of `q` or as `longspan.kv.stored` describes rows. H is a multiple of Hkv; query head h reads KV
                head `h // (H // Hkv)`. S may be 0.
            v: [Hkv, S, stored Dv], dtype and strides as for `k`; or the first Dv elements of `k`, in the same memory.
            segments: in any order. Several may cover the same query rows, with disjoint keys; rows that none covers
                come out empty. Rows of q, k and v outside every segment are never read: they may hold NaN.
            params: the layer's scale, window and softcap.

        Returns:
            `out` [T, H, Dv] and `lse` [T, H], new tensors in the accumulation dtype.

        Raises:
            ValueError: shapes, dtypes or segments do not fit together.
        """
        ...


def check_stored(spec: KVSpec) -> None:
    """Check that keys and values are stored as pools and messages hold them; called once per rank.

    Raises:
        UnsupportedModelError: they have several dtypes, or scales that their dtype does not have.
    """
    layout = spec.layout
    scales = {component.scale_dtype for component in layout.components}
    wanted = {"float32" if dtype in SCALED_DTYPES else None for dtype in layout.dtypes}
    if len(layout.dtypes) != 1 or scales != wanted:
        raise UnsupportedModelError(
            f"model: got keys and values as {layout}, legal is one dtype, with scales in float32 for "
            f"{' and '.join(SCALED_DTYPES)} alone"
        )


def other_storage(spec: KVSpec, backend: str) -> str | None:
    """Reason of a backend that reads keys and values in the dtype of queries alone; None if they are stored so."""
    if spec.layout.dtypes == (spec.compute_dtype,):
        return None
    return f"kv_cache_dtype: got {', '.join(spec.layout.dtypes)}, the {backend} backend takes {spec.compute_dtype}"


def check_arguments(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[RowSegment], params: AttentionParams) -> None:
    """Raise ValueError if a backend's arguments do not fit together; called once per layer and step."""
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(f"q, k and v need 3 dimensions, got {q.dim()}, {k.dim()} and {v.dim()}")
    num_rows, num_heads, width = q.shape
    num_kv_heads, num_keys, _ = k.shape
    if row_width(k) != width or v.shape[:2] != k.shape[:2] or num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if k.dtype != v.dtype:
        raise ValueError(f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}")
    for segment in segments:
        if segment.query_row + segment.num_queries > num_rows or segment.key_row + segment.num_keys > num_keys:
            raise ValueError(f"{segment} is outside of {num_rows} query rows and {num_keys} key rows")
        if params.window is None and segment.visibility is Visibility.BAND:
            raise ValueError("window: None; a BAND segment needs the width of the band in tokens")


def check_supported(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> None:
    """Raise ValueError if a backend does not take these arguments of `partial_attention`."""
    in_keys = v.shape[2] < k.shape[2] and are_in_keys(v, k)
    v_width = v.shape[2] if in_keys else row_width(v)
    spec = _stored_spec(k.shape[0], row_width(k), v_width, in_keys, q.dtype, params.window)
    if k.dtype != q.dtype:
        spec = spec.stored_as(stored_dtype(k))
    if (reason := backend.unsupported(spec, params)) is not None:
        raise ValueError(reason)


@lru_cache  # every layer of every step asks
def _stored_spec(
    num_kv_heads: int, k_width: int, v_width: int, are_values_in_keys: bool, dtype: torch.dtype, window: int | None
) -> KVSpec:
    name = str(dtype).removeprefix("torch.")
    if are_values_in_keys:
        return KVSpec(KVLayout((KVComponent("k", num_kv_heads, k_width, name),), v_width), name, window)
    return KVSpec.uniform(num_kv_heads, k_width, v_width, name, window)


def empty_like_queries(q: Tensor, v: Tensor) -> PartialAttention:
    """Empty partial for queries `q` [T, H, D] and values `v` [Hkv, S, stored Dv]."""
    return PartialAttention.empty(q.shape[0], q.shape[1], row_width(v), accumulation_dtype(q.dtype), q.device)
