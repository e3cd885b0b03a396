"""Measurements of messages: latency, bandwidth, and the ranks' own time.

Holds measurements through the communicator, so that they include all that it does (sockets, networks, simulated
links). Must not know kernels, or the predictions made from the numbers.
Read next: `longspan.costmodel.parameters`, which says what the numbers mean; `longspan.attention.measure`.

Note [All ranks at once]
    Ranks form rings: one inside each node, and rings through all nodes, one for the nodes' first ranks, one for their
    second ranks, and so on. All rings of a kind run at the same time, and every rank sends to its successor and
    receives from its predecessor, as the strategies do. So a rank's bandwidth is its share of a link that other ranks
    use as well. Short messages go to and fro between neighbours, all pairs at the same time.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.comm.base import Communicator
from longspan.costmodel.measured import LinkMeasurement
from longspan.costmodel.parameters import Link

SIZES = ((2 << 10, 32), (8 << 10, 24), (32 << 10, 16), (64 << 10, 24), (256 << 10, 12), (1 << 20, 6), (3 << 20, 5))
"""(bytes of a message, number of times it is sent): short messages for latency, the last two for bandwidth."""

NUM_SHORT = 2
"""Number of `SIZES`, from the shortest on, that are sent to and fro between two ranks."""

WARM_UP = 3
"""Uncounted messages sent first: connections and buffers are made on first use."""

OVERLAP_BYTES, OVERLAP_REPEATS = 2 << 20, 5
"""Size of the message that moves beside a computation, and how often it is sent."""

BUSY_SIZE, BUSY_CALLS, MAX_BUSY_S = 192, 40, 0.05
"""Side of the matrices multiplied beside a message, products for timing one of them, and the longest computation."""

SIGNIFICANT_LATENCY = 0.15
"""Smallest extra latency of long messages, as a share of the latency, for which they are told apart from short ones."""


def barrier(comm: Communicator) -> None:
    """Return when all ranks have called this.

    Collective: all ranks; each one but rank 0 sends and receives a message of one byte.
    """
    token = torch.zeros(1, dtype=torch.uint8)
    others = [rank for rank in range(comm.size) if rank != 0]
    if comm.rank:
        comm.exchange([(0, token)], []).wait()
        comm.exchange([], [(0, token)]).wait()
    else:
        comm.exchange([], [(rank, token.clone()) for rank in others]).wait()
        comm.exchange([(rank, token) for rank in others], []).wait()


def measure_links(comm: Communicator, nodes: Sequence[int]) -> LinkMeasurement:
    """Measure this rank's links.

    Args:
        comm: the ranks' communicator, without an exchange under way.
        nodes: node of every rank, counted from 0.

    Collective: all ranks, with the same `nodes`; about 100 exchanges of up to 3 MiB per ring. A lone rank has no link.
    """
    if comm.size == 1:
        return LinkMeasurement(None, None, None, 0.0, 0.0)
    inside_ring, between_ring, lone_ring = _rings(comm.rank, nodes)
    has_several = len(set(nodes)) > 1
    barrier(comm)
    inside = _measure_ring(comm, inside_ring) if inside_ring else None
    barrier(comm)
    between = _measure_ring(comm, between_ring) if between_ring else None
    barrier(comm)
    lone = _bandwidth(comm, lone_ring) if has_several and lone_ring else None
    barrier(comm)
    is_paired = len(set(nodes)) < len(nodes)  # some node has several ranks: links inside are what is looked at
    ring = inside_ring if is_paired else between_ring
    moved_byte_s = _moved_byte_s(comm, ring)
    barrier(comm)
    times = [ring_times for ring_times in (inside, between) if ring_times is not None]
    return LinkMeasurement(
        inside=None if inside is None else fitted_link(inside),
        between=None if between is None else fitted_link(between),
        lone_bytes_per_s=lone,
        exchange_s=max((ring_times.own_s for ring_times in times), default=0.0),
        moved_byte_s=moved_byte_s,
    )


class _Ring(NamedTuple):
    successor: int
    predecessor: int
    partner: int | None
    """Neighbour with which this rank forms a pair; None for the last rank of an odd number."""
    is_first: bool
    """Whether this rank is the first of its pair."""


class RingTimes(NamedTuple):
    message_s: list[tuple[int, float]]
    """(bytes, seconds of one message)."""
    own_s: float
    """Seconds of the rank's own time for a short message, sent or received."""


def _rings(rank: int, nodes: Sequence[int]) -> tuple[_Ring | None, _Ring | None, _Ring | None]:
    """Rings of this rank: inside its node; through the nodes; through the nodes if it is its node's first rank."""
    members = [[r for r, node in enumerate(nodes) if node == n] for n in range(max(nodes) + 1)]
    own = members[nodes[rank]]
    place = own.index(rank)
    across = [node[place] for node in members if place < len(node)] if place < min(map(len, members)) else [rank]
    return _ring(rank, own), _ring(rank, across), _ring(rank, across) if place == 0 else None


def _ring(rank: int, members: Sequence[int]) -> _Ring | None:
    place = members.index(rank)
    if len(members) == 1:
        return None
    partner = members[place ^ 1] if place ^ 1 < len(members) else None
    return _Ring(members[(place + 1) % len(members)], members[place - 1], partner, place % 2 == 0)


