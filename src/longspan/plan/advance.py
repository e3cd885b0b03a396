"""The plan of a decode step that goes on from another one: the same, one token further.

Holds one pure function, which the driver calls to make such a plan and every rank calls to know it, so that little more
than the tokens is sent. Must not know pages: whoever calls it knows that no page table has changed.
Read next: `longspan.scheduler.plan_writer`, which knows when; `longspan.group.plans`, which sends the tokens.
"""

from collections.abc import Sequence

from msgspec import structs

from longspan.plan.types import GraphStep, Plan, QueryRun, StateStep, Tokens


def advance(plan: Plan, plan_id: int, tokens: Sequence[Tokens | None], graph: GraphStep | None = None) -> Plan:
    """Take every request of a decode step one token further.

    Args:
        plan: a step of one token per request, with pages for one more on the same ranks.
        plan_id: number of the new plan.
        tokens: input token of every query run, in plan order; None where a rank does not know it.
        graph: how the step runs in fixed shape; None: in any shape, or not yet decided.
    """
    runs = [
        QueryRun(run.request_id, run.position + 1, 1, run.compute_rank, token, run.rope_len, run.adapter_id)
        for run, token in zip(plan.query_runs, tokens, strict=True)
    ]
    return Plan(
        plan_id=plan_id,
        phase=plan.phase,
        ranks=plan.ranks,
        num_tokens=plan.num_tokens,
        query_runs=tuple(runs),
        table_deltas=(),
        groups=plan.groups,
        samples=tuple([structs.replace(row, position=row.position + 1) for row in plan.samples]),
        states=tuple([StateStep(state.request_id, state.target, state.target) for state in plan.states]),
        packed=plan.packed,
        follows=plan.plan_id,
        graph=graph,
    )
