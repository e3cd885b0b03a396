"""Proves that a rank puts together from messages what concerns it, and that a decode which goes on is a few bytes."""

import random
from functools import partial
from itertools import pairwise

import pytest
from fake_ranks import FakeRanks, make_config, make_model, make_scheduler
from msgspec import structs

from longspan.costmodel.choose import plan_group
from longspan.group.messages import RunNext, RunPlan, decode_to_worker
from longspan.group.plans import PlanReceiver, PlanSender
from longspan.kv.layout import KVGroup, KVSpec
from longspan.plan.advance import advance
from longspan.plan.build import RequestStep, build_plan, score_runs
from longspan.plan.types import FIRST_DRAFT_PLAN, Literals, Plan, SampledBy, SampleRow, TableDelta, is_draft_plan
from longspan.sharding.pages import PageTable
from longspan.types import Phase, SamplingParams, Strategy

GROUP = KVGroup((0, 1), KVSpec.uniform(1, 4, 4, "float32"), 2)


def table_of(*owners: int) -> PageTable:
    """A page of four tokens per owner."""
    table = PageTable(4)
    for slot, rank in enumerate(owners):
        table.append(rank, slot, 1)
    return table


TABLES = {0: table_of(0, 1, 2, 1, 0), 1: table_of(1, 1), 2: table_of(2, 2)}
"""Request 0 lies on three ranks, request 1 on rank 1, request 2 on rank 2."""


def row(request_id: int, position: int) -> SampleRow:
    return SampleRow(request_id, position, 0.0, 1.0, 0, 0.0, 0, None, ())


def mixed_plan(plan_id: int = 4) -> Plan:
    """A chunk of request 0, which is scored, and a decode of each of the others."""
    scores = score_runs(0, TABLES[0], range(100, 120), 14, 18, 2)
    steps = [
        RequestStep(0, 5, 18, 20, list(range(105, 118)), (), scores),
        RequestStep(1, 6, 7, 7, [61], [row(1, 6)], (), is_packed=True),
        RequestStep(2, 3, 4, 4, [73], [row(2, 3)], (), is_packed=True),
    ]
    deltas = [TableDelta(request_id, 0, True, tuple(table.runs), 0) for request_id, table in TABLES.items()]
    choose = partial(plan_group, forced=Strategy.PASS_Q)
    return build_plan(plan_id, {0, 1, 2}, steps, [TABLES], [GROUP], choose, table_deltas=deltas, released=[9])


def decode_plan(plan_id: int) -> Plan:
    """A decode of request 0, at the first position of its page."""
    steps = [RequestStep(0, 16, 17, 17, [116], [row(0, 16)], ())]
    return build_plan(plan_id, {0, 1, 2}, steps, [TABLES], [GROUP], partial(plan_group, forced=Strategy.PASS_Q))


def received(receiver: PlanReceiver, message: bytes) -> Plan:
    found = decode_to_worker(message)
    assert isinstance(found, RunPlan | RunNext)
    return receiver.take(found)


def test_a_rank_gets_its_own_part_whole_and_of_the_other_ranks_what_concerns_it():
    plan, sender = mixed_plan(), PlanSender()
    messages = sender.messages(plan)
    assert set(messages) == {0, 1, 2}
    for rank, message in messages.items():
        got = received(PlanReceiver(rank), message)
        runs = [run for run in plan.query_runs if run.compute_rank == rank or run.request_id == 0]
        expected = [run if run.compute_rank == rank else structs.replace(run, tokens=None) for run in runs]
        assert list(got.query_runs) == expected, "in the order of the plan"
        assert {delta.request_id for delta in got.table_deltas} == {0, *([rank] if rank else [])}
        assert [score for score in plan.scores if score in got.scores] == list(got.scores)
        assert [r.request_id for r in got.samples] == ([rank] if rank else [])
        assert [(r.request_id, r.position, r.num_tokens) for r in got.read_runs] == [
            (r.request_id, r.position, r.num_tokens)
            for r in plan.read_runs
            if r.request_id in {run.request_id for run in runs}
        ]
        assert (got.groups, got.released, got.ranks) == (plan.groups, (9,), (0, 1, 2))
        assert got.last_layer == plan.last_layer
    assert {score for rank in messages for score in received(PlanReceiver(rank), messages[rank]).scores} == set(
        plan.scores
    )


