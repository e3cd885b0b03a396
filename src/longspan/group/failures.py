"""Cause of a group's failure, picked from all signs that its processes gave.

Holds the verdict. Must not know sockets, or how a process is started or ended.
Read next: `longspan.engine.watch`, which notices the signs; `longspan.group.liveness`.

Note [Cause and consequence]
    When rank 1's process is killed, rank 0's exchange with it breaks, and rank 0 may report that before the driver sees
    that rank 1 is gone. So the driver listens a little longer after the first sign, and then reports the first of these
    that it has seen: the user asked for something impossible; a process ended without a message; a process failed by
    itself; a process reports that a peer is gone or did not answer; a process is silent, or makes no progress.
"""

import signal
from collections.abc import Callable

from longspan.errors import ConfigError, WorkerError
from longspan.group.messages import Failed
from longspan.group.shape import GroupShape, ProcessId


class Failures:
    """Signs of failure of one group, in the order they are noticed. One process that fails is enough."""

    def __init__(self, shape: GroupShape) -> None:
        """Start without a sign of failure.

        Args:
            shape: ranks and processes of the group.
        """
        self._shape = shape
        self._said: dict[ProcessId, Failed] = {}
        self._ended: dict[ProcessId, WorkerError] = {}
        self._lost: set[ProcessId] = set()  # those in `_ended` of which only the end of the connection is known
        self._silent: dict[ProcessId, WorkerError] = {}  # or stuck
        self.first_s: float | None = None
        """Time of the first sign, on the caller's clock; None while all is well."""

    def _notice(self, now_s: float) -> None:
        if self.first_s is None:
            self.first_s = now_s

    def said(self, message: Failed, now_s: float) -> None:
        """Note that a process told why it cannot go on."""
        self._said[message.process] = message
        self._notice(now_s)

    def ended(self, process: ProcessId, name: str, how: str, now_s: float) -> None:
        """Note that a process has ended.

        Args:
            process: the process.
            name: the process in words, for the user.
            how: how it ended, in words.
            now_s: time on the caller's clock.
        """
        if process not in self._ended or process in self._lost:
            self._ended[process] = WorkerError(f"{name} {how}")
            self._lost.discard(process)
        self._notice(now_s)

    def lost(self, process: ProcessId, name: str, now_s: float) -> None:
        """Note that a process's connection is gone; how the process ended may become known later."""
        if process not in self._ended:
            self._ended[process] = WorkerError(f"{name} is gone: its connection to the driver has closed")
            self._lost.add(process)
        self._notice(now_s)

    def silent(self, process: ProcessId, name: str, silence_s: float, why: str, now_s: float) -> None:
        """Note that a process gives no sign of life; `why` says in words what that means."""
        self._silent.setdefault(process, WorkerError(f"{name} has given no sign of life for {silence_s:.0f} s: {why}"))
        self._notice(now_s)

    def stuck(self, process: ProcessId, name: str, limit_s: float, now_s: float) -> None:
        """Note that a process is alive, but makes no progress with a plan."""
        self._silent.setdefault(
            process, WorkerError(f"{name} has got no further for {limit_s:.0f} s: it hangs, or computes for ever")
        )
        self._notice(now_s)

    @property
    def is_complete(self) -> bool:
        """Whether every process has ended or said why it cannot go on, so that nothing more can be learnt."""
        return len(self._said.keys() | (self._ended.keys() - self._lost)) == self._shape.world_size

    def cause(self) -> Exception:
        """Return the error to report. See Note [Cause and consequence]."""
        said = self._said.values()
        without_a_word = [error for process, error in self._ended.items() if process not in self._said]
        rules: tuple[Callable[[], list[Exception]], ...] = (
            lambda: [self._as_error(message) for message in said if message.blames == "user"],
            lambda: [*without_a_word],
            lambda: [self._as_error(message) for message in said if message.blames == "process"],
            lambda: [self._as_error(message) for message in said],
            lambda: [*self._silent.values()],
        )
        return next(found[0] for rule in rules if (found := rule()))

    def _as_error(self, message: Failed) -> Exception:
        """Turn a process's last message into an exception."""
        if message.blames == "user":
            return ConfigError(message.reason)
        prefix = f"{self._shape.name(message.process)}: "
        error = WorkerError(prefix + message.reason.removeprefix(prefix))
        error.add_note(message.details)
        return error


def describe_end(returncode: int) -> str:
    """Describe in words how a process ended."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:  # a real-time signal
        name = f"signal {-returncode}"
    return f"was killed by {name}"
