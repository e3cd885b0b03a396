"""Proves what every host's plans have in common, and that both hosts make the same of the same requests.

The plugin's side of it knows no vLLM, so it runs here.
"""

from functools import partial
from types import SimpleNamespace

import pytest
from cp_cases import make_group
from fake_ranks import make_config, make_model, make_scheduler

from longspan.costmodel.choose import plan_group
from longspan.costmodel.parameters import Costs, KernelRates, Link, Topology, costs_by_bytes
from longspan.integrations.vllm.groups import LayerGroups
from longspan.integrations.vllm.planning import Row, plan_step
from longspan.integrations.vllm.requests import RequestState
from longspan.plan.build import RequestStep, build_plan, score_runs
from longspan.plan.group_step import BLOCK_LEN
from longspan.plan.read_runs import read_runs
from longspan.plan.types import Literals, Plan, PlanResult, RankResult, SampledBy, SampledToken, SampleRow, ScoredRun
from longspan.scheduler.request import Request
from longspan.sharding.pages import PageTable
from longspan.types import Phase, SamplingParams, Strategy, TokenLogprobs

GROUP = make_group([0, 1])
CHOOSE = partial(plan_group, costs=costs_by_bytes((0, 0)), forced=Strategy.PASS_Q)
RATES = KernelRates(1e11, 1e10, 1e10, ((1, 1e10), (64, 5e10)), 1e-5, 1e-5, 1e-4, None, 1e-5)
TIMES = Costs(Topology((0, 0, 0), Link(3e-5, 2e9), Link(3e-5, 2e9)), RATES)


def table_of(*owners: int, page_size: int = 4) -> PageTable:
    """A page per owner."""
    table = PageTable(page_size)
    for slot, rank in enumerate(owners):
        table.append(rank, slot, 1)
    return table


def sample(request_id: int, position: int) -> SampleRow:
    return SampleRow(request_id, position, 0.0, 1.0, 0, 0.0, 0, None, ())


def part(start, end, num_known, *, request_id=0, tokens=None, scores=()) -> RequestStep:
    """A request's part in a step; it gets a token where its known ones end."""
    rows = [sample(request_id, end - 1)] if end >= num_known else []
    return RequestStep(request_id, start, end, num_known, tokens or range(start, end), rows, scores)


def build(*parts: RequestStep, table: PageTable | None = None, groups=(GROUP,), **more) -> Plan:
    tables = [{p.request_id: table or table_of(0, 1, 1, 0) for p in parts} for _ in groups]
    return build_plan(7, {1, 0}, parts, tables, groups, CHOOSE, **more)


def test_runs_are_cut_where_the_computing_rank_changes_and_name_their_tokens():
    runs = build(part(2, 14, 20), part(4, 5, 5, request_id=1)).query_runs
    assert [(r.request_id, r.position, r.end, r.compute_rank) for r in runs] == [
        (0, 2, 4, 0),
        (0, 4, 12, 1),
        (0, 12, 14, 0),
        (1, 4, 5, 1),
    ]
    assert all(r.tokens == Literals(tuple(range(r.position, r.end))) for r in runs)


def test_no_run_is_longer_than_a_block_of_queries():
    table = table_of(0, 1, page_size=3 * BLOCK_LEN)
    runs = build(part(100, 5 * BLOCK_LEN, 6 * BLOCK_LEN), table=table).query_runs
    assert [(r.compute_rank, r.num_tokens) for r in runs] == [
        (0, BLOCK_LEN),
        (0, BLOCK_LEN),
        (0, BLOCK_LEN - 100),
        (1, BLOCK_LEN),
        (1, BLOCK_LEN),
    ]
    assert [token for run in runs for token in run.tokens.token_ids] == list(range(100, 5 * BLOCK_LEN))


@pytest.mark.parametrize(
    ("parts", "phase"),
    [
        ([part(9, 10, 10)], Phase.DECODE),
        ([part(9, 10, 9, tokens=SampledBy(6))], Phase.DECODE),
        ([part(8, 10, 10)], Phase.PREFILL),
        ([part(8, 9, 10)], Phase.PREFILL),  # one token, but not the newest
        ([part(0, 1, 1)], Phase.DECODE),
        ([part(9, 10, 10), part(0, 4, 10, request_id=1)], Phase.PREFILL),
    ],
)
def test_a_step_is_a_prefill_if_a_request_has_more_than_its_newest_token_to_compute(parts, phase):
    assert build(*parts).phase is phase


def test_a_sampled_token_is_named_by_the_plan_that_samples_it():
    (run,) = build(part(9, 10, 9, tokens=SampledBy(6))).query_runs
    assert run.tokens == SampledBy(6)


def test_the_last_layer_has_a_step_of_its_own_where_rows_are_not_read():
    assert build(part(0, 1, 1)).last_layer is None
    assert build(part(9, 10, 10), part(3, 4, 4, request_id=1)).last_layer is None
    middle = build(part(0, 8, 16)).last_layer
    assert middle is not None
    assert middle.strategy is Strategy.LOCAL
    assert build(part(0, 8, 16)).read_runs == ()
    end = build(part(8, 16, 16), part(3, 4, 4, request_id=1))
    assert end.last_layer is not None
    assert [(run.request_id, run.position, run.end) for run in end.read_runs] == [(0, 15, 16), (1, 3, 4)]
    scores = score_runs(0, table_of(0, 1, 1, 0), range(17), 8, 15, 2)
    assert build(part(8, 16, 16, scores=scores)).last_layer is None, "all rows are read"


