"""Notes on why strategies were chosen: the candidates' predicted times, taken when a choice is new.

Holds the notes of one scheduler. Must not know displays, or change a choice.
Read next: `longspan.costmodel.choose`; `longspan.cli.explain`, which prints the notes.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from longspan.costmodel.choose import exchange_bytes, predict_candidates, predict_strategy
from longspan.costmodel.parameters import Costs
from longspan.costmodel.work import count_work
from longspan.kv.layout import KVGroup
from longspan.plan.group_step import BLOCK_LEN
from longspan.plan.step_keys import Counts, StepKeys, step_keys
from longspan.plan.types import GroupStep, QueryRun
from longspan.sharding.pages import PageTable
from longspan.types import Phase, Strategy

_log = logging.getLogger(__name__)


class Candidate(msgspec.Struct, frozen=True):
    """Strategy that a step could have used, and its predicted costs in one layer."""

    strategy: Strategy
    predicted_s: float
    """Seconds until the last rank is done."""
    compute_s: float
    """Seconds that the last rank to finish spends in attention kernels."""
    wait_s: float
    """Seconds that the last rank to finish waits for messages."""
    copy_s: float
    """Seconds that the last rank to finish spends on packing and starting messages, and on merging partials."""
    sent_bytes: int
    """Most bytes that one rank sends in an exchange, summed over exchanges."""


class StrategyChoice(msgspec.Struct):
    """Strategy that a KV group used in one phase, and the first step that used it."""

    phase: Phase
    group_idx: int
    strategy: Strategy
    is_forced: bool
    num_queries: int
    """Query tokens of the first step, on all ranks."""
    num_keys: int
    """Longest sequence of the first step in tokens, its query tokens included."""
    num_ranks: int
    """Ranks with queries or keys in the first step."""
    candidates: tuple[Candidate, ...]
    """Candidates of the first step; empty where the strategy is `local`."""
    num_steps: int = 1
    """Steps that used the strategy."""


class StrategyChoices:
    """Choices made so far."""

    def __init__(self) -> None:
        self._found: dict[tuple[Phase, int, Strategy], StrategyChoice] = {}

    @property
    def all(self) -> list[StrategyChoice]:
        """All choices, in the order of their first steps."""
        return list(self._found.values())

    def steps_per_strategy(self) -> dict[str, int]:
        """Steps that used each strategy, in all phases and KV groups."""
        total: Counter[str] = Counter()
        for choice in self.all:
            total[choice.strategy.value] += choice.num_steps
        return dict(total)

    def count_again(self, phase: Phase, steps: Sequence[GroupStep]) -> None:
        """Count a step whose strategies, one per KV group, were chosen for an earlier one."""
        for group_idx, step in enumerate(steps):
            self._found[phase, group_idx, step.strategy].num_steps += 1

    def note(
        self,
        phase: Phase,
        group_idx: int,
        step: GroupStep,
        query_runs: Sequence[QueryRun],
        tables: Mapping[int, PageTable],
        group: KVGroup,
        costs: Costs,
        *,
        is_forced: bool,
        block_len: int = BLOCK_LEN,
    ) -> None:
        """Count one step. Predict its candidates only where the choice is new: once per phase, group and strategy."""
        known = self._found.get((phase, group_idx, step.strategy))
        if known is not None:
            known.num_steps += 1
            return
        keys = step_keys(query_runs, tables, group.spec)
        involved: Counts = (keys.before[keys.lasts] - keys.before[keys.firsts]).sum(axis=0)
        involved[keys.homes] = 1
        choice = StrategyChoice(
            phase=phase,
            group_idx=group_idx,
            strategy=step.strategy,
            is_forced=is_forced and step.strategy is not Strategy.LOCAL,
            num_queries=sum(run.num_tokens for run in query_runs),
            num_keys=max((run.end for run in query_runs), default=0),
            num_ranks=int(np.count_nonzero(involved)),
            candidates=_candidates(step.strategy, keys, group, costs, block_len),
        )
        self._found[phase, group_idx, step.strategy] = choice
        _log.debug("%s", choice)


def _candidates(
    strategy: Strategy, keys: StepKeys, group: KVGroup, costs: Costs, block_len: int
) -> tuple[Candidate, ...]:
    if strategy is Strategy.LOCAL:
        return ()
    found = list(predict_candidates(keys, group, costs, block_len=block_len))
    if all(candidate.strategy is not strategy for candidate in found):  # forced, and no candidate
        work = count_work(keys, group, costs.rates)
        found.append(predict_strategy(strategy, keys, group, costs, work, block_len))
    return tuple(
        Candidate(
            strategy=candidate.strategy,
            predicted_s=candidate.prediction.total_s,
            compute_s=candidate.prediction.compute_s,
            wait_s=candidate.prediction.wait_s,
            copy_s=candidate.prediction.copy_s,
            sent_bytes=sum(exchange_bytes(exchange, group) for exchange in candidate.exchanges),
        )
        for candidate in found
    )
