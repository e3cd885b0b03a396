"""What starts and ends the processes of a group: the protocol of launchers.

Holds the protocol. Must not know messages or plans.
Read next: `longspan.engine.processes`, `longspan.engine.external`, `longspan.engine.ray_cluster`.
"""

from typing import Protocol

from longspan.comm.secret import Secret
from longspan.group.shape import GroupShape, ProcessId


class Launcher(Protocol):
    """Starts the processes of a group, somewhere, and ends them."""

    bind_address: str
    """Where the driver's link listens, as ZeroMQ writes it."""
    secret: Secret | None
    """What a process must know to connect; None where only this user can."""
    directory: str | None
    """Where the processes meet, on this machine; None: as their environment says."""
    is_remote: bool
    """Whether processes may be out of reach of signals: then they are told to end, and told why."""

    def start(self, address: str, shape: GroupShape) -> None:
        """Start all processes.

        Args:
            address: where they find the driver.
            shape: of the group.
        """

    def name(self, process: ProcessId) -> str | None:
        """A process in words before it has introduced itself, or None."""

    def ended(self, process: ProcessId) -> str | None:
        """How a process ended, in words; None while it runs, or if that cannot be known."""

    def kill(self) -> None:
        """End all processes that this launcher can end, at once. Any thread may call it."""

    def renew(self) -> bool:
        """End all processes, and make ready to start new ones. Returns False where another launcher must do that."""

    def release(self, patience_s: float) -> None:
        """Wait so long for processes that were asked to end, kill the rest, and leave nothing behind."""
