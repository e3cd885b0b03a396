"""Connections between ranks: one socket per pair, inside a host and between hosts.

Holds addresses, listeners and the handshake. Must not know what the sockets carry, nor that a rank may have several
processes: each process meets one process of every other rank, under its rank's number.
Read next: `longspan.comm.sockets`, which uses them.

Note [Handshake between ranks]
Ranks on several hosts listen on the network, where strangers may connect. Both sides prove that they know the key,
which comes from the shared secret, without sending it. A connection without the proof is closed, the wait goes on:

    connecting rank 2                       accepting rank 0
      2, nonce a                 -->
                                 <--          nonce b, HMAC(key, "accepts" 0 2 a b)
      HMAC(key, "connects" 2 0 a b)  -->

Later messages are neither signed nor encrypted. Where ranks meet in a directory that only the user may enter, the key
is empty, and the handshake only tells the rank's number.
"""

import fcntl
import hmac
import ipaddress
import os
import platform
import queue
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from longspan.errors import CommunicationError, ConfigError

STRANGER_S = 5.0
"""Longest time in seconds for a connection to complete the handshake."""

BACKLOG = 64
"""Connections of strangers that may wait to be accepted, beside those of peers."""

ACCEPT_POLL_S = 0.02
"""Seconds between two looks for completed handshakes."""

BUFFER_BYTES = 212_992
"""Buffer of a socket in each direction: the largest that Linux admits by default."""

_NONCE_BYTES, _PROOF_BYTES = 32, 32
_HELLO = struct.Struct(f"<I{_NONCE_BYTES}s")
_SIOCGIFADDR = 0x8915


class Meeting(NamedTuple):
    """Place where one process of every rank meets the others."""

    init_method: str
    """`init_method` of torch.distributed (`file:///...`, `env://`)."""
    directory: Path | None
    """Directory for sockets, used by these ranks alone, all on one machine; None: ranks may be on several hosts."""
    address: str | None
    """IPv4 address under which ranks on other hosts find this one; None with a directory."""
    key: bytes
    """Key of the handshake, known to the ranks alone; empty with a directory."""


def local_meeting(directory: Path) -> Meeting:
    """Make the meeting place of ranks on one machine.

    Args:
        directory: existing directory, the same for all ranks and used by them alone.
    """
    return Meeting(f"file://{directory}/rendezvous", directory, None, b"")


class Store(Protocol):
    """Key-value store that all ranks of the group share (a store of torch.distributed)."""

    def set(self, key: str, value: bytes) -> None: ...

    def get(self, key: str) -> bytes:
        """Return the value of a key, after a rank has set it."""


class _Address(msgspec.Struct, frozen=True):
    """Addresses at which a rank listens."""

    host_id: str
    unix: str
    tcp: tuple[str, int] | None
    """(IPv4 address, port); None where all ranks are on one machine."""


def connect_all(rank: int, size: int, store: Store, meeting: Meeting, *, timeout_s: float) -> dict[int, socket.socket]:
    """Connect to every peer, and return one non-blocking socket per peer.

    Args:
        rank: this process's rank.
        size: number of ranks in the group.
        store: the group's store.
        meeting: where the group meets.
        timeout_s: longest wait for a peer.

    Raises:
        OSError: a peer cannot be reached, or does not know the key.
        RuntimeError: the store lost a peer.

    Collective: all `size` ranks call it.
    """
    unix = str(meeting.directory / f"peer-{rank}") if meeting.directory else f"\0longspan-{secrets.token_hex(16)}"
    with socket.socket(socket.AF_UNIX) as near, socket.socket(socket.AF_INET) as far:
        near.bind(unix)
        near.listen(size + BACKLOG)
        if meeting.address is not None:
            _set_buffers(far)  # before it listens: its connections inherit them
            far.bind((meeting.address, 0))
            far.listen(size + BACKLOG)
        mine = _Address(own_host_id(), unix, None if meeting.address is None else far.getsockname())
        store.set(f"longspan-address-{rank}", msgspec.msgpack.encode(mine))
        connections: dict[int, socket.socket] = {}
        for peer in range(rank):
            theirs = msgspec.msgpack.decode(store.get(f"longspan-address-{peer}"), type=_Address)
            connections[peer] = _connect(rank, peer, theirs, mine.host_id, meeting.key, timeout_s)
        listeners = [near] if meeting.address is None else [near, far]
        connections |= _accept(rank, set(range(rank + 1, size)), listeners, meeting.key, timeout_s)
    if meeting.directory is not None:
        os.unlink(unix)  # every rank that needs it has connected
    for connection in connections.values():
        connection.setblocking(False)
    return connections


