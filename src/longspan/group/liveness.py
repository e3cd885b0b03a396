"""Seconds since each process gave a sign of life, and since it made progress, as the driver hears it.

Holds sums of seconds and their limits. Must not know clocks, sockets, or the consequences of an exceeded limit.
Read next: `longspan.group.heartbeat`, where the signs come from; `longspan.engine.watch`, which asks.
"""

from collections.abc import Iterable

from longspan.group.heartbeat import silence_limit_s, stuck_limit_s
from longspan.group.shape import ProcessId


class Liveness:
    """Silence and lack of progress of a group's processes. The caller measures the time that passes."""

    def __init__(self, processes: Iterable[ProcessId], exchange_timeout_s: float) -> None:
        """Start with no time passed for any process.

        Args:
            processes: processes of the group.
            exchange_timeout_s: longest time that a rank waits for a peer.
        """
        processes = tuple(processes)
        self._silence_s = dict.fromkeys(processes, 0.0)
        self._stuck_s = dict.fromkeys(processes, 0.0)  # since a process whose rank owes an answer made progress
        self._progress = dict.fromkeys(processes, 0)
        self._silence_limit_s = silence_limit_s(exchange_timeout_s)
        self.stuck_limit_s = stuck_limit_s(exchange_timeout_s)
        """Longest time in seconds without progress for a process that has a plan to run."""

    def heard(self, process: ProcessId, progress: int) -> None:
        """Note a sign of life.

        Args:
            process: the process that gave it.
            progress: the process's progress (`ProcessProgress`).
        """
        self._silence_s[process] = 0.0
        if self._progress[process] != progress:
            self._progress[process], self._stuck_s[process] = progress, 0.0

    def got_further(self, process: ProcessId) -> None:
        """Note that a process has been admitted, or has finished a plan."""
        self._silence_s[process] = self._stuck_s[process] = 0.0

    def wait(self, process: ProcessId, step_s: float, *, is_loading: bool) -> float | None:
        """Let time pass for an admitted process; return its seconds of silence if they exceed the limit, else None.

        Args:
            process: the process.
            step_s: seconds since the last call.
            is_loading: whether the process loads weights, which may keep the whole machine busy.
        """
        silence_s = self._silence_s[process] = self._silence_s[process] + step_s
        return silence_s if silence_s > (self.stuck_limit_s if is_loading else self._silence_limit_s) else None

    def work(self, process: ProcessId, step_s: float, *, is_owing: bool) -> bool:
        """Let time pass for a process whose rank may owe an answer; return whether it is stuck.

        Args:
            process: the process.
            step_s: seconds since the last call.
            is_owing: whether its rank owes an answer to a plan.
        """
        self._stuck_s[process] = self._stuck_s[process] + step_s if is_owing else 0.0
        return self._stuck_s[process] > self.stuck_limit_s
