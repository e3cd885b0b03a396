"""From vLLM's schedule to a plan of the core. Every rank does it, from the same integers.

Holds pure functions of the mirrored requests. Must not know vLLM, tensors or clocks.
Read next: `longspan.costmodel.choose`, which picks the strategy; `longspan.integrations.vllm.worker`, which runs plans.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from longspan.costmodel.choose import plan_group
from longspan.integrations.vllm.requests import Requests, RequestState
from longspan.kv.layout import KVGroup
from longspan.plan.types import Literals, Plan, QueryRun
from longspan.sharding.pages import PageTable
from longspan.types import Phase, Strategy


@dataclass(frozen=True)
class Row:
    """A token whose hidden state is needed by the sampling rank."""

    rank: int
    row: int
    """In the rank's packed rows."""


@dataclass(frozen=True)
class ScoredPrompt:
    """Prompt tokens of one request whose log-probabilities this step yields: rows `start ..` predict `start + 1 ..`."""

    req_id: str
    start: int
    rows: tuple[Row, ...]
    is_last: bool


@dataclass(frozen=True)
class StepPlan:
    """What one step computes, and which rows are read."""

    plan: Plan
    tables: Mapping[int, PageTable]
    samples: Mapping[str, Row]
    """Per request that gets a token in this step."""
    scores: tuple[ScoredPrompt, ...]


def plan_step(
    plan_id: int,
    num_scheduled: Mapping[str, int],
    requests: Requests,
    group: KVGroup,
    num_ranks: int,
    forced: Strategy | None,
) -> StepPlan:
    """Write down a step.

    Args:
        plan_id: of the step.
        num_scheduled: tokens per request.
        requests: after `update`.
        group: the model's only KV group.
        num_ranks: of the cp_group.
        forced: the user's strategy, or None.
    """
    runs: list[QueryRun] = []
    tables: dict[int, PageTable] = {}
    samples: dict[str, Row] = {}
    scores: list[ScoredPrompt] = []
    num_rows = [0] * num_ranks
    for req_id, count in num_scheduled.items():
        state = requests[req_id]
        start, end = state.num_computed, state.num_computed + count
        rows: list[tuple[int, int, Row]] = []  # (first position, end, first row)
        for rank, first, last in state.table.owners(start, end):
            tokens = Literals(state.tokens(first, last))
            runs.append(QueryRun(state.number, first, last - first, rank, tokens))
            rows.append((first, last, Row(rank, num_rows[rank])))
            num_rows[rank] += last - first
        tables[state.number] = state.table
        first, _, row = rows[-1]
        if end >= state.num_tokens:
            samples[req_id] = Row(row.rank, row.row + end - 1 - first)
        if not state.has_prompt_logprobs:
            scores.append(_score(state, start, end, rows))
    step = plan_group(runs, tables, group, forced=forced)
    ranks = tuple(range(num_ranks))
    plan = Plan(plan_id, Phase.PREFILL, ranks, tuple(runs), (), (step,), ())
    return StepPlan(plan, tables, samples, tuple(scores))


def _score(state: RequestState, start: int, end: int, rows: list[tuple[int, int, Row]]) -> ScoredPrompt:
    """The prompt's tokens that the rows of `[start, end)` predict."""
    last_scored = len(state.prompt_token_ids) - 1
    scored_end = min(end, last_scored)
    found = tuple(
        Row(row.rank, row.row + position - first)
        for first, last, row in rows
        for position in range(first, min(last, scored_end))
    )
    return ScoredPrompt(state.req_id, start, found, is_last=end > last_scored)
