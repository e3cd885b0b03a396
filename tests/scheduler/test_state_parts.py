"""The driver says in every plan in how many parts states are handed on."""

import msgspec

from longspan.costmodel.parameters import Costs, KernelRates, Link, Topology, costs_by_bytes
from longspan.kv.state_layout import StateComponent, StateGroup
from longspan.plan.types import GroupStep, Plan, QueryRun, StatePlace, StateStep
from longspan.scheduler.state_parts import StateParts
from longspan.types import Phase, Strategy

GROUP = StateGroup((0, 1), (StateComponent("recurrent", 0, (4, 8, 8), "float32", 4),))
FAR = Link(1.0, 1e9)


def costs_of(link, flops_per_s=1e6):
    return Costs(Topology((0, 0), link, link), KernelRates(1e9, 1e9, 1e9, ((1, flops_per_s),), 0.0, exchange_s=1e-5))


def plan_of(*ranks_by_request):
    runs = [
        QueryRun(request_id, 64 * i, 64, rank, None)
        for request_id, ranks in enumerate(ranks_by_request)
        for i, rank in enumerate(ranks)
    ]
    return Plan(
        plan_id=0,
        phase=Phase.PREFILL,
        ranks=(0, 1),
        num_tokens=(0, 0),
        query_runs=tuple(runs),
        table_deltas=(),
        groups=(GroupStep(Strategy.LOCAL),),
        samples=(),
        states=tuple(StateStep(i, None, StatePlace(ranks[-1], i)) for i, ranks in enumerate(ranks_by_request)),
    )


def test_states_that_change_ranks_have_parts_and_others_none():
    parts = StateParts([GROUP], None)
    plan = parts.choose(plan_of((0, 1), (1, 1), (1, 0)), costs_of(Link(1e-6, 1e9)))
    assert [step.num_parts for step in plan.states] == [4, 1, 4]
    (note,) = parts.all
    assert (note.num_parts, note.is_forced, note.num_tokens, note.num_ranks, note.num_steps) == (4, False, 128, 2, 2)
    assert note.predicted_s < note.whole_s


def test_states_are_handed_on_whole_where_messages_cost_more():
    parts, plan = StateParts([GROUP], None), plan_of((0, 1))
    assert parts.choose(plan, costs_of(FAR, flops_per_s=1e12)) is plan
    assert [(note.num_parts, note.predicted_s == note.whole_s) for note in parts.all] == [(1, True)]


def test_a_number_can_be_forced_and_notes_go_on_with_other_ranks():
    parts, plan = StateParts([GROUP], 3), plan_of((0, 1), (0, 0))
    for _ in range(2):
        assert [step.num_parts for step in parts.choose(plan, costs_of(FAR)).states] == [3, 1]
    other = StateParts([GROUP], 3)
    other.take_over(parts)
    other.choose(msgspec.structs.replace(plan, plan_id=1), costs_of(FAR))
    assert [(note.num_parts, note.is_forced, note.num_steps) for note in other.all] == [(3, True, 3)]


def test_states_are_handed_on_whole_and_no_time_is_told_where_nothing_was_measured():
    parts, plan = StateParts([GROUP], None), plan_of((0, 1, 0))
    assert parts.choose(plan, costs_by_bytes((0, 0))) is plan
    assert [(note.num_parts, note.predicted_s, note.whole_s) for note in parts.all] == [(1, None, None)]
