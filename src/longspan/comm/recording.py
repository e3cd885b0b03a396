"""Counts what another communicator sends.

Holds counters only. Must not change what is sent.
Read next: `longspan.worker.runner`, which reports them.
"""

from collections.abc import Sequence

from torch import Tensor

from longspan.comm.base import Communicator, Pending


class RecordingCommunicator:
    """Wraps a communicator and counts calls, messages and bytes."""

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner
        self.rank, self.size = inner.rank, inner.size
        self.num_exchanges = 0
        """Calls of `exchange`."""
        self.messages_sent = 0
        self.bytes_sent = 0

    def exchange(self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]) -> Pending:
        self.num_exchanges += 1
        for _, tensor in sends:
            if tensor.numel():
                self.messages_sent += 1
                self.bytes_sent += tensor.numel() * tensor.element_size()
        return self.inner.exchange(sends, recvs)

    def close(self) -> None:
        self.inner.close()
