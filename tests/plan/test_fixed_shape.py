"""Which decode steps have a fixed shape, and that the shape depends on the plan alone."""

import pytest

from longspan.plan.build import count_tokens
from longspan.plan.fixed_shape import BUCKETS, FixedShape, fixed_shape
from longspan.plan.types import GroupStep, Literals, Plan, QueryRun, ScoreRun
from longspan.types import Phase, Strategy


def plan_of(runs, strategies=(Strategy.LOCAL,), phase=Phase.DECODE, **options):
    groups = tuple(GroupStep(strategy, ((0,), (1,), (2,))) for strategy in strategies)
    return Plan(1, phase, (0, 1, 2), count_tokens(range(3), runs), tuple(runs), (), groups, (), **options)


def run_of(request_id, rank, num_tokens=1):
    return QueryRun(request_id, 5, num_tokens, rank, Literals((1,) * num_tokens))


def test_a_shape_depends_on_the_plan_alone():
    runs = [run_of(0, 1), run_of(1, 1), run_of(2, 1), run_of(3, 2)]
    assert fixed_shape(plan_of(runs)) == FixedShape(4, (1, 2), ((),))
    assert fixed_shape(plan_of(runs, (Strategy.LOCAL, Strategy.PASS_Q))) == FixedShape(4, (1, 2), ((), (0, 1, 2)))


@pytest.mark.parametrize(
    "plan",
    [
        plan_of([run_of(0, 1, 2)]),
        plan_of([run_of(0, 1)], phase=Phase.PREFILL),
        plan_of([run_of(0, 1)], (Strategy.PASS_KV,)),
        plan_of([run_of(0, 1)], (Strategy.PASS_Q, Strategy.GATHER_KV)),
        plan_of([run_of(0, 1)], (Strategy.TREE,)),  # over several nodes
        plan_of([run_of(i, 1) for i in range(BUCKETS[-1] + 1)]),
        plan_of([run_of(0, 1)], scores=(ScoreRun(0, 5, (1,), 1),)),
        plan_of([]),
    ],
)
def test_other_steps_are_not_fixed(plan):
    assert fixed_shape(plan) is None
