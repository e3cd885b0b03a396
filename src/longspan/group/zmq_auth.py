"""Encryption and authentication of the link between driver and workers (CURVE of ZeroMQ).

Holds key pairs and their use in sockets. Must not know messages.
Read next: `longspan.comm.secret`.

Both key pairs, the driver's and the workers', come from the shared secret. A peer without the secret knows neither the
driver's public key, without which no handshake begins, nor a key that the driver admits.
"""

from typing import NamedTuple

import zmq
from zmq.utils import z85

from longspan.comm.secret import Secret

DOMAIN = b"longspan"
"""Name under which the driver's socket asks whether a key is admitted."""


class KeyPair(NamedTuple):
    """Pair of keys in ZeroMQ's text form."""

    public: bytes
    private: bytes


def driver_keys(secret: Secret) -> KeyPair:
    """Derive the driver's key pair."""
    return _pair(secret.key("driver link 1"))


def worker_keys(secret: Secret) -> KeyPair:
    """Derive the key pair that all workers share."""
    return _pair(secret.key("worker link 1"))


def _pair(key: bytes) -> KeyPair:
    private = z85.encode(key)
    return KeyPair(zmq.curve_public(private), private)


def listen_with(socket: "zmq.Socket[bytes]", secret: Secret) -> None:
    """Make a driver's socket, not bound yet, accept only peers that know the secret."""
    keys = driver_keys(secret)
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = keys
    socket.zap_domain = DOMAIN


def connect_with(socket: "zmq.Socket[bytes]", secret: Secret) -> None:
    """Make a worker's socket, not connected yet, accept only a driver that knows the secret."""
    keys = worker_keys(secret)
    socket.curve_serverkey = driver_keys(secret).public
    socket.curve_publickey, socket.curve_secretkey = keys


def answer_admission(socket: "zmq.Socket[bytes]", secret: Secret) -> None:
    """Answer one request on `inproc://zeromq.zap.01`, admitting only the workers' key (ZeroMQ RFC 27)."""
    version, request_id, _domain, _address, _identity, mechanism, *credentials = socket.recv_multipart()
    is_worker = mechanism == b"CURVE" and z85.encode(credentials[0]) == worker_keys(secret).public
    status = (b"200", b"OK") if is_worker else (b"400", b"unknown key")
    socket.send_multipart([version, request_id, *status, b"", b""])
