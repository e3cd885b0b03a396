"""Protocol of launchers, which start and end the processes of a group.

Holds the protocol. Must not know messages or plans.
Read next: `longspan.engine.processes`, `longspan.engine.external`, `longspan.engine.ray_cluster`.
"""

from typing import Protocol

from longspan.comm.secret import Secret
from longspan.group.shape import GroupShape, ProcessId


class Launcher(Protocol):
    """Starts the processes of a group, on any machines, and ends them."""

    bind_address: str
    """ZeroMQ address at which the driver's link listens."""
    secret: Secret | None
    """Secret that a process must know to connect; None where only this user's processes can connect."""
    directory: str | None
    """Directory on this machine where the processes meet; None where their environment names a meeting point."""
    is_remote: bool
    """Whether processes may be out of reach of signals, so that messages tell them to end, and why."""

    def start(self, address: str, shape: GroupShape) -> None:
        """Start all processes.

        Args:
            address: address at which they find the driver.
            shape: shape of the group.
        """

    def name(self, process: ProcessId) -> str | None:
        """Return a name for a process that has not introduced itself, or None if none is known."""

    def ended(self, process: ProcessId) -> str | None:
        """Return how a process ended, in words; None while it runs, or where that cannot be known."""

    def kill(self) -> None:
        """Kill all processes that this launcher can reach. Any thread may call it."""

    def renew(self) -> bool:
        """Kill all processes and prepare to start new ones; return False where only a new launcher can do that."""

    def release(self, patience_s: float) -> None:
        """Wait `patience_s` seconds for processes that were asked to end, kill the others, and clean up."""
