"""Simulation of a slow network by delaying messages between nodes, for tests and benchmarks only.

Holds the wrapper and the nodes' send clocks. Must not change what is sent, nor make a sender wait.
Read next: `longspan.simulation`, which says what can be simulated.

Note [Simulated links]
Every node has one link to all others. Its messages leave one behind the other, whichever of its ranks sends them and
whichever rank they go to, each `bytes / bytes_per_s` long; what a node receives is not limited. A message arrives
`latency_s` after its last byte has left. With 1 MB/s, latency 10 ms, and two messages of 1000 bytes sent at 0:

    sender     wait() returns at once
    link       first 0..1 ms, second 1..2 ms
    receiver   first at 11 ms, second at 12 ms

Before each message between nodes the sender sends the time of its arrival. The receiver's `wait` receives both, and
then sleeps until that time, which the kernel overshoots by about 0.06 ms. Times are those of one machine's monotonic
clock, so all ranks must be on one machine (network namespaces share its clock).
"""

import fcntl
import mmap
import os
import struct
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.comm.base import Communicator, Pending
from longspan.simulation import SimulatedLinks

_TIME = struct.Struct("=d")
_PATH_LEN = 64


class NodeClock:
    """Time at which a node's link is free again, in memory shared by the node's ranks (processes or threads)."""

    def __init__(self, path: str | None = None) -> None:
        """Make a clock, or open that of another rank.

        Args:
            path: file of the other rank's clock; None makes a new clock.
        """
        if path is None:  # a file without a name; it is gone with the last process that has it open
            self._file = os.memfd_create("longspan-simulated-node")
            os.ftruncate(self._file, _TIME.size)
        else:
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._memory = mmap.mmap(self._file, _TIME.size)

    @property
    def path(self) -> str:
        """Path of the clock's file for other processes of this machine and user."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def reserve(self, seconds: float) -> float:
        """Occupy the link for `seconds` after all earlier messages; return the end on the monotonic clock."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            (free_at_s,) = _TIME.unpack(self._memory[:])
            end_s = float(max(free_at_s, time.monotonic()) + seconds)
            self._memory[:] = _TIME.pack(end_s)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        return end_s

    def close(self) -> None:
        self._memory.close()
        os.close(self._file)


class DelayingCommunicator:
    """Communicator that delays messages from other nodes. See Note [Simulated links]."""

    def __init__(self, inner: Communicator, links: SimulatedLinks) -> None:
        """Wrap a communicator.

        Args:
            inner: communicator that moves the messages.
            links: simulated links, with one node per rank.

        Collective: all ranks; if one thread makes several, in the order of ranks.
        """
        assert inner.size == len(links.nodes), "one node per rank"
        self._inner, self._links = inner, links
        self.rank, self.size = inner.rank, inner.size
        self._node = links.nodes[self.rank]
        self._clock = self._join_clock([rank for rank, node in enumerate(links.nodes) if node == self._node])

    def _join_clock(self, ranks: Sequence[int]) -> NodeClock:
        """Return the clock of this rank's node, which the node's first rank makes."""
        path = torch.zeros(_PATH_LEN, dtype=torch.uint8)
        if self.rank == ranks[0]:
            clock = NodeClock()
            path[: len(clock.path)] = torch.tensor(list(clock.path.encode()), dtype=torch.uint8)
            self._inner.exchange([(peer, path) for peer in ranks[1:]], []).wait()
            return clock
        self._inner.exchange([], [(ranks[0], path)]).wait()
        return NodeClock(bytes(path.tolist()).rstrip(b"\0").decode())

    def exchange(self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]) -> Pending:
        all_sends: list[tuple[int, Tensor]] = []
        for peer, tensor in sends:
            if tensor.numel() and self._is_far(peer):
                all_sends.append((peer, torch.tensor([self._arrival_s(tensor.nbytes)], dtype=torch.float64)))
            all_sends.append((peer, tensor))
        all_recvs: list[tuple[int, Tensor]] = []
        arrivals: list[Tensor] = []
        for peer, tensor in recvs:
            if tensor.numel() and self._is_far(peer):
                arrivals.append(torch.empty(1, dtype=torch.float64))
                all_recvs.append((peer, arrivals[-1]))
            all_recvs.append((peer, tensor))
        return _HeldBack(self._inner.exchange(all_sends, all_recvs), all_sends, arrivals)

    def _is_far(self, peer: int) -> bool:
        return self._links.nodes[peer] != self._node

    def _arrival_s(self, num_bytes: int) -> float:
        """Time at which a message sent now arrives, on the monotonic clock."""
        rate = self._links.bytes_per_s
        left_s = time.monotonic() if rate is None else self._clock.reserve(num_bytes / rate)
        return left_s + self._links.latency_s

    def close(self) -> None:
        self._clock.close()
        self._inner.close()


class _HeldBack:
    def __init__(self, inner: Pending, sends: list[tuple[int, Tensor]], arrivals: list[Tensor]) -> None:
        self._inner, self._sends, self._arrivals = inner, sends, arrivals  # `_sends` keeps the times' memory

    def wait(self) -> None:
        self._inner.wait()
        for arrival in self._arrivals:
            if (left_s := arrival.item() - time.monotonic()) > 0:
                time.sleep(left_s)
