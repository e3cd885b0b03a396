"""Heartbeats between a worker and its driver, and the worker's end when the driver's heartbeats stop.

Holds one thread with a connection of its own, and the limits of both sides. Must not know plans, and imports nothing
heavy: it runs before torch is imported.
Read next: `longspan.group.liveness`, the driver's side; `longspan.worker.process` and `longspan.worker.remote`, which
start the thread.

A worker never outlives its driver. On the driver's machine its parent process ends it (`longspan.worker.fork_server`);
elsewhere it notices that the connection has closed, or that the driver's heartbeats have stopped.
"""

import os
import sys
import threading
import time
from typing import NoReturn

import zmq

from longspan.comm.secret import Secret
from longspan.group.messages import Alive, Heartbeat, Hello, Refused, Stop, decode_to_worker, encode
from longspan.group.zmq_auth import connect_with

ALIVE_EVERY_S = 1.0
"""Seconds between two signs of life of a process."""

SILENCE_S = 30.0
"""Longest silence in seconds between the driver and a process that is ready, or on another machine."""

MARGIN_S = 5.0
"""Seconds beyond an exchange's timeout for which a process may be silent or make no progress: a peer that waits for it
then reports first, and knows more."""


def silence_limit_s(exchange_timeout_s: float) -> float:
    """Longest silence in seconds between the driver and a process."""
    return min(stuck_limit_s(exchange_timeout_s), SILENCE_S)


def stuck_limit_s(exchange_timeout_s: float) -> float:
    """Longest time in seconds without progress for a process that has a plan to run."""
    return exchange_timeout_s + MARGIN_S


class ProcessProgress:
    """Progress of a process, written by the thread that computes and read by the heartbeat's thread."""

    count = 0
    """Layers and plans begun since the process started."""


class HeartbeatThread(threading.Thread):
    """Thread that sends the driver a sign of life with the progress every second, and ends the process when the driver
    is gone or demands it."""

    def __init__(
        self,
        hello: Hello,
        who: str,
        progress: ProcessProgress,
        address: str,
        secret: Secret | None,
        silence_limit_s: float | None,
    ) -> None:
        """Make the thread; `start` it.

        Args:
            hello: this process's introduction.
            who: this process in words, for the user.
            progress: this process's progress.
            address: address of the driver's link.
            secret: secret of the driver's link, or None.
            silence_limit_s: longest time for which the driver may be silent or unconnected; None where the parent
                process watches the driver.
        """
        super().__init__(name="longspan-heartbeat", daemon=True)
        self._hello, self._who, self._progress = hello, who, progress
        self._address, self._secret, self._silence_limit_s = address, secret, silence_limit_s

    def run(self) -> None:
        socket = zmq.Context().socket(zmq.DEALER)  # its own context, so that no other thread waits for this one
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        if self._secret is not None:
            connect_with(socket, self._secret)
        socket.connect(self._address)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        if self._silence_limit_s is not None:
            poller.register(monitor, zmq.POLLIN)
        heard_s = next_s = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= next_s:
                self._say_alive(socket)
                next_s = now + ALIVE_EVERY_S
            ready = dict(poller.poll(int(max(0, next_s - now) * 1e3) + 1))
            if socket in ready:
                heard_s = time.monotonic()
                self._hear(socket)
            if monitor in ready:
                if not socket.poll(200):  # the driver's last message may be on the way
                    self._end("its connection to the driver has closed", 1)
                self._hear(socket)
                self._end("its connection to the driver has closed", 1)
            elif self._silence_limit_s is not None and time.monotonic() - heard_s > self._silence_limit_s:
                self._end(f"the driver has given no sign of life for {self._silence_limit_s:g} s", 1)

    def _say_alive(self, socket: "zmq.Socket[bytes]") -> None:
        hello = self._hello
        try:
            socket.send(encode(Alive(hello.number, hello.host, hello.pid, self._progress.count)), flags=zmq.DONTWAIT)
        except zmq.Again:
            return  # a driver that is stopped has enough of them already

    def _hear(self, socket: "zmq.Socket[bytes]") -> None:
        while socket.poll(0):
            message = decode_to_worker(socket.recv())
            if isinstance(message, Stop):
                self._end(None, 0)
            if isinstance(message, Refused):
                self._end(f"the driver has ended the group: {message.reason}", 1)
            assert isinstance(message, Heartbeat)

    def _end(self, why: str | None, status: int) -> NoReturn:
        if why is not None:
            say_last(f"{self._who}: {why}")
        os._exit(status)


_said = threading.Lock()


def say_last(text: str) -> None:
    """Print on standard error why this process ends; only the first call of any thread counts."""
    if _said.acquire(blocking=False):
        print(f"longspan: {' '.join(text.split())}", file=sys.stderr, flush=True)
