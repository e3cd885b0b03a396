"""Signs of life between a worker and its driver, and the worker's end when the driver's stop.

Holds one thread with a connection of its own, and the limits of both sides. Must not know plans, and imports nothing
heavy: it runs before torch does.
Read next: `longspan.group.liveness`, the driver's side; `longspan.worker.process` and `longspan.worker.remote`, which
start the thread.

A worker never outlives its driver. On the driver's machine its parent sees to that (`longspan.worker.fork_server`);
elsewhere it notices that the connection has closed, or that the driver's heartbeat does not come any more.
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
"""How often the driver hears that the process runs."""

SILENCE_S = 30.0
"""Longest silence between the driver and a process that is ready, or on another machine."""

MARGIN_S = 5.0
"""How much longer than an exchange a process may give no sign of life, or make no progress: a peer that waits for it
can say more."""


def silence_limit_s(exchange_timeout_s: float) -> float:
    """How long the driver and a process may hear nothing of each other."""
    return min(stuck_limit_s(exchange_timeout_s), SILENCE_S)


def stuck_limit_s(exchange_timeout_s: float) -> float:
    """How long a process that has a plan to run may get no further."""
    return exchange_timeout_s + MARGIN_S


class ProcessProgress:
    """How far a process has come. Written by the thread that computes, read by the one that tells the driver."""

    count = 0
    """Layers and plans that it has begun since it started."""


class HeartbeatThread(threading.Thread):
    """Tells the driver every second that this process runs, and how far it is; ends it when the driver is gone, or says
    so."""

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
            hello: as this process introduces itself.
            who: this process in words, for the user.
            progress: of this process.
            address: of the driver's link.
            secret: as the driver's link.
            silence_limit_s: how long the driver may be silent or unconnected; None where the parent process watches.
        """
        super().__init__(name="longspan-heartbeat", daemon=True)
        self._hello, self._who, self._progress = hello, who, progress
        self._address, self._secret, self._silence_limit_s = address, secret, silence_limit_s

    def run(self) -> None:
        socket = zmq.Context().socket(zmq.DEALER)  # its own context: nothing ever waits for this thread
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
                if not socket.poll(200):  # its last words may be on the way
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
    """Tell standard error why this process ends; the first reason counts, whichever thread has it."""
    if _said.acquire(blocking=False):
        print(f"longspan: {' '.join(text.split())}", file=sys.stderr, flush=True)
