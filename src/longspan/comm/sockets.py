"""Communicator of ranks that are processes: small messages over sockets, large ones over `torch.distributed`.

Holds the messages and the choice between the two. Must not know attention, pages or plans, or which ranks share a host.
Read next: `longspan.comm.connect`, which makes the sockets; `longspan.comm.recording`.

Note [Two ways]
A round trip of a few kilobytes takes gloo about 0.3 ms, mostly to wake its threads, and a Unix socket 0.01 to 0.02 ms;
a decode step makes two in every layer. Between hosts a TCP socket takes a Unix socket's place. Large messages stay with
gloo, whose threads move them while this one computes. Both sides know every message's size, so both choose the same
way, and each way keeps the order of its messages.

Note [No deadlock]
A send never blocks: what a socket's buffer does not take waits in a queue, and a rank that waits for small messages
goes on sending from all queues. Only a wait for a large message sends nothing; `SMALL_BYTES` is so small that the
queues are empty then. Where they are not (a `tree` over many nodes), the order prevents a deadlock: every rank waits
for exchanges in the order in which all ranks start them (`longspan.cp.pass_q`, Note [Order]), and receives an
exchange's small messages before it waits for the large ones. A relay has many small messages under way, parts of
states, and waits for those that it has sent before it receives others (`longspan.cp.relay`).
"""

import select
import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.comm.base import Pending
from longspan.comm.connect import Meeting, connect_all
from longspan.comm.distributed import DistributedCommunicator, GroupCommunicator
from longspan.comm.shared_sums import SharedSums, shared_by_processes
from longspan.errors import CommunicationError

SMALL_BYTES = 32 * 1024
"""Largest message that goes over a socket. The few messages that a strategy has under way to one peer fit into the
socket's buffer of about 200 KiB (`BUFFER_BYTES` for TCP); where a `tree` has more, see Note [No deadlock]."""


LOOK_S = 400e-6
"""Seconds for which a rank with a core of its own should poll for a small message before it sleeps."""


