"""Parsers of numbers and addresses as people write them: sizes, token counts, a number per rank, HOST:PORT.

Holds parsers of one text each. Must not know which option a text belongs to.
Read next: `longspan.config`, the options with such values.
"""

import re
from fractions import Fraction
from typing import Literal

from longspan.errors import ConfigError

MAX_COUNT = 2**31 - 1
"""Largest legal count, such as of tokens or requests."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str | int, field: str = "size") -> int:
    """Bytes of a size such as `2GiB`, `500M` or `1048576`.

    Raises:
        ConfigError: the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", str(text), re.IGNORECASE)
    num_bytes = int(Fraction(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if num_bytes <= 0:
        raise ConfigError(f"{field}: got {text!r}, legal is a positive number of bytes or with K, M, G, Ki, Mi, Gi (B)")
    return num_bytes


def parse_tokens(text: str | int, field: str = "context") -> int:
    """Tokens of a length such as `8k`, `1M` or `131072`. As usual for contexts, k is 1024 and M is 1024 * 1024.

    Raises:
        ConfigError: the text is not a positive number of tokens.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([km]?)\s*", str(text), re.IGNORECASE)
    tokens = Fraction(match[1]) * {"": 1, "K": 2**10, "M": 2**20}[match[2].upper()] if match else Fraction(0)
    if tokens.denominator != 1 or not 1 <= tokens <= MAX_COUNT:
        raise ConfigError(
            f"{field}: got {text!r}, legal is a whole number of tokens from 1 to {MAX_COUNT}, also with k (1024) or M "
            "(1024 * 1024)"
        )
    return int(tokens)


def parse_nodes(text: str, field: str = "nodes") -> tuple[int, ...]:
    """Node of every rank, from a text such as `0,0,1,1`.

    Raises:
        ConfigError: the text is no list of whole numbers.
    """
    try:
        return tuple(int(node) for node in text.split(","))
    except ValueError:
        raise ConfigError(f"{field}: got {text!r}, legal is a node per rank such as 0,0,1,1") from None


def parse_weights(text: str, field: str = "rank_weights") -> tuple[float, ...] | Literal["auto"]:
    """Weight of every rank, from a text such as `2,1,1`, or `auto`.

    Raises:
        ConfigError: the text is neither.
    """
    if text == "auto":
        return "auto"
    try:
        return tuple([float(weight) for weight in text.split(",")])
    except ValueError:
        raise ConfigError(f"{field}: got {text!r}, legal is auto, or a number per rank such as 2,1,1") from None


def parse_listen(text: str) -> tuple[str, int]:
    """Host and port of an address.

    Raises:
        ConfigError: the text is not HOST:PORT.
    """
    match = re.fullmatch(r"([A-Za-z0-9._-]+):(\d{1,5})", text, re.ASCII) if isinstance(text, str) else None
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise ConfigError(f"listen: got {text!r}, legal is HOST:PORT with a name or IPv4 address, and 1 to 65535")
    return match[1], int(match[2])


def check_driver_address(text: str) -> None:
    """Refuse an address where no driver can be.

    Raises:
        ConfigError: the text is not tcp://HOST:PORT.
    """
    if not re.fullmatch(r"tcp://[A-Za-z0-9._-]+:\d{1,5}", text, re.ASCII):
        raise ConfigError(f"driver: got {text!r}, legal is tcp://HOST:PORT as the driver's option listen has it")
