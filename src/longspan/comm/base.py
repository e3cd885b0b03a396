"""Interface of a communicator: one primitive, a set of point-to-point messages.

Holds the protocol. Must not know attention, pages or plans.
Read next: `longspan.comm.distributed`, `longspan.comm.threads`.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class GroupNames(NamedTuple):
    """Names of a group's members in errors. A member is a rank, or one process of several that a rank has."""

    noun: str
    """What a number in the group counts: `rank`, or `process` inside of a rank."""
    me: str | None = None
    """Name of this process; None where its number in the group says it."""

    def own(self, rank: int) -> str:
        """Name of this process, whose number in the group is `rank`."""
        return self.me or self.peer(rank)

    def peer(self, rank: int) -> str:
        """Name of another member."""
        return f"{self.noun} {rank}"


RANKS = GroupNames("rank")
"""Names of ranks that are one process each."""

PROCESSES = GroupNames("process")
"""Names of the processes of one rank."""


class Pending(Protocol):
    """Exchange that has been started."""

    def wait(self) -> None:
        """Return when all messages have arrived and the sent tensors may be overwritten.

        Raises:
            CommunicationError: a peer did not answer within the deadline, or is gone.
        """


class Communicator(Protocol):
    """Mover of tensors between the ranks of a cp_group, one process of each rank."""

    @property
    def rank(self) -> int:
        """Position of this process's rank in the cp_group."""

    @property
    def size(self) -> int:
        """Number of ranks in the group."""

    def exchange(self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]) -> Pending:
        """Start sending and receiving.

        Args:
            sends: (peer, tensor) pairs; contiguous, not written until `wait` returns.
            recvs: (peer, tensor) pairs; contiguous, written when `wait` returns.

        Collective: every message needs its counterpart in the peer's own call, with the same dtype and number of
        elements. Messages between one pair of ranks arrive in the order sent, so exchanges that receive from one
        peer must be waited for in the order they were started. Messages without elements are not sent: both sides
        know their sizes.
        """

    def close(self) -> None:
        """Leave the group."""
