"""Measurements of one rank's kernels, at the shapes of the model that it will run.

Holds timed calls. Must not know the other ranks, which measure at the same time (`sync`), or the predictions.
Read next: `longspan.costmodel.parameters`, which says what the numbers mean; `longspan.comm.measure`.
"""

import statistics
import time
from collections.abc import Callable

import torch

from longspan.attention.base import AttentionBackend, RowSegment
from longspan.attention.partial import PartialAttention, merge_rows_
from longspan.costmodel.parameters import KernelRates
from longspan.kv.layout import KVGroup
from longspan.kv.stored import round_rows
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams

QUERY_LENS = (1, 16, 64, 256, 1024)
"""Query tokens of the measured kernel calls."""

MOST_KEYS, FEWEST_KEYS = 4096, 512
MOST_FLOPS = 2.2e9
"""Operations of one measured call at most. Long calls get fewer keys; a call that is too long even with FEWEST_KEYS is
left out, except the three with the fewest queries."""

CALLS_AT_ONCE = 4
"""Short segments measured in one call, as a decode step has several."""

REPEATS = 4
SHARED_S = 0.012
"""Seconds for which a call is repeated where ranks share cores: some turns of the system's scheduler."""
MERGED_BYTES = 2 << 20
READ_BYTES = 48 << 20
"""Bytes read to measure memory bandwidth: more than caches hold."""
MATMUL_ROWS, MATMUL_WIDTH = 512, 768


def measure_kernels(
    backend: AttentionBackend,
    group: KVGroup,
    params: AttentionParams,
    *,
    ranks_per_device: float,
    sync: Callable[[], None],
    device: torch.device,
) -> KernelRates:
    """Measure this rank's kernels.

    Args:
        backend: this rank's attention kernel.
        group: heads, widths and dtype of its layers.
        params: parameters of one of the group's layers.
        ranks_per_device: ranks of this machine per core that they compute on.
        sync: returns when all ranks have called it, so that they measure the same at the same time.
        device: where the model runs.

    Returns:
        Rates of computation; `exchange_s`, `moved_byte_s` and `layer_s` are 0, since they are measured elsewhere.
    """
    heads, dtype = group.num_query_heads, getattr(torch, group.spec.compute_dtype)
    clock = _Clock(shares_cores=ranks_per_device > 1)
    call_s, attention_flops_per_s = _measure_attention(clock, backend, group, params, sync, device)
    sync()
    merge_s, copy_bytes_per_s = _measure_merge(clock, heads, group.spec.out_width, device)
    sync()
    data = torch.ones(READ_BYTES // 4, device=device)
    read_s = clock.seconds(data.sum)
    a = torch.randn(MATMUL_ROWS, MATMUL_WIDTH, device=device).to(dtype)
    b = torch.randn(MATMUL_WIDTH, MATMUL_WIDTH, device=device).to(dtype)
    sync()
    matmul_s = clock.seconds(lambda: torch.mm(a, b))
    sync()
    return KernelRates(
        matmul_flops_per_s=2.0 * MATMUL_ROWS * MATMUL_WIDTH**2 / matmul_s,
        read_bytes_per_s=READ_BYTES / read_s,
        copy_bytes_per_s=copy_bytes_per_s,
        attention_flops_per_s=attention_flops_per_s,
        call_s=call_s,
        merge_s=merge_s,
        ranks_per_device=ranks_per_device,
    )


def _measure_attention(
    clock: "_Clock",
    backend: AttentionBackend,
    group: KVGroup,
    params: AttentionParams,
    sync: Callable[[], None],
    device: torch.device,
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Measure attention.

    Returns:
        Seconds of a call with almost no work; (queries of a call, flops per second) for `QUERY_LENS`, without calls
        that would take too long.
    """
    layout, heads = group.spec.layout, group.num_query_heads
    dtype: torch.dtype = getattr(torch, group.spec.compute_dtype)
    rows = [torch.randn(part.num_heads, MOST_KEYS, part.width, device=device) for part in layout.components]
    stored = [round_rows(*pair) for pair in zip(rows, layout.components, strict=True)]  # [Hkv, S, stored width]
    k, v = stored[0], stored[1] if layout.v_width_in_k is None else stored[0][:, :, : layout.v_width_in_k]
    q = torch.randn(QUERY_LENS[-1], heads, group.spec.q_width, device=device).to(dtype)  # [T, H, D]

    def one(num_queries: int, num_keys: int) -> Callable[[], object]:
        segments = [RowSegment(0, num_queries, num_keys, 0, num_keys, None, Visibility.FULL)]
        return lambda: backend.partial_attention(q[:num_queries], k, v, segments, params)

    def several() -> object:
        segments = [RowSegment(2 * i, 2, 16, 0, 16, None, Visibility.FULL) for i in range(CALLS_AT_ONCE)]
        return backend.partial_attention(q[: 2 * CALLS_AT_ONCE], k, v, segments, params)

    sync()
    call_s = clock.seconds(several) / CALLS_AT_ONCE
    rates: list[tuple[int, float]] = []
    for num_queries in QUERY_LENS:
        pair_flops = group.pair_flops(num_queries)
        num_keys = min(MOST_KEYS, int(MOST_FLOPS / (num_queries * pair_flops)))
        if num_keys < FEWEST_KEYS and len(rates) >= 3:
            break
        num_keys = max(num_keys, FEWEST_KEYS)
        sync()
        time_s = clock.seconds(one(num_queries, num_keys))
        rates.append((num_queries, num_queries * num_keys * pair_flops / max(time_s - call_s, time_s / 10)))
    return call_s, tuple(rates)


def _measure_merge(clock: "_Clock", num_heads: int, width: int, device: torch.device) -> tuple[float, float]:
    """Measure seconds of merging one row, and bytes per second of merging many."""

    def partial(num_rows: int) -> PartialAttention:
        return PartialAttention(
            torch.randn(num_rows, num_heads, width, device=device), torch.randn(num_rows, num_heads, device=device)
        )

    num_rows = max(2, MERGED_BYTES // (num_heads * width * 4))
    one, many = partial(1), partial(num_rows)
    merge_s = clock.seconds(lambda: merge_rows_(one, 0, one))
    into = partial(num_rows)
    many_s = clock.seconds(lambda: merge_rows_(into, 0, many))
    return merge_s, num_rows * num_heads * width * 4 / max(many_s - merge_s, many_s / 10)


class _Clock:
    """Stopwatch for calls: the median of a few, or, where ranks share cores, the mean over some turns of all ranks."""

    def __init__(self, shares_cores: bool) -> None:
        self._shares_cores = shares_cores

    def seconds(self, call: Callable[[], object]) -> float:
        """Seconds of one call, after a first one that does not count."""
        call()
        times: list[float] = []
        first_s = before_s = time.perf_counter()
        while len(times) < REPEATS or (self._shares_cores and before_s - first_s < SHARED_S):
            call()
            now_s = time.perf_counter()
            times.append(now_s - before_s)
            before_s = now_s
        return statistics.fmean(times) if self._shares_cores else statistics.median(times)
