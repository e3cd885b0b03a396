"""What `gpu.py` measures of kernels alone: ceilings, and attention and merge beside them.

Times are medians of CUDA events around all launches of one call, queued behind a sleeping kernel, after calls that do
not count; keys come from sets that together are larger than the L2 cache. Percentages are of ceilings measured in the
same run: flops of the fastest of some matrix products, bytes of a device copy (read and written).
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longspan.attention.base import AttentionBackend, RowSegment, RowSegments
from longspan.attention.check import check_against_reference
from longspan.attention.partial import PartialAttention, merge_rows_
from longspan.attention.select import make_backend
from longspan.errors import ConfigError, LongspanError
from longspan.kv.layout import KVGroup, KVSpec
from longspan.sharding.visibility import Visibility
from longspan.triton_kernels.merge import merge
from longspan.types import AttentionParams

FULL, CAUSAL = Visibility.FULL, Visibility.CAUSAL
LIBRARIES = ("cudnn", "flashinfer", "torch")
"""Backends that are not ours alone."""
L2_BYTES = 128 << 20
"""More than an H200's L2 cache holds: 50 MB, and what else may be in front of memory."""


SLEEP_CYCLES = 4_000_000
"""About 2 ms of an H200."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is; `SMOKE` only shows that the program runs."""

    matmul: tuple[int, ...] = (4096, 8192, 16384)
    copy_bytes: int = 4 << 30
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    prefill_queries: int = 8192
    prefill_keys: tuple[int, ...] = (65536, 131072)
    decode_batches: tuple[tuple[int, int], ...] = ((16, 16384), (64, 8192), (1, 131072), (1, 1048576))
    merge_rows: int = 8192
    merge_parts: int = 8
    share_context: int = 1 << 20
    share_ranks: tuple[int, ...] = (2, 4, 8)
    share_queries: int = 8192
    repeats: int = 9


