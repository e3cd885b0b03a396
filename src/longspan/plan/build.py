"""Builder of a step's plan, shared by all hosts, from the part of every request that the step computes.

Holds the common parts of plans: query runs, the phase, a step per KV group, and one for the last layer. Must not know
costs (the host passes a function that chooses strategies), queues, or how a host represents requests.
Read next: `longspan.plan.types`, the plan; `longspan.scheduler.plan_writer` and
`longspan.integrations.vllm.planning`, the two hosts.
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
    StateStep,
    TableDelta,
)
from longspan.sharding.pages import PageTable
from longspan.types import Phase

Tables: TypeAlias = Mapping[int, PageTable]
"""Page table per request of one KV group, the step's own pages included."""

ChooseGroupStep: TypeAlias = Callable[[Sequence[QueryRun], Tables, KVGroup], GroupStep]
"""Function that chooses a strategy for query runs in one KV group and states its exchanges
(`longspan.costmodel.choose.plan_group` with a host's costs)."""


class RequestStep(msgspec.Struct, frozen=True, gc=False):
    """Part of one request that a step computes: positions `[start, end)`."""

    request_id: int
    start: int
    end: int
    num_known: int
    """Tokens of the request that are known before the step."""
    tokens: Sequence[int] | SampledBy
    """Input tokens, of which the first `num_skipped` are not of this step; or the plan that samples the only one.

    A host's own list of all tokens: a copy of a chunk of many ranks would take a millisecond."""
    samples: Sequence[SampleRow]
    """Rows that the request's next tokens are sampled from: one, and one more behind every draft; none if this step
    does not compute the last known token."""
    scores: Sequence[ScoreRun]
    """Rows whose next token is known and is scored."""
    rope_len: int = 0
    """See `QueryRun.rope_len`."""
    is_packed: bool = False
    """Whether all its pages lie on the rank that computes it; see `Plan.packed`."""
    adapter_id: int | None = None
    """See `QueryRun.adapter_id`."""
    num_skipped: int = 0
    """Entries of `tokens` before the token at `start`."""


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
    states: Iterable[StateStep] = (),
    is_last_read_alone: bool = True,
    released: Iterable[int] = (),
    block_len: int = BLOCK_LEN,
) -> Plan:
    """Build the plan of one step.

    Args:
        plan_id: the step's number.
        ranks: the ranks that run the step.
        requests: the parts of requests that it computes, in the order of the ranks' packed rows.
        tables: page tables of at least these requests, per KV group.
        groups: the model's KV groups.
        choose: the host's function that chooses a strategy.
        table_deltas: changes of page tables that the ranks must learn; none where they hold the tables themselves.
        page_copies: pages that are copied before the step.
        states: state of every request, if the model has recurrent layers.
        is_last_read_alone: whether the last layer may leave rows out that nobody reads.
        released: requests that the ranks may forget.
        block_len: most tokens of a query run.
    """
    is_prefill = False
    query_runs: list[QueryRun] = []
    samples: list[SampleRow] = []
    scores: list[ScoreRun] = []
    for request in requests:
        is_prefill = is_prefill or request.num_known - request.start > 1
        _add_runs(query_runs, request, tables[0][request.request_id], block_len)
        samples += request.samples
        if request.scores:
            scores += request.scores
    assert is_prefill or not scores, "a step that scores known tokens is a prefill"
    steps = [choose(query_runs, tables[i], group) for i, group in enumerate(groups)]
    ascending = tuple(sorted(ranks))
    last_layer: GroupStep | None = None
    read: list[QueryRun] = []
    if is_prefill and is_last_read_alone:  # all rows of a decode are read
        read = read_runs(query_runs, samples, scores)
        if _num_tokens(read) < _num_tokens(query_runs):
            last = max(range(len(groups)), key=lambda i: max(groups[i].layers))
            last_layer = choose(read, tables[last], groups[last])
    return Plan(
        plan_id=plan_id,
        phase=Phase.PREFILL if is_prefill else Phase.DECODE,
        ranks=ascending,
        num_tokens=count_tokens(ascending, query_runs),
        query_runs=tuple(query_runs),
        table_deltas=tuple(table_deltas),
        groups=tuple(steps),
        samples=tuple(samples),
        scores=tuple(scores),
        page_copies=tuple(page_copies),
        states=tuple(states),
        released=tuple(sorted(released)),
        packed=tuple([request.request_id for request in requests if request.is_packed]),
        has_drafts=any(len(request.samples) > 1 for request in requests),
        last_layer=last_layer,
        read_runs=() if last_layer is None else tuple(read),
    )


def count_tokens(ranks: Iterable[int], query_runs: Iterable[QueryRun]) -> tuple[int, ...]:
    """Tokens that each of some ranks computes."""
    found = dict.fromkeys(ranks, 0)
    for run in query_runs:
        found[run.compute_rank] += run.num_tokens
    return tuple(found.values())


def score_runs(
    request_id: int, table: PageTable, token_ids: Sequence[int], start: int, end: int, num_logprobs: int
) -> list[ScoreRun]:
    """Score runs of rows `[start, end)`, whose targets are the tokens that follow; each run lies on one rank.

    Args:
        request_id: the request.
        table: the request's page table in the first KV group.
        token_ids: the request's known tokens, position `end` included.
        start: the first row.
        end: one past the last row; there are no runs where it is not above `start`.
        num_logprobs: number of most probable tokens that are reported beside the target.
    """
    if start >= end:
        return []
    return [
        ScoreRun(request_id, first, tuple(token_ids[first + 1 : last + 1]), num_logprobs)
        for _, first, last in table.owners(start, end)
    ]


def _add_runs(query_runs: list[QueryRun], request: RequestStep, table: PageTable, block_len: int) -> None:
    """Cut a request's positions where the computing rank changes; no run is longer than a block of queries."""
    tokens, offset = request.tokens, request.num_skipped - request.start
    for rank, first, last in table.owners(request.start, request.end):
        for position in range(first, last, block_len):
            stop = min(last, position + block_len)
            if isinstance(tokens, SampledBy):
                named: Literals | SampledBy = tokens
            else:
                named = Literals(tuple(tokens[position + offset : stop + offset]))
            count, rope_len = stop - position, request.rope_len
            query_runs.append(QueryRun(request.request_id, position, count, rank, named, rope_len, request.adapter_id))


def _num_tokens(runs: Iterable[QueryRun]) -> int:
    return sum(run.num_tokens for run in runs)