class SocketCommunicator:
    """One rank of a group, for tensors on the CPU."""

    def __init__(
        self,
        rank: int,
        size: int,
        meeting: Meeting,
        *,
        timeout_s: float = 300.0,
        look_s: float = 0.0,
        large: GroupCommunicator | None = None,
    ) -> None:
        """Join the group.

        Args:
            rank: position of this process's rank.
            size: number of ranks in the group.
            meeting: where the ranks meet.
            timeout_s: longest wait for a peer in every exchange.
            look_s: seconds for which a wait for small messages polls before it sleeps. Waking up takes 30 to 60 us;
                polling keeps a core busy, so it is for ranks with a core of their own.
            large: communicator of the large messages; None makes a default process group for them.

        Raises:
            CommunicationError: not all ranks came.

        Collective: all `size` ranks must join.
        """
        self.rank, self.size = rank, size
        self._timeout_s, self._look_s = timeout_s, look_s
        # Returns when all ranks have joined.
        self._large = large or DistributedCommunicator(rank, size, meeting.init_method, timeout_s=timeout_s)
        self._names = self._large.names
        try:
            self._sockets = connect_all(rank, size, self._large.store, meeting, timeout_s=timeout_s)
        except (OSError, RuntimeError) as error:
            raise CommunicationError(f"{self._names.own(rank)}: could not join the group of {size}: {error}") from error
        self._unsent: dict[int, deque[memoryview]] = {peer: deque() for peer in self._sockets}
        self._num_sent = dict.fromkeys(self._sockets, 0)  # small messages that a peer's socket has taken

    @property
    def _me(self) -> str:
        return self._names.own(self.rank)

    def exchange(self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]) -> Pending:
        large_sends = [(peer, tensor) for peer, tensor in sends if tensor.nbytes > SMALL_BYTES]
        large_recvs = [(peer, tensor) for peer, tensor in recvs if tensor.nbytes > SMALL_BYTES]
        large = self._large.exchange(large_sends, large_recvs) if large_sends or large_recvs else None
        outgoing = [(peer, _bytes_of(tensor)) for peer, tensor in sends if 0 < tensor.nbytes <= SMALL_BYTES]
        incoming = [(peer, _bytes_of(tensor)) for peer, tensor in recvs if 0 < tensor.nbytes <= SMALL_BYTES]
        num_sent: dict[int, int] = {}  # what `_num_sent` is when the messages of this exchange are on their way
        for peer, message in outgoing:
            self._unsent[peer].append(message)
            num_sent[peer] = self._num_sent[peer] + len(self._unsent[peer])
            self._send(peer)
        return _PendingMessages(self, large, num_sent, incoming)

    def share_sums(self) -> SharedSums | None:
        """Make sums of this group in memory that all members share; None where they are on several hosts.

        Collective: all members, before their first exchange.
        """
        return shared_by_processes(
            self._sockets, self.rank, names=self._names, timeout_s=self._timeout_s, look_s=self._look_s
        )

    def close(self) -> None:
        for connection in self._sockets.values():
            connection.close()
        self._large.close()

    def finish(self, num_sent: dict[int, int], unread: list[tuple[int, memoryview]]) -> None:
        """Return when the small messages of an exchange have been sent and received.

        Args:
            num_sent: per peer, the number of small messages since the start that its socket has taken by then.
            unread: (peer, message) pairs to fill, in order.

        Raises:
            CommunicationError: a peer did not answer within the deadline, or is gone.
        """
        started = time.monotonic()
        while True:
            unread = self._receive_all(unread)
            if not unread and all(self._num_sent[peer] >= num for peer, num in num_sent.items()):
                return
            # It looks without `sched_yield`: a program of low priority would get the core for milliseconds.
            if time.monotonic() >= started + self._look_s:
                self._wait_for([peer for peer, _ in unread], started + self._timeout_s)

    def _receive_all(self, unread: list[tuple[int, memoryview]]) -> list[tuple[int, memoryview]]:
        """Read the bytes that have arrived; return what is still missing, in order."""
        rest: list[tuple[int, memoryview]] = []
        blocked: set[int] = set()  # a peer's second message is behind its first
        for peer, message in unread:
            count = 0 if peer in blocked else self._receive(peer, message)
            if count < len(message):
                blocked.add(peer)
                rest.append((peer, message[count:]))
        return rest

    def _send(self, peer: int) -> None:
        """Hand the socket as many bytes of the messages to a peer as it takes now."""
        queue = self._unsent[peer]
        try:
            while queue:
                count = self._sockets[peer].send(queue[0])
                if count < len(queue[0]):
                    queue[0] = queue[0][count:]
                else:
                    queue.popleft()
                    self._num_sent[peer] += 1
        except BlockingIOError:
            pass
        except OSError as error:
            raise CommunicationError(f"{self._me}: send to {self._names.peer(peer)} failed: {error}") from error

    def _receive(self, peer: int, message: memoryview) -> int:
        """Read the bytes of a peer's message that have arrived; return their number."""
        try:
            count = self._sockets[peer].recv_into(message)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise CommunicationError(f"{self._me}: receive from {self._names.peer(peer)} failed: {error}") from error
        if not count:
            name = self._names.peer(peer)
            raise CommunicationError(f"{self._me}: receive from {name} failed: it has closed the connection")
        return count

    def _wait_for(self, readers: Sequence[int], deadline: float) -> None:
        """Sleep until one of the `readers` has sent something, or a peer can take more."""
        poller = select.poll()
        events = dict.fromkeys(readers, select.POLLIN)
        for peer, queue in self._unsent.items():
            if queue:
                events[peer] = events.get(peer, 0) | select.POLLOUT
        for peer, event in events.items():
            poller.register(self._sockets[peer], event)
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1e3):
            waits = [
                f"{'receive from' if peer in readers else 'send to'} {self._names.peer(peer)}"
                for peer in sorted(events)
            ]
            raise CommunicationError(f"{self._me}: {', '.join(waits)} failed: not done within {self._timeout_s:g} s")
        for peer, queue in self._unsent.items():
            if queue:
                self._send(peer)


class _PendingMessages:
    """Exchange that has been started, with large messages, small ones, or both."""

    def __init__(
        self,
        comm: SocketCommunicator,
        large: Pending | None,
        num_sent: dict[int, int],
        incoming: list[tuple[int, memoryview]],
    ) -> None:
        self._comm, self._large, self._num_sent, self._incoming = comm, large, num_sent, incoming

    def wait(self) -> None:
        self._comm.finish(self._num_sent, self._incoming)
        if self._large is not None:
            self._large.wait()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data
