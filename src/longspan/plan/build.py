"""One step's plan, from what it computes of every request: how every host makes its plans.

Holds what plans of all hosts have in common: query runs, the phase, a step per KV group, and one for the last layer.
Must not know costs (the host hands in what chooses strategies), queues, or how a request is held.
Read next: `longspan.plan.types`, what is built; `longspan.scheduler.plan_writer` and
`longspan.integrations.vllm.planning`, the two hosts that build.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import msgspec

from longspan.kv.layout import KVGroup
from longspan.plan.group_step import BLOCK_LEN
from longspan.plan.read_runs import read_runs
from longspan.plan.types import (
    GroupStep,
    Literals,
    PageCopy,
    Plan,
    QueryRun,
    SampledBy,
    SampleRow,
    ScoreRun,
    TableDelta,
)
from longspan.sharding.pages import PageTable
from longspan.types import Phase

Tables: TypeAlias = Mapping[int, PageTable]
"""The page table per request of one KV group, the step's own pages included."""

ChooseGroupStep: TypeAlias = Callable[[Sequence[QueryRun], Tables, KVGroup], GroupStep]
"""Chooses a strategy for query runs in one KV group, and writes down what it exchanges
(`longspan.costmodel.choose.plan_group` with a host's costs)."""


class RequestStep(msgspec.Struct, frozen=True, gc=False):
    """What a step computes of one request: positions `[start, end)`."""

    request_id: int
    start: int
    end: int
    num_known: int
    """Tokens of the request that are known before the step."""
    tokens: Sequence[int] | SampledBy
    """Those at `[start, end)`."""
    sample: SampleRow | None
    """How the request's next token is sampled, if this step computes the last known one."""
    scores: Sequence[ScoreRun]
    """Rows whose next token is known, and is to be scored."""


def build_plan(
    plan_id: int,
    ranks: Iterable[int],
    requests: Sequence[RequestStep],
    tables: Sequence[Tables],
    groups: Sequence[KVGroup],
    choose: ChooseGroupStep,
    *,
    table_deltas: Iterable[TableDelta] = (),
    page_copies: Iterable[PageCopy] = (),
    released: Iterable[int] = (),
) -> Plan:
    """Write a step down.

    Args:
        plan_id: the step's number.
        ranks: the ranks that run it.
        requests: what it computes, in the order of the ranks' packed rows.
        tables: per KV group, at least those of `requests`.
        groups: the model's KV groups.
        choose: the host's way to choose a strategy.
        table_deltas: what the ranks must learn of page tables, where they do not hold them themselves.
        page_copies: pages that are copied before the step.
        released: requests that the ranks may forget.
    """
    is_prefill = False
    query_runs: list[QueryRun] = []
    samples: list[SampleRow] = []
    scores: list[ScoreRun] = []
    for request in requests:
        is_prefill = is_prefill or request.num_known - request.start > 1
        _add_runs(query_runs, request, tables[0][request.request_id])
        if request.sample is not None:
            samples.append(request.sample)
        if request.scores:
            scores += request.scores
    steps = [choose(query_runs, tables[i], group) for i, group in enumerate(groups)]
    last_layer: GroupStep | None = None
    if is_prefill:  # all rows of a decode are read
        read = read_runs(query_runs, samples, scores)
        if _num_tokens(read) < _num_tokens(query_runs):
            last = max(range(len(groups)), key=lambda i: max(groups[i].layers))
            last_layer = choose(read, tables[last], groups[last])
    return Plan(
        plan_id=plan_id,
        phase=Phase.PREFILL if is_prefill else Phase.DECODE,
        ranks=tuple(sorted(ranks)),
        query_runs=tuple(query_runs),
        table_deltas=tuple(table_deltas),
        groups=tuple(steps),
        samples=tuple(samples),
        scores=tuple(scores),
        page_copies=tuple(page_copies),
        released=tuple(sorted(released)),
        last_layer=last_layer,
    )


def score_runs(
    request_id: int, table: PageTable, token_ids: Sequence[int], start: int, end: int, num_logprobs: int
) -> list[ScoreRun]:
    """Let rows `[start, end)` be scored by the tokens that follow them, one run per rank that computes some.

    Args:
        request_id: the request.
        table: its page table of the first KV group.
        token_ids: its known tokens, position `end` included.
        start: the first row.
        end: one past the last row; nothing is scored where it is not above `start`.
        num_logprobs: how many of the most probable tokens are reported besides.
    """
    if start >= end:
        return []
    return [
        ScoreRun(request_id, first, tuple(token_ids[first + 1 : last + 1]), num_logprobs)
        for _, first, last in table.owners(start, end)
    ]


def _add_runs(query_runs: list[QueryRun], request: RequestStep, table: PageTable) -> None:
    """Cut a request's positions where the computing rank changes; no run is longer than a block of queries."""
    start, tokens = request.start, request.tokens
    for rank, first, last in table.owners(start, request.end):
        for position in range(first, last, BLOCK_LEN):
            stop = min(last, position + BLOCK_LEN)
            if isinstance(tokens, SampledBy):
                named: Literals | SampledBy = tokens
            else:
                named = Literals(tuple(tokens[position - start : stop - start]))
            query_runs.append(QueryRun(request.request_id, position, stop - position, rank, named))


def _num_tokens(runs: Iterable[QueryRun]) -> int:
    return sum(run.num_tokens for run in runs)