def test_the_last_layer_is_in_the_group_of_the_highest_layer():
    groups = [make_group([0, 3]), make_group([1, 2], window=2)]
    assert build(part(8, 16, 16), groups=groups).last_layer.strategy is Strategy.PASS_Q
    groups = [make_group([0, 2]), make_group([1, 3], window=2)]
    assert build(part(8, 16, 16), groups=groups).last_layer.strategy is Strategy.LOCAL


def test_scores_are_cut_where_the_rank_changes():
    runs = score_runs(3, table_of(0, 1, 1, 0), range(100, 120), 2, 13, 5)
    assert [(r.position, r.targets) for r in runs] == [
        (2, (103, 104)),
        (4, tuple(range(105, 113))),
        (12, (113,)),
    ]
    assert score_runs(3, table_of(0), range(9), 4, 4, 5) == []


# -- both hosts -------------------------------------------------------------------------------------------------------


def as_in_vllm(request: Request, start: int) -> RequestState:
    """A request as the plugin would hold it: with the same tokens and blocks."""
    (first, *_) = request.allocation.tables
    table = PageTable(first.page_size)
    table.apply(list(first.runs))
    num_logprobs, num_scored = request.params.prompt_logprobs, request.prompt_len - 1
    return RequestState(
        req_id=f"request-{request.request_id}",
        number=request.request_id,
        prompt_token_ids=request.token_ids[: request.prompt_len],
        output_token_ids=request.output_token_ids,
        sampling_params=SimpleNamespace(prompt_logprobs=num_logprobs),
        tables=[table],
        num_computed=start,
        has_prompt_logprobs=num_logprobs is None or start > num_scored,
    )


def answer(plan: Plan) -> PlanResult:
    """What ranks would say, with tokens that say nothing."""
    tokens = tuple(SampledToken(row.request_id, row.position + 1, 5, None) for row in plan.samples)
    scored = tuple(
        ScoredRun(run.request_id, run.position + 1, tuple(TokenLogprobs(t, -1.0, 1, ()) for t in run.targets))
        for run in plan.scores
    )
    results = [RankResult(plan.plan_id, rank, (), (), 0, 0) for rank in plan.ranks[1:]]
    return PlanResult(plan.plan_id, (RankResult(plan.plan_id, plan.ranks[0], tokens, scored, 0, 0), *results))


def packed_position(plan: Plan, row: Row) -> tuple[int, int]:
    """(request, position) of a row of one rank."""
    positions = [
        (run.request_id, position)
        for run in plan.query_runs
        if run.compute_rank == row.rank
        for position in range(run.position, run.end)
    ]
    return positions[row.row]


@pytest.mark.parametrize("costs", [costs_by_bytes((0, 0, 0)), TIMES], ids=["bytes", "times"])
@pytest.mark.parametrize("strategy", ["auto", "pass_q", "pass_kv", "gather_kv"])
def test_both_hosts_make_the_same_plan_of_the_same_requests(strategy, costs):
    config = make_config(3, page_size=1024, stripe_size=3072, max_num_batched_tokens=3072, strategy=strategy)
    scheduler = make_scheduler(make_model(None), config, memory_tokens=40_000)
    scheduler.writer.costs = costs
    requests = {}
    for length, num_logprobs in ((30_000, None), (9_000, 3), (40, 2), (3, None), (1, None)):
        prompt = [(7 * i + length) % 50 for i in range(length)]
        params = SamplingParams(max_tokens=3, ignore_eos=True, seed=1, prompt_logprobs=num_logprobs)
        request = scheduler.add_request(prompt, params)
        requests[request.request_id] = request
    seen = set()
    while (plan := scheduler.schedule()) is not None:
        starts: dict[int, int] = {}
        for run in plan.query_runs:
            starts.setdefault(run.request_id, run.position)
        ends = {run.request_id: run.end for run in plan.query_runs}
        states = {f"request-{i}": as_in_vllm(requests[i], start) for i, start in starts.items()}
        counts = {f"request-{i}": ends[i] - start for i, start in starts.items()}
        choose = partial(plan_group, costs=costs, forced=config.forced_strategy)
        theirs = plan_step(plan.plan_id, counts, states, LayerGroups(scheduler.model.kv_groups, (0,)), 3, choose)
        for name in ("phase", "query_runs", "groups", "last_layer", "scores"):
            assert getattr(theirs.plan, name) == getattr(plan, name), name
        assert [(s.request_id, s.position) for s in theirs.plan.samples] == [
            (s.request_id, s.position) for s in plan.samples
        ]
        read = {packed_position(plan, row) for row in theirs.read_rows}
        runs = read_runs(plan.query_runs, plan.samples, plan.scores)
        assert read == {(run.request_id, position) for run in runs for position in range(run.position, run.end)}
        seen |= {
            plan.phase,
            plan.last_layer is None,
            plan.groups[0].strategy,
            *(run.num_tokens for run in plan.query_runs),
        }
        scheduler.update(answer(plan))
    assert {Phase.PREFILL, Phase.DECODE, True, False, Strategy.LOCAL, BLOCK_LEN} <= seen
    assert len(seen & set(Strategy)) > 1
    assert not scheduler.has_requests
