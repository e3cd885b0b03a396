"""Launcher of worker processes on this machine.

Holds the start and end of the processes. Must not know messages, schedulers or requests, nor import torch.
Read next: `longspan.worker.fork_server`, the program that forks the processes.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from longspan.comm.secret import VARIABLE as SECRET_VARIABLE
from longspan.comm.secret import Secret
from longspan.config import EngineConfig
from longspan.cpu_binding import check_cores
from longspan.errors import ConfigError, WorkerError
from longspan.group.failures import describe_end
from longspan.group.messages import ForkedWorker, ForkWorkers, KillWorkers, Order
from longspan.group.shape import GroupShape, ProcessId

MAX_DIRECTORY_BYTES = 90
"""Most bytes in the path of the sockets' directory: a socket's whole path has at most 107."""

GONE_S = 1.0
"""Seconds that killed processes may take to be gone."""


class LocalLauncher:
    """Launcher whose child process imports what workers need, and forks the group, and a new one after a loss."""

    is_remote = False

    def __init__(self, config: EngineConfig) -> None:
        """Make the directory of the group's sockets, and start the child process.

        Raises:
            ConfigError: the directory for temporary files has too long a name for sockets, or a process is bound to a
                core that this one may not use.
            WorkerError: the directory or the child process cannot be made.
        """
        check_cores(config.cpu_binding, config.context_parallel_size * config.tensor_parallel_size)
        self._directory = _socket_directory()
        self._generation = 0
        self.secret: Secret | None = None
        self._shape = GroupShape(0, 1)  # of the group that the parent was asked to fork
        self._forked: dict[int, ForkedWorker] = {}  # by number
        self._unread = b""
        self._all_gone = False
        try:
            self._meet()
            with _interrupt_blocked():
                self._parent = subprocess.Popen(
                    [sys.executable, "-m", "longspan.worker.fork_server", str(self._directory)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    bufsize=0,
                    env=worker_environment(config.num_threads),
                )
        except OSError as error:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise WorkerError(f"the process that starts the ranks could not be started: {error}") from error
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._orders, self._reports = self._parent.stdin, self._parent.stdout
        os.set_blocking(self._reports.fileno(), False)

    def _meet(self) -> None:
        """Make a directory for the processes that are started next, without files of lost ones."""
        directory = self._directory / str(self._generation)
        directory.mkdir()
        self.directory: str | None = str(directory)
        self.bind_address = f"ipc://{directory}/driver"

    def start(self, address: str, shape: GroupShape) -> None:
        assert address == self.bind_address
        assert not self._running
        self._forked, self._shape = {}, shape
        self._order(ForkWorkers(shape.world_size, address))

    def name(self, process: ProcessId) -> str | None:
        forked = self._forked.get(self._shape.number(process))
        return None if forked is None else f"{self._shape.name(process)} (pid {forked.pid})"

    def ended(self, process: ProcessId) -> str | None:
        parents_code = self._parent.poll()  # before its last reports are read
        self._read_reports()
        forked = self._forked.get(self._shape.number(process))
        code = parents_code if forked is None or forked.returncode is None else forked.returncode  # no rank outlives it
        return None if code is None else describe_end(code)

    def kill(self) -> None:
        self._order(KillWorkers())

    def renew(self) -> bool:
        self.kill()
        self._wait_until_gone(GONE_S)
        if self._running or self._parent.poll() is not None:
            return False
        shutil.rmtree(self._directory / str(self._generation), ignore_errors=True)
        self._generation += 1
        try:
            self._meet()
        except OSError:  # a full disk, which the next start reports
            return False
        return True

    def release(self, patience_s: float) -> None:
        if self._reports.closed:
            return
        self._wait_until_gone(patience_s)
        self._parent.kill()  # which ends all processes that it has forked
        while not self._all_gone and self._wait_for_reports(GONE_S):
            self._read_reports()
        self._parent.wait()
        self._orders.close()
        self._reports.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def _running(self) -> bool:
        """Whether any process of the group may run."""
        ended = sum(forked.returncode is not None for forked in self._forked.values())
        return not self._all_gone and ended < self._shape.world_size

    def _order(self, order: Order) -> None:
        with contextlib.suppress(OSError, ValueError):  # the parent has ended, which `ended` reports, or is released
            self._orders.write(msgspec.json.encode(order) + b"\n")

    def _read_reports(self) -> None:
        while data := self._reports.read(2**16):
            *lines, self._unread = (self._unread + data).split(b"\n")
            for line in lines:
                forked = msgspec.json.decode(line, type=ForkedWorker)
                self._forked[forked.number] = forked
        self._all_gone = data is not None  # the parent and all processes it has forked hold the other end

    def _wait_for_reports(self, timeout_s: float) -> bool:
        """Wait for reports; return whether one has come, or the pipe is closed."""
        poller = select.poll()
        poller.register(self._reports, select.POLLIN)
        return bool(poller.poll(max(0.0, timeout_s) * 1e3))

    def _wait_until_gone(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._running and self._wait_for_reports(deadline - time.monotonic()):
            self._read_reports()


@contextlib.contextmanager
def early_ranks(config: EngineConfig) -> Iterator[LocalLauncher | None]:
    """Let ranks on this machine import what they need while the caller does the same; end them if the caller fails.

    Yields:
        Launcher of the ranks; None where ranks start in another way.
    """
    if config.executor != "processes" or sys.platform != "linux":
        yield None
        return
    launcher = LocalLauncher(config)
    try:
        yield launcher
    except BaseException:
        launcher.release(0.0)
        raise


def _socket_directory() -> Path:
    """Make a directory for sockets that only this user may enter.

    Raises:
        ConfigError: the directory for temporary files has too long a name for sockets.
        WorkerError: the directory cannot be made.
    """
    try:
        directory = Path(tempfile.mkdtemp(prefix="longspan-"))
    except OSError as error:
        raise WorkerError(f"no directory for sockets could be made: {error}") from error
    if len(os.fsencode(directory)) > MAX_DIRECTORY_BYTES:
        directory.rmdir()
        raise ConfigError(
            f"TMPDIR: got {str(directory.parent)!r}, legal is a directory whose path has at most "
            f"{MAX_DIRECTORY_BYTES - len(directory.name) - 1} bytes (sockets are made in it)"
        )
    return directory


@contextlib.contextmanager
def _interrupt_blocked() -> Iterator[None]:
    """Block SIGINT, so that processes started inside never get Ctrl-C; the driver gets it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_environment(num_threads: int) -> dict[str, str]:
    """Return workers' environment: compute threads, gloo and NCCL on the loopback interface, only errors logged."""
    threads = str(num_threads)
    defaults = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    defaults["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a question for GPUs before the fork must not start CUDA
    if not os.environ.get("LONGSPAN_DEBUG"):
        defaults["PYTHONWARNINGS"] = "ignore"
    forced = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    forced["OPENBLAS_NUM_THREADS"] = "1"  # numpy's threads, which ranks do not use, would start with its import
    if num_threads == 1:  # threads that a process borrows give the core back when they have nothing to do
        defaults["GOMP_SPINCOUNT"] = "3000"
    inherited = {name: value for name, value in os.environ.items() if name != SECRET_VARIABLE}  # not needed here
    return {**defaults, **inherited, **forced}
