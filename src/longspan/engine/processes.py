"""Worker processes on this machine.

Holds their start and end. Must not know messages, schedulers or requests.
Read next: `longspan.worker.process`, what is started.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from longspan.comm.secret import VARIABLE as SECRET_VARIABLE
from longspan.comm.secret import Secret
from longspan.config import EngineConfig
from longspan.engine.failures import describe_end
from longspan.errors import ConfigError

MAX_DIRECTORY_BYTES = 96
"""Most bytes in the path of the sockets' directory: a socket's whole path has at most 107."""


class LocalLauncher:
    """One process per rank, each the driver's child."""

    is_remote = False

    def __init__(self, config: EngineConfig) -> None:
        """Make the directory of the group's sockets.

        Raises:
            ConfigError: the directory for temporary files has too long a name for sockets.
        """
        self._config = config
        self._processes: list[subprocess.Popen[bytes]] = []
        self._directory = _socket_directory()
        self.directory: str | None = str(self._directory)
        self.bind_address = f"ipc://{self._directory}/driver"
        self.secret: Secret | None = None

    def start(self, address: str) -> None:
        environment = _environment(self._config.num_threads)
        for rank in range(self._config.context_parallel_size):
            command = [
                *(sys.executable, "-m", "longspan.worker.process"),
                *(str(rank), str(self._config.context_parallel_size), address),
            ]
            with _interrupt_blocked():
                self._processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=2,  # the driver's standard output is the user's alone
                        env=environment,
                    )
                )

    def name(self, rank: int) -> str | None:
        return f"rank {rank} (pid {self._processes[rank].pid})"

    def ended(self, rank: int) -> str | None:
        returncode = self._processes[rank].poll()
        return None if returncode is None else describe_end(returncode)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def release(self, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
        self.kill()
        for process in self._processes:
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _socket_directory() -> Path:
    """A new directory for sockets, that only this user may enter.

    Raises:
        ConfigError: the directory for temporary files has too long a name for sockets.
    """
    directory = Path(tempfile.mkdtemp(prefix="longspan-"))
    if len(os.fsencode(directory)) > MAX_DIRECTORY_BYTES:
        directory.rmdir()
        raise ConfigError(
            f"TMPDIR: got {str(directory.parent)!r}, legal is a directory whose path has at most "
            f"{MAX_DIRECTORY_BYTES - len(directory.name) - 1} bytes (sockets are made in it)"
        )
    return directory


@contextlib.contextmanager
def _interrupt_blocked() -> Iterator[None]:
    """Processes started in here never hear Ctrl-C: they inherit the mask. The driver hears it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment(num_threads: int) -> dict[str, str]:
    """Environment of a worker: its compute threads, gloo on the loopback interface, and nothing said but errors."""
    threads = str(num_threads)
    defaults = {"GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if not os.environ.get("LONGSPAN_DEBUG"):
        defaults["PYTHONWARNINGS"] = "ignore"
    forced = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    inherited = {name: value for name, value in os.environ.items() if name != SECRET_VARIABLE}  # of no use to them
    return {**defaults, **inherited, **forced}
