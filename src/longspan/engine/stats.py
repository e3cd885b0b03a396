"""Numbers of an engine: what it can hold, is doing and has done.

Holds frozen structs, and the totals of what ranks have done. Must not know how they are shown.
Read next: `longspan.engine.engine`, which fills them; `longspan.server.metrics`, which shows them to Prometheus.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from longspan.engine.recovery import add_totals
from longspan.plan.types import RankResult


class Capacity(msgspec.Struct, frozen=True):
    """Capacity of an engine's ranks for KV."""

    num_ranks: int
    page_size: int
    """Tokens per page."""
    pages_per_rank: tuple[int, ...]
    """Pages of each rank in the KV group that limits a request's length: one without a window, if there is one."""

    @property
    def tokens_per_rank(self) -> tuple[int, ...]:
        """Tokens whose KV each rank can hold."""
        return tuple([pages * self.page_size for pages in self.pages_per_rank])

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV all ranks can hold."""
        return sum(self.tokens_per_rank)


class RankStats(msgspec.Struct, frozen=True):
    """One rank's share of the work so far. Figures of pages, slots and bytes are peaks; pages are summed over KV
    groups, bytes are those of pages and states."""

    rank: int
    share: float
    """Part of a striped prompt that it holds and computes."""
    kv_pages_used: int
    kv_pages_total: int
    kv_bytes: int
    tokens_computed: int
    bytes_sent: int
    busy_s: float
    """Seconds spent on plans, waits for peers included."""
    state_slots_used: int = 0
    """Slots with the state of a running request, or one that it goes on from; 0 for a model without states."""
    state_slots_total: int = 0


class TierStats(msgspec.Struct, frozen=True):
    """One tier behind the pools. Counts, bytes and seconds are totals since the start, but for what it has now."""

    pages: int
    """Pages of this model that it is known to have."""
    num_bytes: int
    """Bytes of these pages."""
    num_loads: int
    """Requests that waited for pages."""
    hit_tokens: int
    """Tokens that these did not have to compute."""
    stored_pages: int
    stored_bytes: int
    store_s: float
    loaded_pages: int
    loaded_bytes: int
    load_s: float
    """Seconds that ranks took to load, summed over ranks."""
    failed_pages: int
    """Pages that could not be stored or loaded; those that were damaged among them."""
    damaged_pages: int
    dropped_pages: int
    """Pages that left their pool before they were stored."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Snapshot of an engine. Tuples have one entry per rank; counts and seconds are totals since the start."""

    num_running: int
    """Requests that hold pages."""
    num_waiting: int
    """Requests that wait for admission."""
    kv_pages_used: tuple[int, ...]
    """Pages in use per rank, summed over KV groups."""
    kv_pages_total: tuple[int, ...]
    """Pages per rank, in use or free, summed over KV groups."""
    state_slots_used: tuple[int, ...]
    """Slots of states in use per rank; 0 for a model without recurrent layers."""
    state_slots_total: tuple[int, ...]
    """Slots of states per rank, in use or free."""
    busy_s: tuple[float, ...]
    """Seconds that each rank spent on plans."""
    tokens_computed: tuple[int, ...]
    """Tokens that each rank computed."""
    rank_shares: tuple[float, ...] = ()
    """Part of a striped prompt that each rank holds and computes."""
    steps_per_strategy: Mapping[str, int] = field(default_factory=dict)
    """(plan, KV group) pairs that used each strategy."""
    bytes_per_strategy: Mapping[str, int] = field(default_factory=dict)
    """Bytes that ranks sent each other, by strategy; those of states as `states`, and those that the processes of a
    rank sent each other for sums as `sums`."""
    num_preemptions: int = 0
    """Times that a running request gave its pages back and started again later."""
    prefix_queries_tokens: int = 0
    """Prompt tokens that were looked up in the prefix cache."""
    prefix_hit_tokens: int = 0
    """Prompt tokens that were found in the prefix cache."""
    num_restarts: int = 0
    """Times that ranks were lost and replaced."""
    recovery_s: float = 0.0
    """Seconds from the notice that ranks were lost until new ones were ready, summed over restarts."""
    num_drafted: int = 0
    """Times that a step checked drafts of a request."""
    num_accepted_drafts: int = 0
    """Drafts that became tokens."""
    num_rejected_drafts: int = 0
    """Drafts that were wrong."""
    last_recovery_s: float | None = None
    """Seconds of the last restart, from the notice of the loss until new ranks were ready; None if there was none."""
    tiers: Mapping[str, TierStats] = field(default_factory=dict)
    """Tiers behind the pools, by their names."""


class WorkDone:
    """Totals of what every rank has done since the start, lost ranks included. Any thread may read them."""

    def __init__(self) -> None:
        self._last: dict[int, RankResult] = {}  # last answer per rank, with totals since these ranks' start
        self._earlier: dict[int, RankResult] = {}  # totals per rank, of ranks that were lost

    def note(self, results: Iterable[RankResult]) -> None:
        """Take in answers of ranks; the last answer of each rank counts."""
        self._last.update({result.rank: result for result in results})

    def lose_ranks(self) -> None:
        """Keep the totals of ranks that are lost; the next ones count from zero."""
        self._earlier, self._last = add_totals(self._earlier, self._last.values()), {}

    def per_rank(self) -> dict[int, RankResult]:
        """Return the totals by rank; a rank that has done nothing is missing."""
        return add_totals(self._earlier, list(self._last.values()))

    def bytes_per_strategy(self) -> dict[str, int]:
        """Return the bytes that ranks sent each other, by strategy."""
        total: Counter[str] = Counter()
        for done in self.per_rank().values():
            total.update(done.strategy_bytes)
        return dict(total)