def _exchanges(comm: Communicator, ring: _Ring, num_bytes: int, repeats: int) -> list[float]:
    """Send messages round the ring, and return the seconds of each."""
    outgoing, incoming = torch.zeros(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    times: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        comm.exchange([(ring.successor, outgoing)], [(ring.predecessor, incoming)]).wait()
        times.append(time.perf_counter() - started)
    return times


def _measure_ring(comm: Communicator, ring: _Ring) -> RingTimes | None:
    """Measure all messages of one ring; None for a rank without a partner, which only takes part."""
    short_s: list[tuple[int, float]] = []
    own_s: list[float] = []
    for num_bytes, repeats in SIZES[:NUM_SHORT] if ring.partner is not None else ():
        _ping_pong(comm, ring, num_bytes, WARM_UP)
        before_s = time.thread_time()
        short_s.append((num_bytes, _typical(_ping_pong(comm, ring, num_bytes, repeats))))
        own_s.append((time.thread_time() - before_s) / (2 * repeats))
    long_s: list[tuple[int, float]] = []
    for num_bytes, repeats in SIZES[NUM_SHORT:]:
        _exchanges(comm, ring, num_bytes, WARM_UP if num_bytes < SIZES[-2][0] else 1)
        long_s.append((num_bytes, _typical(_exchanges(comm, ring, num_bytes, repeats))))
    if not short_s:
        return None
    return RingTimes([*short_s, *long_s], min(*own_s, short_s[0][1] / 2))


def _ping_pong(comm: Communicator, ring: _Ring, num_bytes: int, repeats: int) -> list[float]:
    """Seconds of short messages, as half a round trip: the receiver sleeps until one comes, as in a real step."""
    assert ring.partner is not None
    outgoing, incoming = _buffers(num_bytes)
    times: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        if ring.is_first:
            comm.exchange([(ring.partner, outgoing)], []).wait()
        comm.exchange([], [(ring.partner, incoming)]).wait()
        if not ring.is_first:
            comm.exchange([(ring.partner, outgoing)], []).wait()
        times.append((time.perf_counter() - started) / 2)
    return times


def _typical(times: Sequence[float]) -> float:
    """Mean without the longest tenth: threads now and then wake late, which a median counts as never or always."""
    ordered = sorted(times)
    return statistics.fmean(ordered[: len(ordered) - -(-len(ordered) // 10)])


def _bandwidth(comm: Communicator, ring: _Ring) -> float:
    """Bytes per second of long messages."""
    _exchanges(comm, ring, SIZES[-2][0], 1)
    (small, few), (large, many) = SIZES[-2:]
    first_s = _typical(_exchanges(comm, ring, small, few))
    return _slope((small, first_s), (large, _typical(_exchanges(comm, ring, large, many))))


def _slope(short: tuple[int, float], long: tuple[int, float]) -> float:
    """Bytes per second from the difference of two messages, or from the longer one alone where noise hides it."""
    more_s = long[1] - short[1]
    return (long[0] - short[0]) / more_s if more_s > 0.2 * long[1] else long[0] / long[1]


def fitted_link(times: RingTimes) -> Link:
    """Fit latency and bandwidth, and the size above which messages have another latency, if there is one."""
    message_s = times.message_s
    bytes_per_s = _slope(message_s[-3], message_s[-1])
    # The rank's own time is counted apart, as `exchange_s`.
    rest_s = [(size, max(0.0, seconds - 2 * times.own_s - size / bytes_per_s)) for size, seconds in message_s]
    latency_s = max(1e-7, min(seconds - 2 * times.own_s for _, seconds in message_s[:2]))
    long_latency_s = statistics.median(seconds for _, seconds in rest_s[3:6]) - latency_s
    if long_latency_s < SIGNIFICANT_LATENCY * latency_s:
        return Link(latency_s, bytes_per_s)
    shorts = takewhile(lambda point: point[1] < latency_s + long_latency_s / 2, rest_s)
    return Link(latency_s, bytes_per_s, max((size for size, _ in shorts), default=0), long_latency_s)


def _moved_byte_s(comm: Communicator, ring: _Ring | None) -> float:
    """Seconds that a moving byte takes from the computation beside it. All ranks compute, in a ring or not."""
    a = torch.ones(BUSY_SIZE, BUSY_SIZE)
    busy = _repeat(lambda: torch.mm(a, a))
    busy(BUSY_CALLS)
    message_s = 0.0 if ring is None else max(_exchanges(comm, ring, OVERLAP_BYTES, 3))
    call_s = busy(BUSY_CALLS) / BUSY_CALLS
    num_calls = max(BUSY_CALLS, int(min(MAX_BUSY_S, 2 * message_s) / call_s))
    outgoing, incoming = _buffers(OVERLAP_BYTES)
    alone_s: list[float] = []
    beside_s: list[float] = []
    for _ in range(OVERLAP_REPEATS):
        barrier(comm)
        alone_s.append(busy(num_calls))
        barrier(comm)
        if ring is not None:
            pending = comm.exchange([(ring.successor, outgoing)], [(ring.predecessor, incoming)])
            beside_s.append(busy(num_calls))
            pending.wait()
    if ring is None:
        return 0.0
    lost_s = statistics.median(beside_s) - statistics.median(alone_s)
    return min(max(0.0, lost_s), message_s) / (2 * OVERLAP_BYTES)


def _buffers(num_bytes: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)


def _repeat(call: Callable[[], object]) -> Callable[[int], float]:
    """Return a function that makes a given number of calls, and returns their seconds."""

    def run(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - started

    return run
