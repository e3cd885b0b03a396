"""Why a group failed: the cause, picked from everything that its processes showed.

Holds the verdict. Must not know sockets, or how a process is started or ended.
Read next: `longspan.engine.watch`, which notices the signs; `longspan.group.liveness`.

Note: cause and consequence
    When rank 1's process is killed, rank 0's exchange with it breaks, and rank 0 may say so before the driver sees that
    rank 1 is gone. So the driver listens a little longer after the first sign, and then takes the first that there is
    of: what the user asked for cannot be done; a process ended without a word; a process failed by itself; a process
    says that a peer is gone or did not answer; a process gives no sign of life, or does not get any further.
"""

import signal
from collections.abc import Callable

from longspan.errors import ConfigError, WorkerError
from longspan.group.messages import Failed
from longspan.group.shape import GroupShape, ProcessId


class Failures:
    """Signs of failure of one group, as they are noticed. One process that fails is enough."""

    def __init__(self, shape: GroupShape) -> None:
        """Nothing has failed.

        Args:
            shape: of the group.
        """
        self._shape = shape
        self._said: dict[ProcessId, Failed] = {}
        self._ended: dict[ProcessId, WorkerError] = {}
        self._lost: set[ProcessId] = set()  # those in `_ended` of which the connection is all that is known
        self._silent: dict[ProcessId, WorkerError] = {}  # or stuck
        self.first_s: float | None = None
        """When the first sign came, on the caller's clock; None while all is well."""

    def _notice(self, now_s: float) -> None:
        if self.first_s is None:
            self.first_s = now_s

    def said(self, message: Failed, now_s: float) -> None:
        """A process told why it cannot go on."""
        self._said[message.process] = message
        self._notice(now_s)

    def ended(self, process: ProcessId, name: str, how: str, now_s: float) -> None:
        """A process is gone.

        Args:
            process: which one.
            name: the same for the user, in words.
            how: it ended, in words.
            now_s: the caller's clock.
        """
        if process not in self._ended or process in self._lost:
            self._ended[process] = WorkerError(f"{name} {how}")
            self._lost.discard(process)
        self._notice(now_s)

    def lost(self, process: ProcessId, name: str, now_s: float) -> None:
        """A connection is gone, and with it the process, but not how it ended; that may become known later."""
        if process not in self._ended:
            self._ended[process] = WorkerError(f"{name} is gone: its connection to the driver has closed")
            self._lost.add(process)
        self._notice(now_s)

    def silent(self, process: ProcessId, name: str, silence_s: float, why: str, now_s: float) -> None:
        """A process gives no sign of life, which means `why`, in words."""
        self._silent.setdefault(process, WorkerError(f"{name} has given no sign of life for {silence_s:.0f} s: {why}"))
        self._notice(now_s)

    def stuck(self, process: ProcessId, name: str, limit_s: float, now_s: float) -> None:
        """A process is alive, but does not get any further with a plan."""
        self._silent.setdefault(
            process, WorkerError(f"{name} has got no further for {limit_s:.0f} s: it hangs, or computes for ever")
        )
        self._notice(now_s)

    @property
    def is_complete(self) -> bool:
        """Whether nothing more can be learnt: every process has ended, or said why it cannot go on."""
        return len(self._said.keys() | (self._ended.keys() - self._lost)) == self._shape.world_size

    def cause(self) -> Exception:
        """The error to report: see Note: cause and consequence."""
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
        """A process's last words as an exception."""
        if message.blames == "user":
            return ConfigError(message.reason)
        prefix = f"{self._shape.name(message.process)}: "
        error = WorkerError(prefix + message.reason.removeprefix(prefix))
        error.add_note(message.details)
        return error


def describe_end(returncode: int) -> str:
    """How a process ended, in words."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:  # a real-time signal
        name = f"signal {-returncode}"
    return f"was killed by {name}"
