"""Options of the server, checked once.

Holds values and their legal ranges. Must not import what a server needs: `longspan serve --help` answers at once.
Read next: `longspan.cli.serve`, which sets these; `longspan.server.run`, which obeys them.
"""

import math

import msgspec

from longspan.config import MAX_COUNT
from longspan.errors import ConfigError


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Who may ask, for how much, and where.

    Raises:
        ConfigError: a value is illegal.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every IPv4 address of this machine."""
    port: int = 8000
    """0 takes a free one."""
    api_key: str | None = None
    """What clients must send as `Authorization: Bearer KEY`, except to /health; None asks for nothing.

    White space around it is dropped.
    """
    max_queued_requests: int | None = None
    """Most requests that wait, beside `max_num_seqs` that run; one more is answered 429. None queues any number."""
    max_model_len: int | None = None
    """Most tokens of a request, prompt and answer together; None is what the model admits."""
    served_model_name: str | None = None
    """What clients call the model; None is the name it was loaded by."""
    max_body_bytes: int = 32 * 2**20
    """Longest request body; a longer one is answered 413."""
    keep_alive_s: float = 5.0
    """After so much silence a streaming response sends a comment."""

    def __post_init__(self) -> None:
        def check(name: str, legal: bool, rule: str) -> None:
            if not legal:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, legal is {rule}")

        def whole(value: object, least: int, most: int) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

        check("host", isinstance(self.host, str) and bool(self.host.strip()), "a host name or an address")
        check("port", whole(self.port, 0, 65535), "a whole number from 0 (any free port) to 65535")
        if self.api_key is not None:  # a key from a file often ends with a line break, which no header can hold
            msgspec.structs.force_setattr(self, "api_key", self.api_key.strip())
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii()):
            raise ConfigError("api_key: got a key that is empty or not ASCII, legal is ASCII text")
        for name in ("max_queued_requests", "max_model_len"):
            value = getattr(self, name)
            check(name, value is None or whole(value, 1, MAX_COUNT), f"a whole number from 1 to {MAX_COUNT}")
        served = self.served_model_name
        check("served_model_name", served is None or bool(served.strip()), "a name that is not empty")
        check("max_body_bytes", whole(self.max_body_bytes, 1, 2**63 - 1), "a positive number of bytes")
        seconds = self.keep_alive_s
        is_number = isinstance(seconds, (int, float)) and math.isfinite(seconds)
        check("keep_alive_s", is_number and 0 < seconds <= 3600, "a number above 0 and up to 3600 (seconds)")
