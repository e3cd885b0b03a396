"""The secret that all processes of a group on several hosts share, and the keys derived from it.

Holds the reading of the secret, and its use in HMAC. The secret is never sent, printed or put on a command line.
Read next: `longspan.comm.sockets` and `longspan.group.zmq_auth`, which use the keys.
"""

import hashlib
import hmac
import os
from pathlib import Path

from longspan.errors import ConfigError

VARIABLE = "LONGSPAN_SECRET"
"""Environment variable that may hold the secret."""

MIN_LEN = 16
"""Fewest bytes of a secret: an attacker with a recorded handshake can try secrets as fast as hashes are computed."""


class Secret:
    """Shared secret, whose text form shows nothing of it."""

    def __init__(self, value: bytes) -> None:
        self._value = value

    def key(self, purpose: str) -> bytes:
        """Derive a key of 32 bytes for one purpose; a key tells nothing about other keys or the secret."""
        return hmac.new(self._value, f"longspan {purpose}".encode(), hashlib.sha256).digest()


def read_secret(secret_file: str | None) -> Secret | None:
    """Read the secret from a file, else from the environment; None without both. White space around it is dropped.

    Raises:
        ConfigError: the secret cannot be read, or is too short.
    """
    if secret_file is not None:
        source, value = f"secret_file: got {secret_file!r}", _read(secret_file)
    elif VARIABLE in os.environ:
        source, value = f"{VARIABLE}: got a secret", os.fsencode(os.environ[VARIABLE]).strip()
    else:
        return None
    if len(value) < MIN_LEN:
        raise ConfigError(f"{source} of {len(value)} bytes, legal is a secret of at least {MIN_LEN} bytes")
    return Secret(value)


def require_secret(secret_file: str | None, why: str) -> Secret:
    """Read the secret, which must be there.

    Raises:
        ConfigError: there is no secret, it cannot be read, or it is too short.
    """
    secret = read_secret(secret_file)
    if secret is None:
        raise ConfigError(
            f"{VARIABLE}: not set, legal is a secret of at least {MIN_LEN} bytes, there or in a file named by "
            f"--secret-file: {why}"
        )
    return secret


def _read(secret_file: str) -> bytes:
    try:
        return Path(secret_file).expanduser().read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"secret_file: got {secret_file!r}, legal is a file that can be read: {error.strerror}"
        ) from error
