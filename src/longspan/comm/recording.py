"""Counts of the messages that another communicator sends.

Holds counters only. Must not change what is sent.
Read next: `longspan.worker.runner`, which reports the counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from longspan.comm.base import Communicator, Pending


class Traffic(NamedTuple):
    """Counts of a rank's exchanges, of the messages it sent, and of their bytes."""

    num_exchanges: int
    messages_sent: int
    bytes_sent: int

    def since(self, before: Traffic) -> Traffic:
        """Difference to an earlier count."""
        return Traffic(*(now - then for now, then in zip(self, before, strict=True)))

    def plus(self, more: Traffic) -> Traffic:
        """Sum of two counts."""
        return Traffic(*(some + others for some, others in zip(self, more, strict=True)))


class RecordingCommunicator:
    """Communicator that counts the calls, messages and bytes of another one."""

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner
        self.rank, self.size = inner.rank, inner.size
        self.num_exchanges = 0
        """Number of calls of `exchange`."""
        self.messages_sent = 0
        self.bytes_sent = 0

    def exchange(self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]) -> Pending:
        self.num_exchanges += 1
        for _, tensor in sends:
            if tensor.numel():
                self.messages_sent += 1
                self.bytes_sent += tensor.numel() * tensor.element_size()
        return self.inner.exchange(sends, recvs)

    @property
    def traffic(self) -> Traffic:
        """All counts so far."""
        return Traffic(self.num_exchanges, self.messages_sent, self.bytes_sent)

    @traffic.setter
    def traffic(self, traffic: Traffic) -> None:
        self.num_exchanges, self.messages_sent, self.bytes_sent = traffic

    def close(self) -> None:
        self.inner.close()
