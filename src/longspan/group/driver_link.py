"""The driver's end of its link to all workers: one socket, on whichever hosts they run.

Holds the socket, its lock, and the admission of peers. Must not know what messages mean.
Read next: `longspan.engine.workers`, which speaks over it; `longspan.group.worker_link`, the other end.

Note [One socket, two threads]
The caller's thread sends plans while the watcher waits for answers. A ZeroMQ socket may be used by one thread at a
time, so every use is under a lock, but not the wait: that watches the socket's file descriptor. The descriptor tells
each change only once, and a send may use that up; so a sender checks whether a message has come, and wakes the watcher
by another descriptor. No third thread and no copy of a plan lies between the engine and the network.
"""

import os
import socket as sockets
import threading

import zmq
from zmq.utils.monitor import recv_monitor_message

from longspan.comm.secret import Secret
from longspan.errors import ConfigError
from longspan.group.zmq_auth import answer_admission, listen_with

LINGER_MS = 1000
"""Longest time in milliseconds that a closed link goes on sending queued messages."""


class DriverLink:
    """Bound socket for all workers. Any thread may call `send`; one thread calls all other methods."""

    def __init__(self, address: str, secret: Secret | None = None) -> None:
        """Bind the socket.

        Args:
            address: ZeroMQ address; port `*` takes a free port.
            secret: secret that a peer must know to connect, and that encrypts all messages; None is for sockets that
                only this user can reach.

        Raises:
            ConfigError: the address cannot be bound.
        """
        self._secret = secret
        self._lock = threading.Lock()
        self._is_closed = False
        self._context = zmq.Context()
        self._admission: zmq.Socket[bytes] = self._context.socket(zmq.REP)
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0  # but in `close`
        self._socket.router_mandatory = True  # a send to a peer that is gone is an error, not silence
        self._socket.sndhwm = self._socket.rcvhwm = 0
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket()
        self._peers: dict[int, str | None] = {}  # file descriptor of a connection: address at its other end
        self._handshake_failed = False
        self.num_strangers = 0
        """Number of connections that were tried without the secret."""
        self.strangers: set[str] = set()
        """Addresses of peers without the secret, as far as they could be read before the connection ended."""
        if secret is not None:
            self._admission.bind("inproc://zeromq.zap.01")
            listen_with(self._socket, secret)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f"listen: got {address!r}, legal is HOST:PORT with an address of this host and a free port: {error}"
            ) from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        """Address at which workers connect."""
        self._poller = zmq.Poller()
        for readable in (self._wake, self._socket.fd, self._admission, self._monitor):
            self._poller.register(readable, zmq.POLLIN)

    def send(self, peer: bytes, message: bytes) -> bool:
        """Send a message to one connection without blocking; return False if the connection is gone."""
        with self._lock:
            if self._is_closed:
                return False
            try:
                self._socket.send_multipart([peer, message], flags=zmq.DONTWAIT)
            except zmq.ZMQError:
                return False
            if self._has_message():  # see Note [One socket, two threads]
                self.wake()
        return True

    def _has_message(self) -> bool:
        events = self._socket.getsockopt(zmq.EVENTS)
        assert isinstance(events, int)
        return bool(events & zmq.POLLIN)

    def wake(self) -> None:
        """End a wait of another thread in `receive`."""
        os.eventfd_write(self._wake, 1)

    def receive(self, timeout_ms: int) -> list[tuple[bytes, bytes]]:
        """Wait up to `timeout_ms` for messages and return (connection, message) pairs; may return none early."""
        if received := self._drain():
            return received
        ready = dict(self._poller.poll(timeout_ms))
        if self._wake in ready:
            os.eventfd_read(self._wake)
        if self._admission in ready:
            assert self._secret is not None
            answer_admission(self._admission, self._secret)
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            self._note(event["event"], event["value"])
        return self._drain()

    def _drain(self) -> list[tuple[bytes, bytes]]:
        received: list[tuple[bytes, bytes]] = []
        with self._lock:
            while True:
                try:
                    peer, *frames = self._socket.recv_multipart(flags=zmq.DONTWAIT)
                except zmq.Again:
                    return received
                received.append((peer, b"".join(frames)))

    def _note(self, kind: int, descriptor: int) -> None:
        """Note a refused peer: its failed handshake is followed by the end of its connection."""
        if kind == zmq.EVENT_ACCEPTED:
            self._peers[descriptor] = _peer_address(descriptor)
        elif kind in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_AUTH):
            self._handshake_failed = True
        elif kind == zmq.EVENT_DISCONNECTED:
            address = self._peers.pop(descriptor, None)
            if self._handshake_failed:
                self.num_strangers += 1
                if address is not None:
                    self.strangers.add(address)
                self._handshake_failed = False

    def close(self) -> None:
        """Send queued messages, for at most `LINGER_MS`, and unbind. No thread may be in `receive`."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._admission.close(linger=0)
        self._socket.close(linger=LINGER_MS)
        self._context.term()
        os.close(self._wake)


def _peer_address(descriptor: int) -> str | None:
    """Address at the other end of a connection; None if the connection has ended."""
    try:
        with sockets.socket(fileno=os.dup(descriptor)) as connection:
            name = connection.getpeername()
    except OSError:
        return None
    return str(name[0]) if isinstance(name, tuple) else "this host"
