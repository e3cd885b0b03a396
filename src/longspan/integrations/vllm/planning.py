"""Conversion of vLLM's schedule to a plan of the core. Every rank makes the same plan from the same integers.

Holds pure functions of the mirrored requests. Must not know vLLM, tensors or clocks.
Read next: `longspan.plan.build`, which puts the plan together; `longspan.integrations.vllm.worker`, which runs plans.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from longspan.integrations.vllm.groups import LayerGroups
from longspan.integrations.vllm.requests import Requests, RequestState
from longspan.plan.build import ChooseGroupStep, RequestStep, Tables, build_plan, score_runs
from longspan.plan.types import Plan, QueryRun, SampleRow, ScoreRun


@dataclass(frozen=True)
class Row:
    """A token whose hidden state is needed by the sampling rank."""

    rank: int
    row: int
    """Index among the rank's packed rows."""


@dataclass(frozen=True)
class ScoredPrompt:
    """Prompt tokens of one request whose log-probabilities this step yields: rows `start ..` predict `start + 1 ..`."""

    req_id: str
    start: int
    rows: tuple[Row, ...]
    is_last: bool


@dataclass(frozen=True)
class StepPlan:
    """Plan of one step, and the rows that the sampling rank reads."""

    plan: Plan
    tables: Sequence[Tables]
    """Per KV group."""
    samples: Mapping[str, Row]
    """Row of every request that gets a token in this step, by request id."""
    scores: tuple[ScoredPrompt, ...]

    @property
    def read_rows(self) -> list[Row]:
        """Rows that the sampling rank needs: those that are scored, then those that are sampled from."""
        return [*(row for score in self.scores for row in score.rows), *self.samples.values()]


def plan_step(
    plan_id: int,
    num_scheduled: Mapping[str, int],
    requests: Requests,
    groups: LayerGroups,
    num_ranks: int,
    choose: ChooseGroupStep,
) -> StepPlan:
    """Make the plan of a step.

    Args:
        plan_id: id of the plan.
        num_scheduled: tokens to compute per request.
        requests: the mirrored requests, after `update`.
        groups: the model's KV groups.
        num_ranks: size of the cp_group.
        choose: chooses strategies, the same on every rank.
    """
    states = [requests[req_id] for req_id in num_scheduled]
    steps = [_request_step(state, num_scheduled[state.req_id]) for state in states]
    tables = [{state.number: state.tables[table] for state in states} for table in groups.tables]
    plan = build_plan(plan_id, range(num_ranks), steps, tables, groups.groups, choose)
    packed = _PackedRows(plan.query_runs)
    samples: dict[str, Row] = {}
    scores: list[ScoredPrompt] = []
    for state, step in zip(states, steps, strict=True):
        if step.samples:
            (samples[state.req_id],) = packed.rows(state.number, step.end - 1, step.end)
        if not state.has_prompt_logprobs:
            last_scored = len(state.prompt_token_ids) - 1
            rows = packed.rows(state.number, step.start, min(step.end, last_scored))
            scores.append(ScoredPrompt(state.req_id, step.start, tuple(rows), is_last=step.end > last_scored))
    return StepPlan(plan, tables, samples, tuple(scores))


def _request_step(state: RequestState, count: int) -> RequestStep:
    """Return the part of a step that computes a request's next `count` tokens."""
    start, end = state.num_computed, state.num_computed + count
    scores: list[ScoreRun] = []
    if not state.has_prompt_logprobs:
        prompt = state.prompt_token_ids
        num_logprobs: int = state.sampling_params.prompt_logprobs
        scores = score_runs(state.number, state.tables[0], prompt, start, min(end, len(prompt) - 1), num_logprobs)
    return RequestStep(
        request_id=state.number,
        start=start,
        end=end,
        num_known=state.num_tokens,
        tokens=state.tokens(start, end),
        samples=[_sample_row(state.number, end - 1)] if end >= state.num_tokens else (),
        scores=scores,
    )


def _sample_row(number: int, position: int) -> SampleRow:
    """Return the row that a token is sampled from, without sampling parameters: vLLM's own sampler has them."""
    return SampleRow(number, position, 0.0, 1.0, top_k=0, min_p=0.0, seed=0, num_logprobs=None, banned_token_ids=())


class _PackedRows:
    """Places of a step's positions among the packed rows of the ranks that compute them."""

    def __init__(self, query_runs: Iterable[QueryRun]) -> None:
        self._runs: dict[int, list[tuple[QueryRun, int]]] = {}  # per request, with the first row of each
        num_rows: dict[int, int] = {}
        for run in query_runs:
            first = num_rows.get(run.compute_rank, 0)
            self._runs.setdefault(run.request_id, []).append((run, first))
            num_rows[run.compute_rank] = first + run.num_tokens

    def rows(self, number: int, start: int, end: int) -> list[Row]:
        """Return the rows of a request's positions `[start, end)`."""
        return [
            Row(run.compute_rank, first + position - run.position)
            for run, first in self._runs[number]
            for position in range(max(start, run.position), min(end, run.end))
        ]
