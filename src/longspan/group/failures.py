"""Why a group of worker processes failed: the cause, picked from everything that its ranks showed.

Holds the verdict. Must not know sockets, or how a process is started or ended.
Read next: `longspan.engine.workers`.

Note: cause and consequence
    When rank 1 is killed, rank 0's exchange with it breaks, and rank 0 may say so before the driver sees that rank 1 is
    gone. So the driver listens a little longer after the first sign, and then takes the first that there is of: what
    the user asked for cannot be done; a rank ended without a word; a rank failed by itself; a rank says that a peer is
    gone or did not answer; a rank gives no sign of life, or does not get any further.
"""

import signal
from collections.abc import Callable

from longspan.errors import ConfigError, WorkerError
from longspan.group.messages import Failed


class Failures:
    """Signs of failure of one group, as they are noticed."""

    def __init__(self) -> None:
        self._said: dict[int, Failed] = {}
        self._ended: dict[int, WorkerError] = {}
        self._lost: set[int] = set()  # ranks in `_ended` of which the connection is all that is known
        self._silent: dict[int, WorkerError] = {}  # or stuck
        self.first_s: float | None = None
        """When the first sign came, on the caller's clock; None while all is well."""

    def _notice(self, now_s: float) -> None:
        if self.first_s is None:
            self.first_s = now_s

    def said(self, message: Failed, now_s: float) -> None:
        """A rank told why it cannot go on."""
        self._said[message.rank] = message
        self._notice(now_s)

    def ended(self, rank: int, name: str, how: str, now_s: float) -> None:
        """A rank's process is gone. Args: its name for the user, and how it ended, both in words."""
        if rank not in self._ended or rank in self._lost:
            self._ended[rank] = WorkerError(f"{name} {how}")
            self._lost.discard(rank)
        self._notice(now_s)

    def lost(self, rank: int, name: str, now_s: float) -> None:
        """A rank's connection is gone, and with it the process, but not how it ended; that may become known later."""
        if rank not in self._ended:
            self._ended[rank] = WorkerError(f"{name} is gone: its connection to the driver has closed")
            self._lost.add(rank)
        self._notice(now_s)

    def silent(self, rank: int, name: str, silence_s: float, why: str, now_s: float) -> None:
        """A rank's process gives no sign of life. Args: its name for the user, and what that means, in words."""
        self._silent.setdefault(rank, WorkerError(f"{name} has given no sign of life for {silence_s:.0f} s: {why}"))
        self._notice(now_s)

    def stuck(self, rank: int, name: str, limit_s: float, now_s: float) -> None:
        """A rank's process is alive, but does not get any further with a plan."""
        self._silent.setdefault(
            rank, WorkerError(f"{name} has got no further for {limit_s:.0f} s: it hangs, or computes for ever")
        )
        self._notice(now_s)

    def is_complete(self, size: int) -> bool:
        """Whether nothing more can be learnt: every rank has ended, or said why it cannot go on."""
        return len(self._said.keys() | (self._ended.keys() - self._lost)) == size

    def cause(self) -> Exception:
        """The error to report: see Note [cause and consequence]."""
        said = self._said.values()
        without_a_word = [error for rank, error in self._ended.items() if rank not in self._said]
        rules: tuple[Callable[[], list[Exception]], ...] = (
            lambda: [_as_error(message) for message in said if message.blames == "user"],
            lambda: [*without_a_word],
            lambda: [_as_error(message) for message in said if message.blames == "rank"],
            lambda: [_as_error(message) for message in said],
            lambda: [*self._silent.values()],
        )
        return next(found[0] for rule in rules if (found := rule()))


def describe_end(returncode: int) -> str:
    """How a process ended, in words."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:  # a real-time signal
        name = f"signal {-returncode}"
    return f"was killed by {name}"


def _as_error(message: Failed) -> Exception:
    """A worker's last words as an exception."""
    if message.blames == "user":
        return ConfigError(message.reason)
    prefix = f"rank {message.rank}: "
    error = WorkerError(prefix + message.reason.removeprefix(prefix))
    error.add_note(message.details)
    return error
