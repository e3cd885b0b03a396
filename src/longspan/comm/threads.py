"""Communicators of ranks that are threads of one process: for tests, debugging and machines with one device.

Holds queues between threads. Must not know attention, pages or plans.
Read next: `longspan.comm.distributed`, the same interface between processes.
"""

import queue
from collections.abc import Sequence

from torch import Tensor

from longspan.comm.base import RANKS, Communicator, GroupNames, Pending
from longspan.errors import CommunicationError

_Mailbox = queue.SimpleQueue[Tensor]


class ThreadCommunicator:
    """One rank of a group of threads. Make all of them at once with `thread_group`."""

    def __init__(self, rank: int, mailboxes: list[list[_Mailbox]], timeout_s: float, names: GroupNames) -> None:
        self.rank, self._names = rank, names
        self.size = len(mailboxes)
        self._mailboxes = mailboxes  # [source][destination]
        self._timeout_s = timeout_s

    def exchange(self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]) -> Pending:
        for peer, tensor in sends:
            if tensor.numel():
                self._mailboxes[self.rank][peer].put(tensor.clone())
        return _PendingReceive(self, [(peer, tensor) for peer, tensor in recvs if tensor.numel()])

    def receive(self, peer: int, tensor: Tensor) -> None:
        """Wait for the next message of a peer and copy it."""
        try:
            message = self._mailboxes[peer][self.rank].get(timeout=self._timeout_s)
        except queue.Empty:
            raise CommunicationError(
                f"{self._names.own(self.rank)}: nothing from {self._names.peer(peer)} within {self._timeout_s:g} s "
                f"(receive of {tensor.numel()} elements)"
            ) from None
        if message.numel() != tensor.numel() or message.dtype != tensor.dtype:
            raise CommunicationError(
                f"{self._names.own(self.rank)}: {self._names.peer(peer)} sent {message.numel()} {message.dtype}, "
                f"expected {tensor.numel()} {tensor.dtype}"
            )
        tensor.copy_(message.view(tensor.shape))

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


class _PendingReceive:
    def __init__(self, comm: ThreadCommunicator, recvs: list[tuple[int, Tensor]]) -> None:
        self._comm, self._recvs = comm, recvs

    def wait(self) -> None:
        while self._recvs:
            peer, tensor = self._recvs.pop(0)
            self._comm.receive(peer, tensor)


def thread_group(size: int, *, timeout_s: float = 300.0, names: GroupNames = RANKS) -> list[Communicator]:
    """Make the communicators of `size` ranks, one for each thread."""
    mailboxes: list[list[_Mailbox]] = [[queue.SimpleQueue() for _ in range(size)] for _ in range(size)]
    return [ThreadCommunicator(rank, mailboxes, timeout_s, names) for rank in range(size)]
