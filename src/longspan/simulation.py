"""Simulated links between nodes: legal values of the option `simulated_links`.

Holds the option's meaning and its check. Must not know communicators, or how ranks start.
Read next: `longspan.comm.delaying`, which holds messages back.
"""

import re

import msgspec

from longspan.errors import ConfigError

LEGAL = (
    "legal is 'nodes=0,0,1,1 latency_us=500 mbit_per_s=1000': a node per rank, counted from 0 without gaps, and a "
    "latency (0 to 10000000), a bandwidth (above 0, up to 10000000), or both"
)
MOST = 10**7
"""Largest latency in microseconds, and largest bandwidth in megabits per second."""


class SimulatedLinks(msgspec.Struct, frozen=True):
    """Links of ranks on one machine that count as on several nodes."""

    nodes: tuple[int, ...]
    """Node of each rank, counted from 0."""
    latency_s: float = 0.0
    """Delay of a message between two nodes, beside the time of its bytes."""
    bytes_per_s: float | None = None
    """Bandwidth of a node to all others together; None is unlimited."""


def parse_simulated_links(text: object, num_ranks: int) -> SimulatedLinks:
    """Simulated links from the option's value.

    Raises:
        ConfigError: the value is illegal, or names another number of ranks.
    """
    refusal = ConfigError(f"simulated_links: got {text!r} for {num_ranks} ranks, {LEGAL}")
    if not isinstance(text, str):
        raise refusal
    words = text.split()
    values = dict(word.partition("=")[::2] for word in words)
    if len(values) != len(words) or not {"nodes"} < set(values) <= {"nodes", "latency_us", "mbit_per_s"}:
        raise refusal
    if not re.fullmatch(r"\d{1,3}(,\d{1,3})*", values["nodes"], re.ASCII):
        raise refusal
    nodes = tuple(int(node) for node in values["nodes"].split(","))
    numbers = {name: _number(values[name]) for name in values if name != "nodes"}
    if len(nodes) != num_ranks or set(nodes) != set(range(max(nodes) + 1)):
        raise refusal
    if any(value is None or value > MOST for value in numbers.values()) or numbers.get("mbit_per_s") == 0:
        raise refusal
    latency_us, mbit_per_s = numbers.get("latency_us") or 0.0, numbers.get("mbit_per_s")
    return SimulatedLinks(nodes, latency_us / 1e6, None if mbit_per_s is None else mbit_per_s * 1e6 / 8)


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII) else None
