"""Detection of messages that were damaged on the way: a checksum follows every message.

Holds the checksums, and a communicator for tests that damages messages. Must not know attention, pages or plans.
Read next: `longspan.comm.base`; the option `check_messages` in `longspan.config`.

Operating systems and network cards already check what they move, so this is for machines that are in doubt. It finds
damage between one rank's memory and another's, not errors of computation.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.comm.base import RANKS, Communicator, GroupNames, Pending
from longspan.errors import CommunicationError


class CheckingCommunicator:
    """Communicator of CPU tensors that adds checksums to another one. All ranks of a group use it, or none."""

    def __init__(self, inner: Communicator, *, names: GroupNames = RANKS) -> None:
        """Wrap a communicator; `names` are those of its members in errors."""
        self._inner, self._names = inner, names
        self.rank, self.size = inner.rank, inner.size

    def exchange(self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]) -> Pending:
        """See `Communicator.exchange`; `wait` also raises `CommunicationError` for a damaged message."""
        outgoing: list[tuple[int, Tensor]] = []
        for peer, tensor in sends:
            if tensor.numel():
                outgoing += [(peer, tensor), (peer, torch.tensor([_checksum(tensor)]))]
        incoming: list[tuple[int, Tensor]] = []
        for peer, tensor in recvs:
            if tensor.numel():
                incoming += [(peer, tensor), (peer, torch.empty(1, dtype=torch.int64))]
        return _PendingChecks(self.rank, self._names, self._inner.exchange(outgoing, incoming), incoming)

    def close(self) -> None:
        self._inner.close()


class _PendingChecks:
    """Exchange that has been started, with a checksum after every message."""

    def __init__(self, rank: int, names: GroupNames, pending: Pending, incoming: Sequence[tuple[int, Tensor]]) -> None:
        self._rank, self._names, self._pending, self._incoming = rank, names, pending, incoming

    def wait(self) -> None:
        self._pending.wait()
        for (peer, message), (_, checksum) in zip(self._incoming[::2], self._incoming[1::2], strict=True):
            if _checksum(message) != checksum.item():
                raise CommunicationError(
                    f"{self._names.own(self._rank)}: a message of {message.nbytes} bytes from "
                    f"{self._names.peer(peer)} was damaged on the way"
                )


class DamagingCommunicator:
    """Communicator that damages a message of another one when told to."""

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner
        self.rank, self.size = inner.rank, inner.size
        self._damages_next = False

    def damage_next(self) -> None:
        """Flip one bit of the next message."""
        self._damages_next = True

    def exchange(self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]) -> Pending:
        sends = list(sends)
        if self._damages_next and (found := next((i for i, (_, t) in enumerate(sends) if t.numel()), None)) is not None:
            self._damages_next = False
            peer, tensor = sends[found]
            damaged = tensor.clone()
            damaged.view(-1).view(torch.uint8)[-1] ^= 0x40  # of a float, a high bit of its exponent
            sends[found] = (peer, damaged)
        return self._inner.exchange(sends, recvs)

    def close(self) -> None:
        self._inner.close()


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().data)
