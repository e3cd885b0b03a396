"""Attention on a GPU by our own Triton kernels.

Holds `TritonBackend`: the copy of tables, the number of splits, and the launches. Must not know pages, ranks or models.
Read next: `longspan.attention.tiles`; `longspan.triton_kernels.attention`, the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.attention.base import (
    RowSegment,
    RowSegments,
    check_arguments,
    check_supported,
    empty_like_queries,
)
from longspan.attention.partial import PartialAttention
from longspan.attention.staging import to_device
from longspan.attention.tiles import TileTables, tile_tables
from longspan.kv.layout import SCALED_DTYPES, KVSpec
from longspan.kv.pool import are_in_keys
from longspan.kv.stored import row_width
from longspan.triton_kernels.attention import (
    MAX_LATENT_WIDTH,
    MAX_REST_WIDTH,
    MAX_WIDTH,
    MIN_WIDTH,
    Tiling,
    attention,
    head_tiles,
    most_queries,
    tiling,
)
from longspan.triton_kernels.launch import can_run, shared_bytes
from longspan.triton_kernels.merge import merge
from longspan.types import AttentionParams

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_SPLIT_TILES = 4
"""Fewest key tiles of a split: a shorter one takes longer to merge than it saves."""
MAX_SPLITS = 64
WAVES = 2
"""Programs per processor of the GPU that splits aim at."""


class _LaunchTables(NamedTuple):
    """Tables of a launch on the device, and the number of splits."""

    query_tiles: Tensor
    key_tiles: Tensor
    queries_per_tile: int
    num_splits: int


class TritonBackend:
    """Attention by our Triton kernels in bfloat16, float16 and float32, over keys and values in these or in 8 bits."""

    name = "triton"

    def unsupported(self, spec: KVSpec, params: AttentionParams) -> str | None:
        """See `AttentionBackend.unsupported`."""
        layout = spec.layout
        if not {spec.compute_dtype, *SCALED_DTYPES}.issuperset(layout.dtypes):
            legal = ", ".join((spec.compute_dtype, *SCALED_DTYPES))
            return f"kv_cache_dtype: got {', '.join(layout.dtypes)}, the triton backend takes {legal}"
        if any(component.scale_dtype is not None and component.width % 4 for component in layout.components):
            return f"head size: got {layout.k_width} in 8 bits, the triton backend takes multiples of 4"
        names = [str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES]
        if spec.compute_dtype not in names:
            return f"dtype: got {spec.compute_dtype}, the triton backend takes {', '.join(names)}"
        rest = layout.k_width - layout.v_width
        if layout.v_width_in_k is not None and rest:
            if MIN_WIDTH <= layout.v_width <= MAX_LATENT_WIDTH and rest <= MAX_REST_WIDTH:
                return None
            return (
                f"head size: got latents of {layout.v_width} and {rest} beside them, the triton backend takes "
                f"{MIN_WIDTH} to {MAX_LATENT_WIDTH} and up to {MAX_REST_WIDTH}"
            )
        for width in (layout.k_width, layout.v_width):
            if not MIN_WIDTH <= width <= MAX_WIDTH:
                return f"head size: got {width}, the triton backend takes {MIN_WIDTH} to {MAX_WIDTH}"
        return None

    def partial_attention(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Sequence[RowSegment], params: AttentionParams
    ) -> PartialAttention:
        """See `AttentionBackend.partial_attention`.

        Raises:
            ValueError: also for what `unsupported` names.
        """
        check_arguments(q, k, v, segments, params)
        check_supported(self, q, k, v, params)
        if (k.stride(2) != 1 and k.shape[2] > 1) or (v.stride(2) != 1 and v.shape[2] > 1):
            raise ValueError("k and v must be contiguous in the last dimension")
        if not can_run(q.device):
            raise ValueError(f"device: {q.device}; the triton backend runs on cuda")
        num_rows, num_heads, width = q.shape
        v_width = v.shape[2] if v.shape[2] < k.shape[2] and are_in_keys(v, k) else row_width(v)
        if num_rows == 0 or num_heads == 0 or not segments:
            return empty_like_queries(q, v)
        if q.stride(2) != 1:
            q = q.contiguous()
        sizes = tiling(max(width, v_width), q.dtype, shared_bytes(q.device))
        tiles = head_tiles(num_heads // k.shape[0], sizes.most_rows)
        programs = k.shape[0] * tiles  # that share a query tile's heads
        work = _work(segments, num_rows, num_heads // programs, programs, sizes, params.window, q.device)
        outs = q.new_empty(work.num_splits, num_rows, num_heads, v_width, dtype=torch.float32)
        lses = q.new_empty(work.num_splits, num_rows, num_heads, dtype=torch.float32)
        attention(
            q,
            k,
            v,
            work.query_tiles,
            work.key_tiles,
            outs,
            lses,
            queries_per_tile=work.queries_per_tile,
            scale=params.scale,
            softcap=params.softcap,
            window=params.window,
        )
        if work.num_splits == 1:
            return PartialAttention(outs[0], lses[0])
        out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
        merge(outs, lses, out, lse)
        return PartialAttention(out, lse)


def _work(
    segments: Sequence[RowSegment],
    num_rows: int,
    group_size: int,
    head_programs: int,
    sizes: Tiling,
    window: int | None,
    device: torch.device,
) -> _LaunchTables:
    """Make the tables of some segments, once for all layers of a step."""
    key = (num_rows, group_size, head_programs, sizes, window, device)
    derived = segments.derived if isinstance(segments, RowSegments) else {}
    if key not in derived:
        tables = tile_tables(
            segments,
            num_rows,
            queries_per_tile=most_queries(group_size, max(s.num_queries for s in segments), sizes.most_rows),
            keys_per_tile=sizes.keys,
            window=window,
        )
        splits = num_splits(tables, head_programs, num_processors(device))
        derived[key] = _LaunchTables(
            to_device(tables.query_tiles, device), to_device(tables.key_tiles, device), tables.queries_per_tile, splits
        )
    found = derived[key]
    assert isinstance(found, _LaunchTables)
    return found


def num_splits(tables: TileTables, head_programs: int, processors: int) -> int:
    """Number of splits that keys are cut into so that the whole GPU works."""
    programs = len(tables.query_tiles) * head_programs
    if programs == 0:
        return 1
    wanted = WAVES * processors // programs
    return power_of_two(min(wanted, tables.most_key_tiles // MIN_SPLIT_TILES, MAX_SPLITS))


def power_of_two(most: int) -> int:
    """Largest power of two up to `most`, at least 1: every number of splits is one more kernel to compile."""
    return 1 << max(0, most.bit_length() - 1)


def num_processors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; a few in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
