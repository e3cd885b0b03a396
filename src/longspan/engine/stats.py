"""What an engine is doing and has done, in numbers.

Holds one snapshot. Must not know how it is taken or shown.
Read next: `longspan.server.metrics`, which shows it to Prometheus.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One moment of an engine. Lists have one entry per rank; whatever is called a total counts from the start."""

    num_running: int
    """Requests that hold pages."""
    num_waiting: int
    """Requests that wait for admission."""
    kv_pages_used: tuple[int, ...]
    """Pages in use, summed over KV groups."""
    kv_pages_total: tuple[int, ...]
    """Pages there are."""
    busy_s: tuple[float, ...]
    """Seconds that each rank spent on plans."""
    tokens_computed: tuple[int, ...]
    """Tokens that each rank computed."""
    steps_per_strategy: Mapping[str, int] = field(default_factory=dict)
    """(plan, KV group) pairs."""
    bytes_per_strategy: Mapping[str, int] = field(default_factory=dict)
    """Bytes that ranks sent each other."""
    num_preemptions: int = 0
    """Times that a running request gave its pages back and started again later."""
    prefix_queries_tokens: int = 0
    """Prompt tokens that were looked up in the prefix cache."""
    prefix_hit_tokens: int = 0
    """Prompt tokens that were found there."""
    num_restarts: int = 0
    """Times that ranks were lost and replaced."""
    recovery_s: float = 0.0
    """Seconds that this took, all times together, from the notice of the loss until new ranks were ready."""
    last_recovery_s: float | None = None
    """The same, the last time; None if there was none."""