def test_a_decode_that_goes_on_is_a_few_bytes_and_every_rank_knows_the_plan():
    sender, receivers = PlanSender(), [PlanReceiver(rank) for rank in range(3)]
    first = decode_plan(7)
    for rank, message in sender.messages(first).items():
        received(receivers[rank], message)
    for plan_id, tokens in ((8, Literals((55,))), (9, SampledBy(8)), (10, Literals((56,)))):
        plan = advance(first, plan_id, [tokens])
        assert [(run.position, run.tokens) for run in plan.query_runs] == [(9 + plan_id, tokens)]
        messages = sender.messages(plan)
        assert max(map(len, messages.values())) < 80
        for rank, message in messages.items():
            got = received(receivers[rank], message)
            own = [run if run.compute_rank == rank else structs.replace(run, tokens=None) for run in plan.query_runs]
            assert list(got.query_runs) == own
            samples = plan.samples if rank == 0 else ()
            assert (got.plan_id, got.phase, got.samples) == (plan_id, Phase.DECODE, samples)
            assert (got.ranks, got.groups, got.table_deltas, got.released) == (plan.ranks, plan.groups, (), ())
        first = plan


def test_a_rank_that_ran_another_plan_meanwhile_gets_the_whole_plan():
    sender, first = PlanSender(), decode_plan(7)
    sender.messages(first)
    sender.messages(mixed_plan(8))
    plan = advance(first, 9, [Literals((55,))])
    for rank, message in sender.messages(plan).items():
        assert isinstance(decode_to_worker(message), RunPlan)
        assert received(PlanReceiver(rank), message).query_runs[0].position == 17


def test_plans_of_two_models_go_on_each_from_its_own():
    sender, receiver, first = PlanSender(), PlanReceiver(1), {True: FIRST_DRAFT_PLAN + 3, False: 7}
    last = {is_draft: decode_plan(plan_id) for is_draft, plan_id in first.items()}
    for plan in last.values():
        received(receiver, sender.messages(plan)[1])
    for is_draft in (False, True, True, False):
        last[is_draft] = plan = advance(last[is_draft], last[is_draft].plan_id + 1, [Literals((55,))])
        message = sender.messages(plan)[1]
        assert isinstance(decode_to_worker(message), RunNext)
        got = received(receiver, message)
        assert (got.plan_id, is_draft_plan(got.plan_id)) == (plan.plan_id, is_draft)
        assert got.query_runs[0].position == plan.query_runs[0].position


def test_a_rank_refuses_to_go_on_from_a_plan_that_was_not_its_last():
    sender, receiver = PlanSender(), PlanReceiver(0)
    first = decode_plan(7)
    received(receiver, sender.messages(first)[0])
    message = sender.messages(advance(first, 8, [Literals((55,))]))[0]
    with pytest.raises(AssertionError, match="a plan follows none"):
        received(PlanReceiver(0), message)
    received(receiver, message)
    with pytest.raises(AssertionError, match="plan 8 follows 7"):
        received(receiver, message)


# -- which plans go on -------------------------------------------------------------------------------------------------


def decodes_of(windows, num_tokens: int = 12, **options):
    """Decode plans of one striped request, one after the other."""
    config = make_config(2, placement="striped", stripe_size=4, strategy="pass_q", **options)
    scheduler = make_scheduler(make_model(*windows), config, 200)
    ranks = FakeRanks(scheduler, random.Random(0))
    scheduler.add_request([5] * 13, SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=0))
    while scheduler.has_requests:
        plan = scheduler.schedule()
        ranks.submit(plan)
        ranks.complete(plan)
    return [plan for plan in ranks.plans if plan.phase is Phase.DECODE]


def test_decodes_go_on_within_a_page_and_are_planned_anew_where_a_page_begins():
    plans = decodes_of([None])
    for before, plan in pairwise(plans):
        (run,) = plan.query_runs
        begins_page = run.position % 4 == 0
        assert (plan.follows is None) == begins_page
        assert bool(plan.table_deltas) == begins_page
        if not begins_page:
            assert plan.follows == before.plan_id
            assert plan.groups == before.groups


def test_what_moves_behind_a_window_is_counted_again_for_every_token():
    plans = decodes_of([None, 7])
    changed = [b for a, b in pairwise(plans) if b.groups[1] != a.groups[1]]
    assert changed, "the window leaves ranks and reaches others"
    assert all(plan.follows is None for plan in changed)
    assert any(plan.follows is not None for plan in plans)
