"""Measurements that ranks make of themselves, and how the driver combines them into one set of costs.

Holds the types of a measurement. Must not know how to measure.
Read next: `longspan.costmodel.parameters`, the combined costs; `longspan.comm.measure` and
`longspan.attention.measure`, which measure.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import msgspec

from longspan.costmodel.parameters import NO_LINK, Costs, KernelRates, Link, Topology

NOISE = 1.1
"""Most that the fastest rank's speed is of the slowest's where ranks count as equal: measurements differ by as much."""


class LinkMeasurement(msgspec.Struct, frozen=True):
    """One rank's links, and the rank's own time for messages."""

    inside: Link | None
    """Link inside the rank's node; None where the rank has no peer there."""
    between: Link | None
    """Link to other nodes; None where there is one node, or this rank has no counterpart in the others."""
    lone_bytes_per_s: float | None
    """Bandwidth between nodes while one rank of each node sends; None where this rank was not that one."""
    exchange_s: float
    moved_byte_s: float


class RankMeasurement(msgspec.Struct, frozen=True):
    """Everything that one rank measured."""

    rank: int
    rates: KernelRates
    """Kernel rates; their `exchange_s` is the work at the ends of a message, without the `exchange_s` of `links`."""
    links: LinkMeasurement


def combine(
    measurements: Sequence[RankMeasurement],
    nodes: tuple[int, ...],
    machines: tuple[int, ...] | None = None,
    *,
    are_equal: bool = True,
) -> Costs:
    """Combine the measurements of all ranks: each number is that of the rank where it is slowest.

    Args:
        measurements: one measurement per rank.
        nodes: node of each rank.
        machines: machine of each rank, or None where that is its node.
        are_equal: whether the ranks are taken to be equally fast, and what differs for noise.
    """
    links = [m.links for m in measurements]
    inside = _slowest_link(link.inside for link in links)
    between = _slowest_link(link.between for link in links)
    known = inside or between or (NO_LINK if len(nodes) == 1 else None)
    assert known is not None, "several ranks have at least one link"
    lone = max((link.lone_bytes_per_s for link in links if link.lone_bytes_per_s is not None), default=None)
    ranks_per_link = 1.0 if lone is None else max(1.0, lone / (between or known).bytes_per_s)
    rates = [m.rates for m in measurements]
    # Links were measured while half of the ranks waited for the others; rates are those of ranks that are all busy.
    sharing = max(rate.ranks_per_device for rate in rates)
    slowdown = sharing / max(1.0, sharing / 2)

    def most(field: Callable[[KernelRates], float]) -> float:
        return max(field(rate) for rate in rates)

    def least(field: Callable[[KernelRates], float]) -> float:
        return min(field(rate) for rate in rates)

    return Costs(
        Topology(nodes, inside or known, between or known, ranks_per_link, None if machines == nodes else machines),
        KernelRates(
            matmul_flops_per_s=least(lambda rate: rate.matmul_flops_per_s),
            read_bytes_per_s=least(lambda rate: rate.read_bytes_per_s),
            copy_bytes_per_s=least(lambda rate: rate.copy_bytes_per_s),
            attention_flops_per_s=tuple(
                (num_queries, min(rate.attention_rate(num_queries) for rate in rates))
                for num_queries, _ in rates[0].attention_flops_per_s
            ),
            call_s=most(lambda rate: rate.call_s),
            exchange_s=most(lambda rate: rate.exchange_s) + max(link.exchange_s for link in links) * slowdown,
            layer_s=most(lambda rate: rate.layer_s),
            token_s=max((rate.token_s for rate in rates if rate.token_s is not None), default=None),
            merge_s=most(lambda rate: rate.merge_s),
            moved_byte_s=max(link.moved_byte_s for link in links),
            ranks_per_device=most(lambda rate: rate.ranks_per_device),
        ),
        None if are_equal else _speeds(rates),
    )


def _speeds(rates: Sequence[KernelRates]) -> tuple[float, ...]:
    """Speed of each rank relative to the slowest one: of matrix products, and of attention with many queries."""
    matmul = [rate.matmul_flops_per_s for rate in rates]
    attention = [rate.attention_flops_per_s[-1][1] for rate in rates]
    speeds = [math.sqrt(a / min(matmul) * b / min(attention)) for a, b in zip(matmul, attention, strict=True)]
    slowest = min(speeds)
    if max(speeds) < NOISE * slowest:
        return (1.0,) * len(rates)
    return tuple([speed / slowest for speed in speeds])


def _slowest_link(links: Iterable[Link | None]) -> Link | None:
    found = [link for link in links if link is not None]
    if not found:
        return None
    shorts = [link.short_bytes for link in found if link.short_bytes is not None]
    return Link(
        latency_s=max(link.latency_s for link in found),
        bytes_per_s=min(link.bytes_per_s for link in found),
        short_bytes=min(shorts, default=None),
        long_latency_s=max(link.long_latency_s for link in found),
    )
