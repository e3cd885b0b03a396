"""How long ago each process gave a sign of life, and got further with its work, as the driver hears it.

Holds sums of seconds, and the limits that they are compared with. Must not know clocks, sockets, or what follows from a
limit that is exceeded.
Read next: `longspan.group.heartbeat`, where the signs come from; `longspan.engine.watch`, which asks.
"""

from collections.abc import Iterable

from longspan.group.heartbeat import silence_limit_s, stuck_limit_s
from longspan.group.shape import ProcessId


class Liveness:
    """The processes of one group. Time passes in steps that the caller measures."""

    def __init__(self, processes: Iterable[ProcessId], exchange_timeout_s: float) -> None:
        """Nothing has been heard, and no time has passed.

        Args:
            processes: of the group.
            exchange_timeout_s: longest time that a rank waits for a peer.
        """
        processes = tuple(processes)
        self._silence_s = dict.fromkeys(processes, 0.0)
        self._stuck_s = dict.fromkeys(processes, 0.0)  # since a process whose rank owes an answer got further
        self._progress = dict.fromkeys(processes, 0)
        self._silence_limit_s = silence_limit_s(exchange_timeout_s)
        self.stuck_limit_s = stuck_limit_s(exchange_timeout_s)
        """How long a process may get no further with a plan."""

    def heard(self, process: ProcessId, progress: int) -> None:
        """A sign of life has come.

        Args:
            process: whose.
            progress: what it has begun, as it counts.
        """
        self._silence_s[process] = 0.0
        if self._progress[process] != progress:
            self._progress[process], self._stuck_s[process] = progress, 0.0

    def got_further(self, process: ProcessId) -> None:
        """A process has come, or has done a plan."""
        self._silence_s[process] = self._stuck_s[process] = 0.0

    def wait(self, process: ProcessId, step_s: float, *, is_loading: bool) -> float | None:
        """Let time pass for a process that has come. Returns its seconds of silence if they are too many.

        Args:
            process: which one.
            step_s: seconds since the last call.
            is_loading: whether it loads weights, which may take all that a machine can do.
        """
        silence_s = self._silence_s[process] = self._silence_s[process] + step_s
        return silence_s if silence_s > (self.stuck_limit_s if is_loading else self._silence_limit_s) else None

    def work(self, process: ProcessId, step_s: float, *, is_owing: bool) -> bool:
        """Let time pass for a process whose rank may owe an answer. Returns whether it is stuck.

        Args:
            process: which one.
            step_s: seconds since the last call.
            is_owing: whether an answer of its rank to a plan is missing.
        """
        self._stuck_s[process] = self._stuck_s[process] + step_s if is_owing else 0.0
        return self._stuck_s[process] > self.stuck_limit_s