SMOKE = Sizes(
    matmul=(64,),
    copy_bytes=1 << 16,
    heads=4,
    kv_heads=2,
    width=16,
    prefill_queries=40,
    prefill_keys=(100,),
    decode_batches=((3, 70), (1, 700)),
    merge_rows=5,
    merge_parts=3,
    share_context=256,
    share_ranks=(2, 4),
    share_queries=32,
    repeats=1,
)


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best."""

    flops_per_s: float
    copy_bytes_per_s: float


def seconds(call: Callable[[], object], device: torch.device, repeats: int, *, warm_up: int = 2) -> float:
    """Median of single calls, by CUDA events, after some that do not count."""
    for _ in range(warm_up):
        call()
    times: list[float] = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda._sleep(SLEEP_CYCLES)  # while it sleeps, Python launches: its time is not the kernels'
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _by_flops(flops: float, time_s: float, ceilings: Ceilings) -> dict[str, float]:
    return {
        "ms": time_s * 1e3,
        "TFLOP/s": flops / time_s / 1e12,
        "% of ceiling": 100 * flops / time_s / ceilings.flops_per_s,
    }


def _by_bytes(num_bytes: float, time_s: float, ceilings: Ceilings) -> dict[str, float]:
    return {
        "ms": time_s * 1e3,
        "GB/s": num_bytes / time_s / 1e9,
        "% of ceiling": 100 * num_bytes / time_s / ceilings.copy_bytes_per_s,
    }


def measure_ceilings(sizes: Sizes, device: torch.device) -> Ceilings:
    flops = 0.0
    for n in sizes.matmul:
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        flops = max(flops, 2.0 * n**3 / seconds(lambda a=a, b=b: torch.mm(a, b), device, sizes.repeats))
    source = torch.zeros(sizes.copy_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = seconds(lambda: target.copy_(source), device, sizes.repeats)
    return Ceilings(flops, sizes.copy_bytes / copy_s)


def backends(device: torch.device, names: tuple[str, ...]) -> tuple[dict[str, AttentionBackend], dict[str, str]]:
    """Those of some names that can be made here, and why the others cannot."""
    found: dict[str, AttentionBackend] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            found[name] = make_backend(name, device)
        except ConfigError as error:
            missing[name] = str(error)
    return found, missing


def check(backend: AttentionBackend, sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """Every kind of model beside the float32 reference on this device. Yields a row for each."""
    for dtype in ("bfloat16", "float16", "float32"):
        for width in (64, 96, 128, 256) if sizes.width > 16 else (sizes.width,):
            for kv_heads, heads in ((8, 32), (1, 7), (4, 4)):
                for params in (
                    AttentionParams(width**-0.5),
                    AttentionParams(width**-0.5, softcap=30.0),
                    AttentionParams(width**-0.5, window=64),
                ):
                    spec = KVSpec.uniform(kv_heads, width, width, dtype, params.window)
                    kind = f"{dtype} {width} {heads}/{kv_heads}"
                    kind += " softcap" * (params.softcap is not None) + " window" * (params.window is not None)
                    if (reason := backend.unsupported(spec, params)) is not None:
                        yield {"backend": backend.name, "check": kind, "result": f"refused: {reason}"}
                        continue
                    try:
                        check_against_reference(backend, KVGroup((0,), spec, heads), params, device)
                        yield {"backend": backend.name, "check": kind, "result": "right"}
                    except LongspanError as error:
                        yield {"backend": backend.name, "check": kind, "result": f"WRONG: {error}"}
                    except Exception as error:  # whatever a compiler or a library raises: the other kinds count
                        reason = f"{type(error).__name__}: {error}"
                        yield {"backend": backend.name, "check": kind, "result": f"FAILED: {reason[:300]}"}


def _kv(sizes: Sizes, num_keys: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Sets of keys and values that together do not fit into caches."""
    set_bytes = 2 * sizes.kv_heads * num_keys * sizes.width * 2
    count = 1 if device.type == "cpu" else max(1, -(-L2_BYTES // set_bytes))
    shape = (sizes.kv_heads, num_keys, sizes.width)
    return [
        (torch.randn(shape, device=device).to(torch.bfloat16), torch.randn(shape, device=device).to(torch.bfloat16))
        for _ in range(count)
    ]


def _rotating(sets: list[tuple[Tensor, Tensor]], call: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
    """Every call takes the next set."""
    turn = 0

    def run() -> object:
        nonlocal turn
        turn += 1
        return call(*sets[turn % len(sets)])

    return run


def _chunk(num_queries: int, first: int) -> RowSegments:
    """Queries behind `first` keys, which lie in front of their own."""
    return RowSegments(
        [
            RowSegment(0, num_queries, first, 0, first, None, FULL),
            RowSegment(0, num_queries, first, first, num_queries, first, CAUSAL),
        ]
    )


def measure_prefill(
    backend: AttentionBackend, sizes: Sizes, ceilings: Ceilings, device: torch.device
) -> Iterator[dict[str, Any]]:
    """A chunk's queries at the end of a context, whose keys lie behind each other: nothing is gathered."""
    params = AttentionParams(sizes.width**-0.5)
    for num_keys in sizes.prefill_keys:
        num_queries, first = sizes.prefill_queries, num_keys - sizes.prefill_queries
        q = torch.randn(num_queries, sizes.heads, sizes.width, device=device).to(torch.bfloat16)
        segments = _chunk(num_queries, first)
        sets = _kv(sizes, num_keys, device)[:1]
        call = _rotating(sets, lambda k, v, q=q, s=segments: backend.partial_attention(q, k, v, s, params))
        pairs = num_queries * first + num_queries * (num_queries + 1) / 2
        flops = 4.0 * sizes.heads * sizes.width * pairs
        time_s = seconds(call, device, sizes.repeats)
        yield {
            "kernel": "prefill",
            "backend": backend.name,
            "shape": f"{num_queries} queries x {num_keys} keys",
            **_by_flops(flops, time_s, ceilings),
        }


def measure_decode(
    backend: AttentionBackend, sizes: Sizes, ceilings: Ceilings, device: torch.device
) -> Iterator[dict[str, Any]]:
    """One query per request; only bytes of K and V count."""
    params = AttentionParams(sizes.width**-0.5)
    for batch, num_keys in sizes.decode_batches:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        q = torch.randn(batch, sizes.heads, sizes.width, device=device).to(torch.bfloat16)
        segments = RowSegments(RowSegment(i, 1, num_keys - 1, i * num_keys, num_keys, None, FULL) for i in range(batch))
        sets = _kv(sizes, batch * num_keys, device)
        call = _rotating(sets, lambda k, v, q=q, s=segments: backend.partial_attention(q, k, v, s, params))
        num_bytes = 2.0 * batch * num_keys * sizes.kv_heads * sizes.width * 2
        time_s = seconds(call, device, sizes.repeats)
        yield {
            "kernel": "decode",
            "backend": backend.name,
            "shape": f"{batch} x {num_keys} keys",
            **_by_bytes(num_bytes, time_s, ceilings),
        }
        del sets, call


def measure_merge(sizes: Sizes, ceilings: Ceilings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Partials as ranks send them, and as splits leave them, into one."""
    rows, heads, width, count = sizes.merge_rows, sizes.heads, sizes.width, sizes.merge_parts
    for dtype in (torch.bfloat16, torch.float32):
        parts = torch.randn(count, rows, heads, width, device=device).to(dtype)
        lses = torch.randn(count, rows, heads, device=device)
        out = torch.empty(rows, heads, width, device=device, dtype=torch.bfloat16)
        lse = torch.empty(rows, heads, device=device)
        num_bytes = float(parts.nbytes + lses.nbytes + out.nbytes + lse.nbytes)
        time_s = seconds(partial(merge, parts, lses, out, lse), device, sizes.repeats)
        yield {
            "kernel": "merge",
            "backend": "triton",
            "shape": f"{count} {str(dtype).removeprefix('torch.')} partials, {num_bytes / 1e6:.0f} MB",
            **_by_bytes(num_bytes, time_s, ceilings),
        }


def measure_accumulate(sizes: Sizes, ceilings: Ceilings, device: torch.device) -> Iterator[dict[str, Any]]:
    """A block's partial into what was computed before, as rings do after every block."""
    rows, heads, width = sizes.merge_rows, sizes.heads, sizes.width
    acc, lse = torch.zeros(rows, heads, width, device=device), torch.zeros(rows, heads, device=device)
    part = PartialAttention(torch.randn_like(acc), torch.randn_like(lse))
    num_bytes = 3.0 * acc.nbytes + 3.0 * lse.nbytes
    time_s = seconds(lambda: merge_rows_(PartialAttention(acc, lse), 0, part), device, sizes.repeats)
    yield {
        "kernel": "accumulate",
        "backend": "triton",
        "shape": f"float32, {num_bytes / 1e6:.0f} MB",
        **_by_bytes(num_bytes, time_s, ceilings),
    }


def measure_share(
    backend: AttentionBackend, sizes: Sizes, ceilings: Ceilings, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Attention of one layer of the last rank's share of a long prompt: every chunk of it over all keys before it.

    Keys of other ranks lie where exchanges would leave them: their time is not in it.
    """
    params = AttentionParams(sizes.width**-0.5)
    ((k, v),) = _kv(sizes, sizes.share_context, device)[:1]
    q = torch.randn(sizes.share_queries, sizes.heads, sizes.width, device=device).to(torch.bfloat16)
    for num_ranks in sizes.share_ranks:
        firsts = range((num_ranks - 1) * sizes.share_queries, sizes.share_context, num_ranks * sizes.share_queries)
        steps, pairs = [], 0.0
        for first in firsts:
            n = min(sizes.share_queries, sizes.share_context - first)
            steps.append((n, _chunk(n, first)))
            pairs += n * first + n * (n + 1) / 2

        def share(steps: list[tuple[int, RowSegments]] = steps) -> None:
            for n, segments in steps:
                backend.partial_attention(q[:n], k, v, segments, params)

        flops = 4.0 * sizes.heads * sizes.width * pairs
        share(steps[:1])  # compiles
        time_s = seconds(share, device, 1, warm_up=0)  # it takes many seconds, of launches of many milliseconds
        yield {
            "kernel": "prefill share",
            "backend": backend.name,
            "shape": f"a layer of {sizes.share_context} tokens, 1 of {num_ranks} ranks",
            **_by_flops(flops, time_s, ceilings),
        }