def _connect(rank: int, peer: int, theirs: _Address, host_id: str, key: bytes, timeout_s: float) -> socket.socket:
    is_near = theirs.host_id == host_id
    connection = socket.socket(socket.AF_UNIX if is_near else socket.AF_INET)
    connection.settimeout(timeout_s)
    if is_near:
        connection.connect(theirs.unix)
    else:
        assert theirs.tcp is not None, "ranks of one group meet in the same way"
        _set_buffers(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.connect(theirs.tcp)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(_HELLO.pack(rank, nonce))
    answer = receive_exactly(connection, _NONCE_BYTES + _PROOF_BYTES, time.monotonic() + timeout_s)
    nonces = nonce + answer[:_NONCE_BYTES]
    if not hmac.compare_digest(answer[_NONCE_BYTES:], _proof(key, b"accepts", peer, rank, nonces)):
        raise OSError(f"rank {peer} does not know the secret")
    connection.sendall(_proof(key, b"connects", rank, peer, nonces))
    return connection


def _accept(
    rank: int, waiting: set[int], listeners: list[socket.socket], key: bytes, timeout_s: float
) -> dict[int, socket.socket]:
    """Accept connections until all expected peers have proved that they know the key.

    Each handshake has a thread of its own, so that a silent connection delays no other.
    """
    found: queue.SimpleQueue[tuple[int, socket.socket]] = queue.SimpleQueue()
    connections: dict[int, socket.socket] = {}
    deadline = time.monotonic() + timeout_s
    while waiting:
        if time.monotonic() >= deadline:
            raise OSError(f"ranks {sorted(waiting)} did not connect")
        ready, _, _ = select.select(listeners, [], [], ACCEPT_POLL_S)
        for listener in ready:
            connection, _ = listener.accept()
            threading.Thread(target=_hear, args=(rank, connection, key, deadline, found), daemon=True).start()
        while not found.empty():
            peer, connection = found.get()
            if peer in waiting:
                connections[peer] = connection
                waiting.remove(peer)
            else:
                connection.close()
    return connections


def _hear(
    rank: int,
    connection: socket.socket,
    key: bytes,
    deadline: float,
    found: "queue.SimpleQueue[tuple[int, socket.socket]]",
) -> None:
    """Run the accepting side of a handshake, and queue the connection if it is a peer's."""
    try:
        deadline = min(deadline, time.monotonic() + STRANGER_S)
        peer, nonce = _HELLO.unpack(receive_exactly(connection, _HELLO.size, deadline))
        nonces = nonce + secrets.token_bytes(_NONCE_BYTES)
        connection.sendall(nonces[_NONCE_BYTES:] + _proof(key, b"accepts", rank, peer, nonces))
        proof = receive_exactly(connection, _PROOF_BYTES, deadline)
        if not hmac.compare_digest(proof, _proof(key, b"connects", peer, rank, nonces)):
            raise OSError("a stranger")
        if connection.family == socket.AF_INET:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        connection.close()
        return
    found.put((peer, connection))


def _proof(key: bytes, role: bytes, rank: int, peer: int, nonces: bytes) -> bytes:
    """Proof of knowing the key that `rank` makes for `peer`."""
    return hmac.digest(key, role + struct.pack("<II", rank, peer) + nonces, "sha256")


def receive_exactly(connection: socket.socket, num_bytes: int, deadline: float) -> bytes:
    """Receive a message of `num_bytes` bytes, which may come in pieces."""
    data = b""
    while len(data) < num_bytes:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("a peer did not say who it is")
        connection.settimeout(left_s)
        piece = connection.recv(num_bytes - len(data))
        if not piece:
            raise OSError("a peer closed the connection before it said who it is")
        data += piece
    return data


def _set_buffers(connection: socket.socket) -> None:
    """Fix the size of a socket's buffers. See Note [No deadlock] in `longspan.comm.sockets`."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)


def own_host_id() -> str:
    """Text that is equal for two processes if and only if they can reach each other's Unix sockets."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{platform.node()} {boot_id} {os.readlink('/proc/self/ns/net')}"


def interface_address(interface: str) -> str:
    """IPv4 address of a network interface.

    Raises:
        ConfigError: the interface does not exist or has no IPv4 address.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise ConfigError(
                f"interface: got {interface!r}, legal is one of this host's with an IPv4 address, among {names}"
            ) from error
    return socket.inet_ntoa(found[20:24])


def interface_with(address: str) -> str | None:
    """Name of the network interface that has an IPv4 address; None if there is none, or it is not its first one."""
    for _, name in socket.if_nameindex():
        try:
            if interface_address(name) == address:
                return name
        except ConfigError:  # it has no IPv4 address
            continue
    return None


def is_loopback(host: str) -> bool:
    """Whether a host's name or address leads back to this host alone."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return False  # whoever connects to it says why it cannot


def reachable_address(hosts: Sequence[str]) -> str:
    """IPv4 address from which this machine reaches others: towards the first that is not this machine's loopback.

    Args:
        hosts: names or addresses to reach, at least one.

    Raises:
        CommunicationError: none of them can be reached.
    """
    found: list[str] = []
    failure: CommunicationError | None = None
    for host in hosts:
        try:
            found.append(address_towards(host))
        except CommunicationError as error:
            failure = failure or error
            continue
        if not is_loopback(found[-1]):
            return found[-1]
    if not found:
        assert failure is not None
        raise failure
    return found[0]


def address_towards(host: str) -> str:
    """IPv4 address from which this machine reaches a host.

    Raises:
        CommunicationError: the host cannot be reached.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError as error:
            raise CommunicationError(f"no way to {host}: {error}") from error
        return str(probe.getsockname()[0])
