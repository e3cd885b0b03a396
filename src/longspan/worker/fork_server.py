"""The parent of the workers on the driver's machine: it imports the workers' modules once, and forks the workers.

Started by `longspan.engine.processes` as `python -m longspan.worker.fork_server DIRECTORY`. Holds the start and end of
the workers. Must not know what a worker does, or to which rank it belongs, and imports torch only when all ways to end
this process are in place.
Read next: `longspan.worker.process`, a worker's life.

Its standard input is a pipe that only the driver holds. A line is an order of the driver (`longspan.group.messages`):
to fork workers, or to kill all of them; new workers that replace lost ones need no imports. The pipe's end means that
the driver is gone. On standard output this process reports the start and the end of every worker. A worker never
outlives this process, and this process never outlives the driver. Ctrl-C reaches the whole process group of a
terminal; the driver alone decides what it means, so this process and the workers ignore it.

Note [Fork before threads]
    A fork copies the thread that calls it and no other. So nothing here may ever start one: no ZeroMQ context, no
    parallel loop in torch, no gloo. Imports alone start none, which a test asserts. Nor may it start CUDA, which does
    not survive a fork: other processes look at GPUs.
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
from types import FrameType
from typing import NoReturn

import msgspec

from longspan.group.messages import ForkedWorker, ForkWorkers, Order
from longspan.imports import quick_imports
from longspan.worker.process import run_local

LOOK_EVERY_S = 0.5
"""Seconds between two checks that the driver is alive."""

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


class ForkServer:
    """State and main loop of this process."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._driver = os.getppid()
        self._workers: dict[int, tuple[int, int]] = {}  # those that run: descriptor to number and process id
        self._driver_pipe = select.poll()
        self._driver_pipe.register(_STDIN, 0)  # poll reports its end without being asked
        self._heard = b""
        self._reports = os.dup(_STDOUT)
        os.dup2(_STDERR, _STDOUT)  # from now on, prints go to standard error

    def run(self) -> NoReturn:
        """Import, then follow the driver's orders until the driver ends."""
        self._watch_driver()
        with quick_imports(for_good=True):
            importlib.import_module("longspan.worker.serve")
        poller = select.poll()
        poller.register(_STDIN, select.POLLIN)
        while True:
            for descriptor, _ in poller.poll():
                if descriptor in self._workers:
                    poller.unregister(descriptor)
                    self._bury(descriptor)
                elif descriptor == _STDIN:
                    for words in self._hear():
                        for new in self._obey(words):
                            poller.register(new, select.POLLIN)

    def _hear(self) -> list[bytes]:
        """Read the driver's new orders; end this process if the driver is gone."""
        said = os.read(_STDIN, 2**16)
        if not said:
            self._end()
        *lines, self._heard = (self._heard + said).split(b"\n")
        return lines

    def _obey(self, words: bytes) -> list[int]:
        """Follow an order; return descriptors of the new processes."""
        order = msgspec.json.decode(words, type=Order)
        if isinstance(order, ForkWorkers):
            return [self._fork(number, order) for number in range(order.world_size)]
        self._kill_workers()
        return []

    def _bury(self, descriptor: int) -> None:
        number, pid = self._workers.pop(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        self._report(ForkedWorker(number, pid, os.waitstatus_to_exitcode(status)))

    def _watch_driver(self) -> None:
        """Start a timer, which workers do not inherit, that checks the driver. See Note [Fork before threads]."""
        signal.signal(signal.SIGALRM, self._look)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        signal.setitimer(signal.ITIMER_REAL, LOOK_EVERY_S, LOOK_EVERY_S)

    def _look(self, _signal: int, _frame: FrameType | None) -> None:
        # A process that the driver forked may hold the pipe open, so the parent's id is looked at too.
        if os.getppid() != self._driver or self._driver_pipe.poll(0):
            self._end()

    def _end(self) -> NoReturn:
        """End the workers, clean up if the driver did not, and end this process."""
        self._kill_workers()
        shutil.rmtree(self._directory, ignore_errors=True)
        os._exit(0)  # to take an interpreter with torch down would take half a second

    def _kill_workers(self) -> None:
        for descriptor in self._workers:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)

    def _fork(self, number: int, order: ForkWorkers) -> int:
        """Fork a worker; return a descriptor of its process, readable when it has ended."""
        assert not sys.modules["torch"].cuda.is_initialized(), "CUDA does not survive a fork"
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            try:
                _become(number, parent)
                status = run_local(number, order.world_size, order.address)
            except BaseException:
                traceback.print_exc()
                status = 1
            # Not sys.exit: gloo's threads may still wait for a peer that is gone, and would keep the process alive.
            os._exit(status)
        descriptor = os.pidfd_open(pid)
        self._workers[descriptor] = (number, pid)
        self._report(ForkedWorker(number, pid))
        return descriptor

    def _report(self, what: ForkedWorker) -> None:
        with contextlib.suppress(OSError):  # the driver is gone
            os.write(self._reports, msgspec.json.encode(what) + b"\n")


def _become(number: int, parent: int) -> None:
    """Take a worker's name, for `ps` and `top`, and let the kernel end this process when the parent ends."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NAME, f"longspan-{number}".encode())
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it was asked for
        os._exit(1)


def main() -> NoReturn:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ForkServer(sys.argv[1]).run()


if __name__ == "__main__":
    main()
