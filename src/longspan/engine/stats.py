"""What an engine can hold, is doing and has done, in numbers.

Holds frozen answers, and the books of what ranks have done. Must not know how they are shown.
Read next: `longspan.engine.engine`, which answers; `longspan.server.metrics`, which shows them to Prometheus.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from longspan.engine.recovery import add_totals
from longspan.plan.types import RankResult


class Capacity(msgspec.Struct, frozen=True):
    """What an engine's ranks can hold."""

    num_ranks: int
    page_size: int
    """Tokens per page."""
    pages_per_rank: int
    """Pages of one rank in the KV group that limits a request's length: one without a window, if there is one."""

    @property
    def tokens_per_rank(self) -> int:
        """Tokens whose KV one rank can hold."""
        return self.pages_per_rank * self.page_size

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV all ranks can hold."""
        return self.tokens_per_rank * self.num_ranks


class RankStats(msgspec.Struct, frozen=True):
    """One rank's share of the work so far. Page and byte figures are peaks, summed over KV groups."""

    rank: int
    kv_pages_used: int
    kv_pages_total: int
    kv_bytes: int
    tokens_computed: int
    bytes_sent: int
    busy_s: float
    """Seconds spent on plans, waits for peers included."""


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


class WorkDone:
    """What every rank has done since the start, ranks that were lost included. Any thread may ask."""

    def __init__(self) -> None:
        self._last: dict[int, RankResult] = {}  # per rank; its totals count from the start of these ranks
        self._earlier: dict[int, RankResult] = {}  # the same, of ranks that were lost

    def note(self, results: Iterable[RankResult]) -> None:
        """Take in what ranks answered; the last answer of each counts."""
        self._last.update({result.rank: result for result in results})

    def lose_ranks(self) -> None:
        """The ranks are lost; those that come next count from zero."""
        self._earlier, self._last = add_totals(self._earlier, self._last.values()), {}

    def per_rank(self) -> dict[int, RankResult]:
        """By rank, the totals; ranks that have done nothing are missing."""
        return add_totals(self._earlier, list(self._last.values()))

    def bytes_per_strategy(self) -> dict[str, int]:
        """Bytes that ranks sent each other."""
        total: Counter[str] = Counter()
        for done in self.per_rank().values():
            total.update(done.strategy_bytes)
        return dict(total)
