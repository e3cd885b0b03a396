"""What fits into the memory of a cluster: weights, KV, the longest request, the smallest cluster.

Holds arithmetic, the engine's own (`longspan.sharding.capacity`). Must not know time.
Read next: `longspan.planner.report`.
"""

from collections.abc import Iterator

import msgspec

from longspan.config import MAX_RANKS
from longspan.costmodel.model_time import StepOptions
from longspan.costmodel.shapes import ModelShape
from longspan.errors import ConfigError
from longspan.planner.clusters import Cluster
from longspan.sharding.capacity import pool_bytes, pool_pages, window_pages


class Fit(msgspec.Struct, frozen=True):
    """What ranks of a model hold beside its weights."""

    num_ranks: int
    usable_bytes: float
    """Of one device: its memory but for what is kept back."""
    weight_bytes: float
    """Of one device."""
    kv_bytes: float
    """Usable for KV, of one device; below 0 where the weights alone are too much."""
    num_pages: tuple[int, ...]
    """Per KV group, of one rank."""
    num_tokens: int
    """KV of so many tokens fits all ranks together, in groups without a window if there are any."""
    longest_request: int | None
    """Most tokens of one request, prompt and output; None where windows admit any number."""


def fit(shape: ModelShape, num_ranks: int, memory_bytes: float, memory_utilization: float, options: StepOptions) -> Fit:
    """Share a device's memory out.

    Args:
        shape: one device's part of the model.
        num_ranks: ranks that share a request.
        memory_bytes: of one device.
        memory_utilization: share of it that weights and KV may take.
        options: of the engine.
    """
    spec, size, budget = shape.spec, options.page_size, options.max_num_batched_tokens
    usable_bytes = memory_bytes * memory_utilization
    kv_bytes = usable_bytes - shape.weight_bytes
    try:
        num_pages = pool_pages(spec, int(kv_bytes), size, budget) if kv_bytes >= 1 else None
    except ConfigError:  # not one page
        num_pages = None
    if num_pages is None:
        return Fit(num_ranks, usable_bytes, shape.weight_bytes, kv_bytes, (0,) * len(spec.kv_groups), 0, 0)
    full = [pages for pages, group in zip(num_pages, spec.kv_groups, strict=True) if group.spec.window is None]
    limit = full[0] if full else num_pages[0]
    longest: int | None = num_ranks * limit * size + 1  # the last token needs no page
    if not full and all(
        pages >= window_pages(group.spec.window or 0, size, budget)
        for pages, group in zip(num_pages, spec.kv_groups, strict=True)
    ):
        longest = None
    return Fit(num_ranks, usable_bytes, shape.weight_bytes, kv_bytes, num_pages, num_ranks * limit * size, longest)


def fits(found: Fit, num_tokens: int) -> bool:
    """Whether a request of so many tokens fits."""
    return found.longest_request is None or num_tokens <= found.longest_request


def request_kv_bytes(shape: ModelShape, num_tokens: int, num_ranks: int, options: StepOptions) -> int:
    """KV that a request holds on the device that has most of it, at its end."""
    size = options.page_size
    pages = -(-num_tokens // size)
    here = -(-pages // num_ranks)
    held = 0
    for group in shape.spec.kv_groups:
        window = group.spec.window
        most = here if window is None else min(here, window_pages(window, size, options.max_num_batched_tokens))
        held += most * group.page_bytes(size)
    return held


def needed_bytes(
    shape: ModelShape, num_tokens: int, num_ranks: int, memory_utilization: float, options: StepOptions
) -> float:
    """Memory of one device from which on a request of so many tokens fits so many ranks."""
    size, budget = options.page_size, options.max_num_batched_tokens
    here = -(-max(1, num_tokens - 1) // (size * num_ranks))
    if all(group.spec.window is not None for group in shape.spec.kv_groups):
        here = min(here, max(window_pages(group.spec.window or 0, size, budget) for group in shape.spec.kv_groups))
    return (shape.weight_bytes + pool_bytes(shape.spec, here, size, budget)) / memory_utilization


def cluster_sizes(cluster: Cluster, tensor_parallel_size: int) -> Iterator[int]:
    """Numbers of devices of clusters of this kind, ascending: parts of one node, then whole nodes."""
    per_node = cluster.devices_per_node
    yield from range(tensor_parallel_size, per_node + 1, tensor_parallel_size)
    yield from range(2 * per_node, MAX_RANKS * tensor_parallel_size + 1, per_node)


def smallest_cluster(
    shape: ModelShape,
    cluster: Cluster,
    tensor_parallel_size: int,
    num_tokens: int,
    memory_utilization: float,
    options: StepOptions,
) -> int | None:
    """Devices of the smallest cluster of this kind that holds a request of so many tokens, or None if none does."""
    for num_devices in cluster_sizes(cluster, tensor_parallel_size):
        num_ranks = num_devices // tensor_parallel_size
        if fits(fit(shape, num_ranks, cluster.memory_bytes, memory_utilization, options), num_tokens):
            return num_devices
    return None
