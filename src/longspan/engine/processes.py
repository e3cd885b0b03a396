"""Ranks as local worker processes.

Holds process start and end, sockets, and the watch over both. Must not know schedulers or requests.
Read next: `longspan.worker.process`, the other end; `longspan.engine.failures`.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import msgspec
import zmq

from longspan.engine.executor import PendingMeasurements, PendingPlans
from longspan.engine.failures import Failures
from longspan.errors import ConfigError, LongspanError
from longspan.plan.types import Plan, PlanResult
from longspan.policy.measured import RankMeasurement
from longspan.worker.messages import (
    Alive,
    Answer,
    Measure,
    Measured,
    Ready,
    RunPlan,
    Start,
    Stop,
    decode_to_driver,
    encode,
)

POLL_MS = 100
"""How often dead processes are looked for while nothing arrives."""

STOP_S = 1.0
"""How long idle workers may take to end when asked; then they are killed."""

GRACE_S = 0.5
"""How long the driver listens after a first sign of failure, to tell the cause from its consequences."""

SILENCE_MARGIN_S = 5.0
"""How much longer than an exchange a rank may give no sign of life: a peer that waits for it can say more."""

MAX_DIRECTORY_BYTES = 96
"""Most bytes in the path of the sockets' directory: a socket's whole path has at most 107."""


class ProcessExecutor:
    """One process per rank on this machine."""

    def __init__(self, start: Start) -> None:
        """Start all ranks and wait until they are ready.

        Raises:
            WorkerError: a worker died or failed while starting.
            ConfigError: a worker refused what the user asked for.
        """
        self._pending = PendingPlans()
        self._measurements = PendingMeasurements(start.config.context_parallel_size)
        self._ready: Future[None] = Future()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._inboxes: list[zmq.Socket[bytes]] = []
        self._watcher: threading.Thread | None = None
        self._closing = False
        self._silence_limit_s = start.config.exchange_timeout_s + SILENCE_MARGIN_S
        self._context = zmq.Context()
        self._directory = _socket_directory()
        try:
            self._launch(msgspec.structs.replace(start, directory=str(self._directory)))
            self._ready.result()
        except BaseException:
            self.close()
            raise

    def _launch(self, start: Start) -> None:
        """Start the processes, and the thread that watches them."""
        answers = f"ipc://{self._directory}/answers"
        outbox: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        outbox.bind(answers)
        environment = _environment(start.config.num_threads)
        for rank in range(start.config.context_parallel_size):
            address = f"ipc://{self._directory}/rank-{rank}"
            inbox: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
            self._inboxes.append(inbox)
            inbox.connect(address)  # a connecting socket queues what it sends until the worker binds
            inbox.send(encode(start))
            command = [sys.executable, "-m", "longspan.worker.process", str(rank), address, answers]
            with _interrupt_blocked():
                self._processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=2,  # the driver's standard output is the user's alone
                        env=environment,
                    )
                )
        self._watcher = threading.Thread(target=self._watch, args=(outbox,), name="longspan-watch", daemon=True)
        self._watcher.start()

    # -- the watcher's thread ----------------------------------------------------------------------------------------

    def _watch(self, outbox: "zmq.Socket[bytes]") -> None:
        """Take in what the workers say, and notice when one is gone; after a failure, end all of them."""
        try:
            error = self._listen(outbox)
        except Exception as broken:
            error = broken
        finally:
            outbox.close(linger=0)
        if error is not None:
            for process in self._processes:
                process.kill()
            self._pending.fail(error)
            self._measurements.fail(error)
            if not self._ready.done():
                self._ready.set_exception(error)

    def _listen(self, outbox: "zmq.Socket[bytes]") -> Exception | None:
        """Returns why the group failed, or None when the executor closes."""
        waiting = set(range(len(self._processes)))
        failures = Failures()
        silence_s = [0.0] * len(self._processes)
        now = time.monotonic()
        while not self._closing:
            if outbox.poll(POLL_MS):
                message = decode_to_driver(outbox.recv())
                if isinstance(message, Alive):
                    silence_s[message.rank] = 0.0
                elif isinstance(message, Answer):
                    silence_s[message.result.rank] = 0.0
                    self._pending.answer(message.result)
                elif isinstance(message, Measured):
                    self._measurements.answer(message.measurement)
                elif isinstance(message, Ready):
                    waiting.discard(message.rank)
                    if not waiting:
                        self._ready.set_result(None)
                else:
                    failures.said(message, now)
                if failures.first_s is None:
                    continue
            # Capped: after the driver itself was stopped, or the machine slept, nobody has been silent for long.
            step_s = min(1.0, time.monotonic() - now)
            now = time.monotonic()
            for rank, process in enumerate(self._processes):
                silence_s[rank] += step_s
                if process.poll() is not None:
                    failures.ended(rank, process.pid, process.returncode, now)
                elif silence_s[rank] > self._silence_limit_s:
                    failures.silent(rank, process.pid, silence_s[rank], now)
            if failures.first_s is not None and now - failures.first_s > GRACE_S:
                return failures.cause()
        return None

    # -- the caller's thread -----------------------------------------------------------------------------------------

    def submit(self, plan: Plan) -> "Future[PlanResult]":
        future = self._pending.add(plan)
        if not future.done():  # else the ranks have failed, and a dead one's queue would fill up
            message = encode(RunPlan(plan))
            for rank in plan.ranks:
                self._inboxes[rank].send(message)
        return future

    def measure(self, nodes: tuple[int, ...], ranks_per_device: float) -> list[RankMeasurement]:
        message = encode(Measure(nodes, ranks_per_device))
        for inbox in self._inboxes:
            inbox.send(message)
        return self._measurements.all.result()

    @property
    def failure(self) -> BaseException | None:
        return self._pending.error

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._pending.fail(LongspanError("the engine is closed"))
        for inbox in self._inboxes:
            with contextlib.suppress(zmq.ZMQError):  # a full queue: its worker is killed below
                inbox.send(encode(Stop()), flags=zmq.DONTWAIT)
        # Whoever is still starting, or busy with a plan that nobody waits for, would only cost the user a second.
        deadline = time.monotonic() + (STOP_S if self._is_idle() else 0.0)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        if self._watcher is not None:
            self._watcher.join()
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _is_idle(self) -> bool:
        """Whether all ranks are ready, and none had a plan when `close` began."""
        return self._ready.done() and self._ready.exception() is None and not self._pending.num_failed


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
    return {**defaults, **os.environ, **forced}
