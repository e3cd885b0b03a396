"""Ranks as local worker processes.

Holds process start and end, sockets, and the watch over both. Must not know schedulers or requests.
Read next: `longspan.worker.process`, the other end.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import zmq

from longspan.engine.executor import PendingPlans
from longspan.errors import ConfigError, WorkerError
from longspan.plan.types import Plan, PlanResult
from longspan.worker.messages import Answer, Failed, Ready, RunPlan, Start, Stop, decode_to_driver, encode

POLL_MS = 100
"""How often dead processes are looked for while nothing arrives."""

STOP_S = 1.0
"""How long workers may take to end when asked; then they are killed."""


class ProcessExecutor:
    """One process per rank on this machine."""

    def __init__(self, start: Start) -> None:
        """Start all ranks and wait until they are ready.

        Raises:
            WorkerError: a worker died or failed while starting.
            ConfigError: a worker refused what the user asked for.
        """
        config = start.config
        self._directory = Path(tempfile.mkdtemp(prefix="longspan-"))  # only this user may enter it
        start = Start(config, start.spec, start.num_pages, f"file://{self._directory}/rendezvous")
        self._context = zmq.Context()
        self._pending = PendingPlans()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._inboxes: list[zmq.Socket[bytes]] = []
        self._closed = False
        self._ready: Future[None] = Future()
        answers = f"ipc://{self._directory}/answers"
        outbox: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        outbox.bind(answers)
        try:
            for rank in range(config.context_parallel_size):
                address = f"ipc://{self._directory}/rank-{rank}"
                inbox: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
                inbox.connect(address)  # a connecting socket queues what it sends until the worker binds
                inbox.send(encode(start))
                self._inboxes.append(inbox)
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "longspan.worker.process", str(rank), address, answers],
                        stdin=subprocess.PIPE,
                        env=_environment(config.num_threads),
                    )
                )
            self._watcher = threading.Thread(target=self._watch, args=(outbox,), name="longspan-watch", daemon=True)
            self._watcher.start()
            while not self._ready.done():  # in slices, so that Ctrl-C is heard
                time.sleep(0.01)
            self._ready.result()
        except BaseException:
            self.close()
            raise

    def _watch(self, outbox: "zmq.Socket[bytes]") -> None:
        """Take in what the workers say, and notice when one is gone."""
        waiting = set(range(len(self._processes)))
        while not self._closed:
            if outbox.poll(POLL_MS):
                message = decode_to_driver(outbox.recv())
                if isinstance(message, Ready):
                    waiting.discard(message.rank)
                    if not waiting and not self._ready.done():
                        self._ready.set_result(None)
                elif isinstance(message, Answer):
                    self._pending.answer(message.result)
                else:
                    self._fail(_failure(message))
                continue
            for rank, process in enumerate(self._processes):
                # A worker that failed says why before it ends: everything it sent was read before we look.
                if process.poll() is not None and not self._closed:
                    self._fail(WorkerError(f"rank {rank} (pid {process.pid}) {_ending(process.returncode)}"))
        outbox.close(linger=0)

    def _fail(self, error: Exception) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)
        self._pending.fail(error)

    def submit(self, plan: Plan) -> "Future[PlanResult]":
        future = self._pending.add(plan)
        message = encode(RunPlan(plan))
        for rank in plan.ranks:
            self._inboxes[rank].send(message)
        return future

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._pending.fail(WorkerError("the engine is closed"))
        for inbox in self._inboxes:
            inbox.send(encode(Stop()), flags=zmq.DONTWAIT)
        deadline = time.monotonic() + STOP_S
        for process in self._processes:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        for process in self._processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        if hasattr(self, "_watcher"):
            self._watcher.join()
        for inbox in self._inboxes:
            inbox.close(linger=0)
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)


def _environment(num_threads: int) -> dict[str, str]:
    """Environment of a worker: its compute threads, and gloo on the loopback interface."""
    threads = str(num_threads)
    return {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _ending(returncode: int) -> str:
    """How a process ended, in words."""
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"ended with exit code {returncode}"


def _failure(message: Failed) -> Exception:
    """A worker's last words as an exception."""
    if message.is_user_error:
        return ConfigError(message.reason)
    error = WorkerError(f"rank {message.rank}: {message.reason}")
    error.add_note(message.details)
    return error
