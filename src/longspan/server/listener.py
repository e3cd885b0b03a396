"""Sockets that a server listens on: addresses, ports, Unix sockets.

Holds their opening. Must not know HTTP, nor import what a server needs: a port in use is refused at once.
Read next: `longspan.server.run`, which serves on them.
"""

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from longspan.errors import ConfigError
from longspan.server.config import ServerConfig

BACKLOG = 2048
"""Connections that wait in a listening socket to be accepted."""


def listen(config: ServerConfig) -> list[socket.socket]:
    """Open the sockets that listen where the user wants it: one per address of the host name, or a Unix socket.

    Raises:
        ConfigError: an address is not this machine's, or the port or path is in use.
    """
    if config.uds is not None:
        return [_listen_unix(config.uds)]
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"host: got {config.host!r}, legal is an address of this machine: {error}") from None
    listeners: list[socket.socket] = []
    port = config.port
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    failed: OSError | None = None
    for family, address in addresses:
        try:
            listener = _open(family, (address[0], port, *address[2:]), is_alone=len(addresses) == 1)
        except OSError as error:
            # A host name may have an address of a family that this machine has switched off; the other one will do.
            failed = error if failed is None or not _is_absent(error) else failed
            continue
        listeners.append(listener)
        port = listener.getsockname()[1]  # port 0: the same free one for the other addresses
    if not listeners or (failed is not None and not _is_absent(failed)):
        assert failed is not None
        close(listeners, None)
        raise ConfigError(
            f"port: got {config.port} on {config.host}, legal is one that is free there: {failed.strerror}"
        ) from None
    return listeners


def widen(listeners: list[socket.socket]) -> None:
    """Let `BACKLOG` connections wait again, where asyncio has taken the number it accepts at a time for this one."""
    for listener in listeners:
        listener.listen(BACKLOG)


def close(listeners: list[socket.socket], uds: str | None) -> None:
    """Close the sockets, which may be closed already, and remove the file of a Unix socket."""
    for listener in listeners:
        listener.close()
    if uds is not None:
        with contextlib.suppress(OSError):
            os.unlink(uds)


def url_of(listener: socket.socket, scheme: str) -> str:
    """Return where clients find a socket."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _is_absent(error: OSError) -> bool:
    """Whether this machine has no such address, or none of its family."""
    return error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


def _open(family: int, address: tuple[object, ...], *, is_alone: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and not is_alone:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # the IPv4 address has its own
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _listen_unix(path: str) -> socket.socket:
    """Open a Unix socket; the file of one on which nobody listens any more is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale(path):
            os.unlink(path)
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"uds: got {path!r}, legal is a path where a socket can be made: {reason}") from None
    return listener


def _is_stale(path: str) -> bool:
    """Whether a path is a socket that a server left behind."""
    try:
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            return False
    except OSError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(path)
        except ConnectionRefusedError:
            return True
    return False
