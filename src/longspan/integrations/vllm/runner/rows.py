"""Rows of a step: who computes which tokens, and how many of its own keys a rank has for each.

Holds arithmetic on page tables. Must not know vLLM or torch, or how rows and partials move.
Read next: `longspan.integrations.vllm.runner.step`, which runs what is planned here.

Note [Two calls]
    A rank computes runs of consecutive positions, those that it stores. Queries of a run see all earlier keys of their
    request, wherever they lie, and each other causally. So on every rank two kernel calls suffice for all runs of a
    step, over keys that the rank's block table lists in sequence order:

        page size 4      positions 0..3  4..7  8..11  12..13       a step computes positions 8..13
        rank                       0     1     0      1
        runs of the step                   8..11  12..13

        own call, causal           rank 0: queries  8..11, its first 8 keys (0..3, 8..11)
                                   rank 1: queries 12..13, its first 6 keys (4..7, 12..13)
        remote call, all keys      rank 0: queries 12..13, its first 8 keys (0..3, 8..11)
                                   rank 1: queries  8..11, its first 4 keys (4..7)

    The last keys of an own call are the run's own, so a mask that is aligned to the bottom right is exact. In a
    remote call, every key is before the whole run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from longspan.sharding.pages import PageTable


@dataclass(frozen=True, slots=True)
class Scheduled:
    """What a step computes of one request."""

    table: PageTable
    row: int
    """Row of the request in the device's block tables."""
    start: int
    num_tokens: int
    is_prefilling: bool
    """Whether the request has prompt tokens to compute; its rows come after those of requests that have none."""

    @property
    def end(self) -> int:
        """Position after the last that is computed."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class RankRun:
    """Consecutive positions of one request that one rank computes."""

    request: int
    """Index of the request in the step."""
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        """Number of queries."""
        return self.end - self.start


@dataclass(frozen=True)
class Call:
    """Arguments of one kernel call, for queries packed by run."""

    table_rows: NDArray[np.int32]
    """[runs] row of the device's block tables."""
    query_starts: NDArray[np.int32]
    """[runs + 1] first query of each run, and the number of queries."""
    key_lens: NDArray[np.int32]
    """[runs] keys of this rank that the run sees, from the front of its request's block table."""

    @property
    def num_queries(self) -> int:
        """Number of query rows."""
        return int(self.query_starts[-1])

    @property
    def max_query_len(self) -> int:
        """Queries of the longest run."""
        return int(np.diff(self.query_starts).max(initial=0))

    @property
    def max_key_len(self) -> int:
        """Keys of the run that sees most."""
        return int(self.key_lens.max(initial=0))

    @property
    def empty_queries(self) -> NDArray[np.bool_]:
        """[queries] whether a query sees no key of this rank."""
        return np.repeat(self.key_lens == 0, np.diff(self.query_starts))


@dataclass(frozen=True)
class RankRows:
    """A step as one rank sees it."""

    slots: NDArray[np.int64]
    """[rows] where the rank stores its rows: row of its KV memory, `slot * page_size` and the place in the page."""
    own: Call
    """Its rows against its keys, causal."""
    travelling: NDArray[np.int64]
    """[n] those of its rows that see keys of other ranks: these are sent to all."""
    num_travelling: int
    """The most travelling rows of any rank, which every rank's message has; 0 where all rows see keys of their own
    rank only, so that nothing moves."""
    remote: Call
    """The travelling rows of all ranks against this rank's keys, `num_travelling` of each, in the order of ranks.
    Without keys are its own rows, padding, and rows whose request has no keys here."""


def cut_runs(scheduled: Sequence[Scheduled], num_ranks: int) -> list[list[RankRun]]:
    """Cut a step where the owner changes.

    Args:
        scheduled: the step's requests, in vLLM's order.
        num_ranks: ranks that share the tokens.

    Returns:
        Per rank, its runs in the order of its rows: requests that decode, then those that prefill, each in the
        step's order, and each request's in sequence order.
    """
    runs: list[list[RankRun]] = [[] for _ in range(num_ranks)]
    for request in sorted(range(len(scheduled)), key=lambda i: scheduled[i].is_prefilling):
        one = scheduled[request]
        for rank, start, end in one.table.owners(one.start, one.end):
            runs[rank].append(RankRun(request, start, end))
    return runs


def rows_of_rank(rank: int, scheduled: Sequence[Scheduled], runs: Sequence[Sequence[RankRun]]) -> RankRows:
    """Plan one rank's part of a step.

    Args:
        rank: the rank.
        scheduled: the step's requests.
        runs: what `cut_runs` returned for them.
    """
    mine = runs[rank]
    slots = [np.zeros(0, dtype=np.int64)]
    for run in mine:
        table = scheduled[run.request].table
        slots += [np.arange(row, row + n) for row, n in table.row_runs(rank, run.start, run.end)]
    travels = [
        [scheduled[run.request].table.count_on(owner, 0, run.start) < run.start for run in theirs]
        for owner, theirs in enumerate(runs)
    ]
    travelling = [list(compress(theirs, flags)) for theirs, flags in zip(runs, travels, strict=True)]
    num_travelling = max(sum(run.num_tokens for run in theirs) for theirs in travelling)
    lengths = [run.num_tokens for run in mine]
    own = [(scheduled[s.request].row, s.num_tokens, scheduled[s.request].table.count_on(rank, 0, s.end)) for s in mine]
    return RankRows(
        slots=np.concatenate(slots),
        own=_call(own),
        travelling=np.flatnonzero(np.repeat(np.array(travels[rank], dtype=np.bool_), lengths)),
        num_travelling=num_travelling,
        remote=_remote_call(rank, scheduled, travelling, num_travelling),
    )


def _remote_call(
    rank: int, scheduled: Sequence[Scheduled], travelling: Sequence[Sequence[RankRun]], num_travelling: int
) -> Call:
    """Return the call for the travelling rows of all ranks; those of each are padded to one number.

    Padding is no longer than the longest run, since kernels have a faster way where all runs are of one query.
    """
    longest = max((run.num_tokens for theirs in travelling for run in theirs), default=0)
    entries: list[tuple[int, int, int]] = []
    for owner, theirs in enumerate(travelling):
        left = num_travelling
        for run in theirs:
            request = scheduled[run.request]
            keys = 0 if owner == rank else request.table.count_on(rank, 0, run.start)
            entries.append((request.row, run.num_tokens, keys))
            left -= run.num_tokens
        while left:
            entries.append((0, min(left, longest), 0))
            left -= min(left, longest)
    return _call(entries)


def _call(entries: Sequence[tuple[int, int, int]]) -> Call:
    """Return the call for runs of (row of the block tables, queries, keys)."""
    table_rows, query_lens, key_lens = np.array(entries, dtype=np.int32).reshape(-1, 3).T
    return Call(table_rows, np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32), key_lens)
