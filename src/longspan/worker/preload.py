"""The parent of the ranks on the driver's machine: it imports once what all of them need, and forks them.

Started by `longspan.engine.processes` as `python -m longspan.worker.preload SIZE DRIVER`. Holds the start and end of
the ranks' processes. Must not know what a rank does, and imports torch only when all that ends it is in place.
Read next: `longspan.worker.process`, a rank's life.

Its standard input is a pipe that only the driver holds. A byte says that the driver listens: fork now; its end says
that the driver is gone. On its standard output the driver hears of every rank's process, when it is there and when it
has ended. A rank never outlives this process, and this process never outlives the driver. Ctrl-C reaches the whole
process group of a terminal; the driver alone decides what it means, so all of them ignore it.

Note [Fork before threads]
    A fork copies the thread that calls it and no other. So until the last rank is forked nothing here may start one: no
    ZeroMQ context, no parallel loop in torch, no gloo. Imports alone start none, which a test asserts.
"""

import contextlib
import ctypes
import importlib
import os
import select
import shutil
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec

from longspan.imports import quick_imports
from longspan.worker.messages import RankProcess
from longspan.worker.process import run_rank

LOOK_EVERY_S = 0.5
"""How often it is looked whether the driver is there."""

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


class Preload:
    """This process."""

    def __init__(self, size: int, address: str) -> None:
        self._size, self._address = size, address
        self._driver = os.getppid()
        self._ranks: dict[int, int] = {}  # process id to rank, of those that run
        self._driver_pipe = select.poll()
        self._driver_pipe.register(_STDIN, 0)  # its end is told unasked
        self._reports = os.dup(_STDOUT)
        os.dup2(_STDERR, _STDOUT)  # whatever is written there from now on is for people

    def run(self) -> None:
        """Import, wait for the word, fork, and wait until all ranks have ended."""
        self._watch_driver()
        with quick_imports(for_good=True):
            importlib.import_module("longspan.worker.serve")
        if not os.read(_STDIN, 1):
            self._end()
        for rank in range(self._size):
            self._fork(rank)
        while self._ranks:
            pid, status = os.wait()
            self._report(RankProcess(self._ranks.pop(pid), pid, os.waitstatus_to_exitcode(status)))

    def _watch_driver(self) -> None:
        """A timer, not a thread: see Note [Fork before threads]. The ranks do not inherit it."""
        signal.signal(signal.SIGALRM, self._look)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        signal.setitimer(signal.ITIMER_REAL, LOOK_EVERY_S, LOOK_EVERY_S)

    def _look(self, _signal: int, _frame: FrameType | None) -> None:
        # A process that the driver forked may hold the pipe open, so the parent's id is looked at too.
        if os.getppid() != self._driver or self._driver_pipe.poll(0):
            self._end()

    def _end(self) -> NoReturn:
        """The driver could not clean up, or has done so."""
        for pid in self._ranks:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(Path(self._address.removeprefix("ipc://")).parent, ignore_errors=True)
        os._exit(1)

    def _fork(self, rank: int) -> None:
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            try:
                _become(rank, parent)
                status = run_rank(rank, self._size, self._address)
            except BaseException:
                traceback.print_exc()
                status = 1
            # Not sys.exit: gloo's threads may still wait for a peer that is gone, and would keep the process alive.
            os._exit(status)
        self._ranks[pid] = rank
        self._report(RankProcess(rank, pid))

    def _report(self, what: RankProcess) -> None:
        with contextlib.suppress(OSError):  # the driver is gone
            os.write(self._reports, msgspec.json.encode(what) + b"\n")


def _become(rank: int, parent: int) -> None:
    """Take a rank's name, for `ps` and `top`, and end when the parent does, whatever this process is busy with."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NAME, f"longspan-{rank}".encode())
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it was asked for
        os._exit(1)


def main() -> NoReturn:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Preload(int(sys.argv[1]), sys.argv[2]).run()
    os._exit(0)  # to take an interpreter with torch down would take half a second


if __name__ == "__main__":
    main()
