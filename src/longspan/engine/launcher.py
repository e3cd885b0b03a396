"""What starts and ends the processes of ranks: the protocol of launchers.

Holds the protocol. Must not know messages or plans.
Read next: `longspan.engine.processes`, `longspan.engine.external`, `longspan.engine.ray_cluster`.
"""

from typing import Protocol

from longspan.comm.secret import Secret


class Launcher(Protocol):
    """Starts one process per rank, somewhere, and ends them."""

    bind_address: str
    """Where the driver's link listens, as ZeroMQ writes it."""
    secret: Secret | None
    """Whoever knows it may connect; None where only this user can."""
    directory: str | None
    """Where the ranks meet, on this machine; None: as the ranks' environment says."""
    is_remote: bool
    """Whether ranks may be out of reach of signals: then they are told to end, and told why."""

    def start(self, address: str, size: int) -> None:
        """Start all ranks. Args: `address` is where they find the driver; `size` is how many they are."""

    def name(self, rank: int) -> str | None:
        """A rank in words before it has introduced itself, or None."""

    def ended(self, rank: int) -> str | None:
        """How a rank's process ended, in words; None while it runs, or if that cannot be known."""

    def kill(self) -> None:
        """End all ranks that this launcher can end, at once. Any thread may call it."""

    def renew(self) -> bool:
        """End all ranks, and make ready to start new ones. Returns False where another launcher must do that."""

    def release(self, patience_s: float) -> None:
        """Wait so long for processes that were asked to end, kill the rest, and leave nothing behind."""
