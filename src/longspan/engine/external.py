"""Workers that another program starts and ends, such as torchrun on every host.

Holds the address at which the driver listens for them. Must not know messages or plans.
Read next: `longspan.worker.remote`, which runs in such a worker.
"""

import socket
import sys

from longspan.comm.secret import Secret, require_secret
from longspan.config import EngineConfig
from longspan.errors import ConfigError
from longspan.group.shape import GroupShape, ProcessId
from longspan.quantities import parse_listen


class ExternalLauncher:
    """Launcher that starts nothing: it prints the driver's address, and the link waits for workers."""

    is_remote = True
    directory: str | None = None

    def __init__(self, config: EngineConfig) -> None:
        """Find out where to listen.

        Raises:
            ConfigError: there is no secret, or no such address.
        """
        assert config.listen is not None, "checked with the config"
        self.bind_address = tcp_address(config.listen)
        self.secret: Secret | None = require_secret(config.secret_file, "the driver listens on the network")

    def start(self, address: str, shape: GroupShape) -> None:
        print(f"longspan: waiting for {shape} at {address}", file=sys.stderr, flush=True)

    def name(self, process: ProcessId) -> str | None:
        return None

    def ended(self, process: ProcessId) -> str | None:
        return None

    def kill(self) -> None:
        """Do nothing: no signal reaches the workers, and the link tells them to end."""

    def renew(self) -> bool:
        return False

    def release(self, patience_s: float) -> None:
        """Do nothing: there is nothing to release."""


def tcp_address(listen: str) -> str:
    """Convert HOST:PORT to a ZeroMQ address with the host's IPv4 address.

    Raises:
        ConfigError: the host has no address.
    """
    host, port = parse_listen(listen)
    try:
        return f"tcp://{socket.gethostbyname(host)}:{port}"
    except OSError as error:
        raise ConfigError(f"listen: got {listen!r}, legal is a HOST with an IPv4 address: {error}") from error
