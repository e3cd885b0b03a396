"""Memory fit of a model on a cluster: weights, KV, the longest request, the smallest cluster.

Holds arithmetic on top of the engine's own (`longspan.sharding.capacity`). Must not know time.
Read next: `longspan.planner.report`.
"""

import math
from collections.abc import Iterator

import msgspec

from longspan.config import MAX_RANKS
from longspan.costmodel.model_time import StepOptions
from longspan.costmodel.shapes import ModelShape
from longspan.errors import ConfigError
from longspan.planner.clusters import Cluster
from longspan.sharding.capacity import pages_of_ranks, pool_bytes, window_pages
from longspan.types import ModelSpec


class Fit(msgspec.Struct, frozen=True):
    """Weights and KV that fit the ranks of a model."""

    num_ranks: int
    usable_bytes: float
    """Memory of one device without the share that is kept back."""
    weight_bytes: float
    """Weights on one device."""
    kv_bytes: float
    """Memory of one device for KV; below 0 where the weights alone are too much."""
    num_pages: tuple[int, ...]
    """Pages on one rank, per KV group; where ranks are unequal, on the one with the largest weight; behind them slots
    of states, if the model has recurrent layers."""
    tokens_per_rank: tuple[int, ...]
    """Tokens whose KV fits each rank, in groups of full attention if there are any."""
    num_tokens: int
    """Tokens whose KV fits all ranks together, in groups of full attention if there are any."""
    longest_request: int | None
    """Most tokens of one request, prompt and output; None where windows and chunks admit any number."""


def fit(shape: ModelShape, num_ranks: int, memory_bytes: float, memory_utilization: float, options: StepOptions) -> Fit:
    """Divide a device's memory among weights and KV.

    Where ranks are unequal, the device is that of the rank with the largest weight, and the others have KV memory in
    proportion.

    Args:
        shape: one device's part of the model.
        num_ranks: ranks that share a request.
        memory_bytes: memory of one device.
        memory_utilization: share of that memory that weights and KV may take.
        options: the engine's options.
    """
    spec, size, budget = shape.spec, options.page_size, options.max_num_batched_tokens
    usable_bytes = memory_bytes * memory_utilization
    kv_bytes = usable_bytes - shape.weight_bytes
    memories = [int(max(0.0, kv_bytes) * share) for share in relative_shares(num_ranks, options)]
    try:
        pools = pages_of_ranks(spec, memories, size, budget) if min(memories) else None
    except ConfigError:  # not one page
        pools = None
    if pools is None:
        none = (0,) * num_ranks
        return Fit(num_ranks, usable_bytes, shape.weight_bytes, kv_bytes, _no_pages(spec), none, 0, 0)
    full = [i for i, group in enumerate(spec.kv_groups) if group.spec.reach is None]
    tokens = tuple([of_rank[full[0] if full else 0] * size for of_rank in pools])
    longest: int | None = sum(tokens) + 1  # the last token needs no page
    if not full and all(
        pages >= window_pages(group.spec.reach or 0, size, budget)
        for pages, group in zip(max(pools), spec.kv_groups, strict=False)
    ):
        longest = None
    return Fit(num_ranks, usable_bytes, shape.weight_bytes, kv_bytes, max(pools), tokens, sum(tokens), longest)


def relative_shares(num_ranks: int, options: StepOptions) -> tuple[float, ...]:
    """Memory and speed of every rank, relative to the largest."""
    weights = options.rank_weights or (1.0,) * num_ranks
    return tuple([weight / max(weights) for weight in weights])


def _no_pages(spec: ModelSpec) -> tuple[int, ...]:
    return (0,) * (len(spec.kv_groups) + bool(spec.state_groups))


def fits(found: Fit, num_tokens: int) -> bool:
    """Whether a request of `num_tokens` fits."""
    return found.longest_request is None or num_tokens <= found.longest_request


def request_kv_bytes(shape: ModelShape, num_tokens: int, num_ranks: int, options: StepOptions) -> int:
    """Bytes of KV, and of a state, that a request of `num_tokens` holds at its end, on the device that has most."""
    size = options.page_size
    here = math.ceil(-(-num_tokens // size) / sum(relative_shares(num_ranks, options)))
    held = shape.spec.state_bytes
    for group in shape.spec.kv_groups:
        reach = group.spec.reach
        most = here if reach is None else min(here, window_pages(reach, size, options.max_num_batched_tokens))
        held += most * group.page_bytes(size)
    return held


def needed_bytes(
    shape: ModelShape, num_tokens: int, num_ranks: int, memory_utilization: float, options: StepOptions
) -> float:
    """Least memory of one device, in bytes, with which a request of `num_tokens` fits `num_ranks` ranks."""
    size, budget = options.page_size, options.max_num_batched_tokens
    here = math.ceil(max(1, num_tokens - 1) / (size * sum(relative_shares(num_ranks, options))))
    if all(group.spec.reach is not None for group in shape.spec.kv_groups):
        here = min(here, max(window_pages(group.spec.reach or 0, size, budget) for group in shape.spec.kv_groups))
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
    """Devices of the smallest cluster of this kind that holds a request of `num_tokens`, or None if none does.

    Unequal ranks are those of one cluster: no other is looked at.
    """
    sizes = cluster_sizes(cluster, tensor_parallel_size) if options.rank_weights is None else (cluster.num_devices,)
    for num_devices in sizes:
        num_ranks = num_devices // tensor_parallel_size
        if fits(fit(shape, num_ranks, cluster.memory_bytes, memory_utilization, options), num_tokens):
            return num_devices
    return None
