"""A worker's end of its link to the driver: introduction, plans, answers.

Holds one connection, and the reasons why it fails. Must not know what happens between the messages.
Read next: `longspan.group.heartbeat`, the worker's other connection; `longspan.group.driver_link`, the driver's end.
"""

import time

import zmq
from zmq.utils.monitor import recv_monitor_message

from longspan.comm.secret import Secret
from longspan.errors import CommunicationError, ConfigError
from longspan.group.messages import Hello, Refused, Start, ToDriver, ToWorker, decode_to_worker, encode
from longspan.group.zmq_auth import connect_with

LINGER_MS = 2000
"""Longest time in milliseconds that a closed connection goes on sending queued messages."""

MAX_REFUSALS = 3
"""Failed handshakes in a row that prove a wrong secret; a driver that ends may break off one."""


class WorkerLink:
    """Connection for plans and answers, for one thread."""

    def __init__(self, address: str, secret: Secret | None) -> None:
        """Connect, now or as soon as there is a driver.

        Args:
            address: address of the driver's link.
            secret: the driver's secret, or None if it has none.
        """
        self.address, self.secret = address, secret
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.linger = 0  # except in `close`: until then a worker must not wait for a driver that is gone
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket()
        if secret is not None:
            connect_with(self._socket, secret)
        self._socket.connect(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def introduce(self, hello: Hello, timeout_s: float | None) -> Start:
        """Introduce this process, and wait for the driver's answer.

        Args:
            hello: this process's introduction.
            timeout_s: longest wait for the answer; None waits for ever.

        Raises:
            ConfigError: the driver has another secret, or refuses this worker.
            CommunicationError: no answer came within `timeout_s`.
        """
        self.send(hello)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        poller = zmq.Poller()
        for readable in (self._socket, self._monitor):
            poller.register(readable, zmq.POLLIN)
        num_refusals, has_reached = 0, False
        while deadline is None or time.monotonic() < deadline:
            ready = dict(poller.poll(None if deadline is None else max(1, int((deadline - time.monotonic()) * 1e3))))
            if self._socket in ready:
                message = self.receive()
                if isinstance(message, Start):
                    return message
                assert isinstance(message, Refused), f"unexpected {type(message).__name__}"
                raise ConfigError(message.reason)
            while self._monitor.poll(0):
                kind = recv_monitor_message(self._monitor)["event"]
                if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    if has_reached:  # an earlier driver has ended, perhaps to restart, with the first `Hello`
                        self.send(hello)
                    num_refusals, has_reached = 0, True
                elif kind in (
                    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
                    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
                    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
                ):
                    num_refusals += 1
            if num_refusals >= MAX_REFUSALS:
                raise ConfigError(
                    f"LONGSPAN_SECRET: {_name(hello)} got as far as {self.address}, where the "
                    "handshake failed; legal is the driver's secret"
                )
        what = "does not answer" if has_reached else "cannot be reached"
        raise CommunicationError(f"{_name(hello)}: the driver at {self.address} {what} (within {timeout_s:g} s)")

    def send(self, message: ToDriver) -> None:
        """Send a message to the driver."""
        self._socket.send(encode(message))

    def receive(self) -> ToWorker:
        """Wait for the driver's next message."""
        message: ToWorker = decode_to_worker(self._socket.recv())
        return message

    def receive_or(self, bell: int) -> ToWorker | None:
        """Wait for the driver's next message, or until a file descriptor is readable; then return None.

        Args:
            bell: the file descriptor, every time the same one.
        """
        self._poller.register(bell, zmq.POLLIN)
        ready = dict(self._poller.poll())
        return self.receive() if self._socket in ready else None

    def close(self, linger_ms: int = LINGER_MS) -> None:
        """Disconnect.

        Args:
            linger_ms: longest time to go on sending queued messages.
        """
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=linger_ms)
        self._context.term()


def _name(hello: Hello) -> str:
    """Name of a worker for the user, by its number: it does not know yet how many processes a rank has."""
    return f"rank {hello.number} on {hello.host}"
