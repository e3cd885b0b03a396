"""Writes a plan once it is decided who takes part: tokens, page tables, strategies, rows to sample.

Holds the costs that strategies are chosen by. Must not know queues, turns or budgets, nor torch.
Read next: `longspan.plan.build`, which puts a plan together; `longspan.costmodel.choose`, which picks strategies;
`longspan.scheduler.delivery`, which knows what ranks were told.

Note [Steps that go on]
    A decode step mostly repeats the last one of the same requests, one token further, on the same pages. Then page
    tables, strategies and what moves are equal, and a plan is a copy with new tokens and positions
    (`longspan.plan.advance`), which ranks can make themselves. It holds as long as every token lies in the page of the
    token before: strategies are chosen anew when a request gets a page, not for every token. Where something moves in a
    group with a window, its rows are counted again: the window's far end may have left keys, or a rank.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from functools import partial

from msgspec import structs

from longspan.config import EngineConfig
from longspan.costmodel.choose import plan_group
from longspan.costmodel.explain import StrategyChoices
from longspan.costmodel.parameters import Costs, costs_by_bytes
from longspan.plan.advance import advance
from longspan.plan.build import RequestStep, build_plan, score_runs
from longspan.plan.group_step import BLOCK_LEN, GPU_BLOCK_LEN
from longspan.plan.types import GroupStep, Literals, PageCopy, Plan, SampledBy, ScoreRun, StateStep, TableDelta, Tokens
from longspan.scheduler.allocation import Allocation
from longspan.scheduler.delivery import Step
from longspan.scheduler.memory import KVMemory
from longspan.scheduler.request import Request
from longspan.scheduler.sampling import sample_rows
from longspan.scheduler.state_parts import StateParts
from longspan.scheduler.step_graphs import StepGraphs
from longspan.sharding.pages import PageTable
from longspan.types import ModelSpec, Phase, Strategy

MOVE_QUERIES = (Strategy.PASS_Q, Strategy.TREE)
"""Strategies that bring queries to keys."""


class PlanWriter:
    """Turns requests and the positions that they are taken to into plans."""

    def __init__(self, model: ModelSpec, config: EngineConfig, memory: KVMemory, graphs: StepGraphs) -> None:
        """Args: `memory` allocates the pages; `graphs` decides what is captured."""
        self._model, self._config, self._memory, self._graphs = model, config, memory, graphs
        self._block_len = GPU_BLOCK_LEN if config.device == "cuda" else BLOCK_LEN
        self._sliding = [i for i, group in enumerate(model.kv_groups) if group.spec.reach is not None]
        self.costs = costs_by_bytes(config.known_nodes or (0,) * config.context_parallel_size)
        """What the ranks and links can do; until they have measured it, every link is the same."""
        self.choices = StrategyChoices()
        """Which strategies were chosen so far, and why."""
        self.state_parts = StateParts(model.state_groups, config.forced_state_parts)
        """In how many parts states were handed on so far, and why."""

    def use_costs(self, costs: Costs) -> None:
        """Choose strategies by these numbers from now on."""
        self.costs = costs

    def take_over(self, other: "PlanWriter") -> None:
        """Go on with the notes of a writer for other ranks, which is not to be used any more."""
        self.choices = other.choices
        self.state_parts.take_over(other.state_parts)

    def write(
        self,
        plan_id: int,
        ranks: AbstractSet[int],
        chosen: Sequence[tuple[Request, int]],
        movers: Phase | None,
        released: set[int],
        behind: Plan | None,
    ) -> Plan:
        """Write the plan that takes every chosen request to its end, and allocate its pages.

        Args:
            plan_id: its number.
            ranks: that run it.
            chosen: (request, end).
            movers: the phase of requests with keys on several ranks.
            released: requests that these ranks may forget.
            behind: the plan that samples the tokens; None if they are known.
        """
        sampled = None if behind is None else SampledBy(behind.plan_id)
        plan = None if released else self._next(plan_id, ranks, chosen, sampled)
        if plan is None:
            chosen = sorted(chosen, key=_place_in_plan)
            plan = self._new(plan_id, ranks, chosen, movers, released, sampled)
        else:
            self.choices.count_again(movers or plan.phase, plan.groups)
        moves_queries = any(step.strategy in MOVE_QUERIES for step in plan.groups)
        goes_on = plan.phase is Phase.DECODE and not plan.has_drafts
        step = Step(plan, [request for request, _ in chosen]) if goes_on else None
        for request, end in chosen:
            request.note_planned(end)
            is_moved = moves_queries and request.allocation is not None and len(request.allocation.page_ranks) > 1
            request.delivery.note_plan(plan_id, moves_queries=is_moved, step=step)
        return plan

    def _next(
        self, plan_id: int, ranks: AbstractSet[int], chosen: Sequence[tuple[Request, int]], sampled: SampledBy | None
    ) -> Plan | None:
        """The plan of a step that goes on from the last one of its requests; None if more than tokens is new.

        See Note [Steps that go on].
        """
        last_step = chosen[0][0].delivery.last_step
        if last_step is None or len(chosen) != len(last_step.requests):
            return None
        last, size, states = last_step.plan, self._config.page_size, self._memory.states
        tokens: list[Tokens] = []
        for (request, end), run in zip(chosen, last.query_runs, strict=True):
            position = run.position + 1
            goes_on = request.delivery.last_step is last_step and request.request_id == run.request_id
            if not goes_on or end != position + 1 or not position % size or request.next_row is None:
                return None
            if states is not None and states.keeps_at(request, end):
                return None
            tokens.append(sampled or Literals((request.token_ids[position],)))
        if ranks != set(last.ranks):
            return None
        slides = any(last.groups[i].nodes for i in self._sliding)
        plan: Plan | None = advance(last, plan_id, tokens)
        if slides and plan is not None:
            plan = self._slid(plan, chosen)
        if plan is None or last.graph is None:
            return plan
        return structs.replace(plan, graph=self._graphs.step(plan, ()))

    def _slid(self, plan: Plan, chosen: Sequence[tuple[Request, int]]) -> Plan | None:
        """The plan with what moves in groups with windows or chunks counted again, by the strategies that it has; None
        if nothing moves any more in one of them."""
        groups: list[GroupStep] = []
        for i, (step, group) in enumerate(zip(plan.groups, self._model.kv_groups, strict=True)):
            if step.nodes and group.spec.reach is not None:
                tables = {r.request_id: r.allocation.tables[i] for r, _ in chosen if r.allocation is not None}
                step = plan_group(
                    plan.query_runs, tables, group, self.costs, forced=step.strategy, block_len=self._block_len
                )
                if not step.nodes:
                    return None
            groups.append(step)
        if tuple(groups) == plan.groups:
            return plan
        return structs.replace(plan, groups=tuple(groups), follows=None)

    def _new(
        self,
        plan_id: int,
        ranks: AbstractSet[int],
        chosen: Sequence[tuple[Request, int]],
        movers: Phase | None,
        released: set[int],
        sampled: SampledBy | None,
    ) -> Plan:
        """Write a plan with strategies chosen, and page tables brought up to date. Arguments: `write`."""
        copies: list[PageCopy] = []
        deltas: list[TableDelta] = []
        steps: list[RequestStep] = []
        states: list[StateStep] = []
        groups = self._model.kv_groups
        tables: list[dict[int, PageTable]] = [{} for _ in groups]
        for request, end in chosen:
            allocation = request.allocation
            assert allocation is not None, "a request without pages is computed"
            copies += allocation.copies
            is_packed = _is_packed(request)
            deltas += self._deltas(request, allocation, end, allocation.ranks if is_packed else ranks)
            steps.append(_request_step(request, allocation, end, sampled, is_packed=is_packed))
            if self._memory.states is not None:
                states.append(self._memory.states.step(request, request.num_planned, end))
            for of_group, table in zip(tables, allocation.tables, strict=True):
                of_group[request.request_id] = table
        forced = self._config.forced_decode_strategy if movers is Phase.DECODE else self._config.forced_strategy
        choose = partial(plan_group, costs=self.costs, forced=forced, block_len=self._block_len)
        plan = build_plan(
            plan_id,
            ranks,
            steps,
            tables,
            groups,
            choose,
            table_deltas=deltas,
            page_copies=copies,
            states=states,
            is_last_read_alone=self._model.last_group is not None,
            released=released,
            block_len=self._block_len,
        )
        if states:
            plan = self.state_parts.choose(plan, self.costs)
        if (graph := self._graphs.step(plan, tables)) is not None:
            plan = structs.replace(plan, graph=graph)
        for i, step in enumerate(plan.groups):
            self.choices.note(
                movers or plan.phase,
                i,
                step,
                plan.query_runs,
                tables[i],
                groups[i],
                self.costs,
                is_forced=forced is not None,
                block_len=self._block_len,
            )
        return plan

    def _deltas(self, request: Request, allocation: Allocation, end: int, ranks: AbstractSet[int]) -> list[TableDelta]:
        """Allocate what a step needs, and say what the ranks must learn of the page tables."""
        size = self._config.page_size
        if ranks <= request.delivery.informed_ranks:
            for table in allocation.tables:
                if table.num_pages * size < end:
                    break
            else:
                return []
        added = self._memory.grow(request, end)
        assert all(table.num_pages * size >= end for table in allocation.tables)
        return request.delivery.tell(request.request_id, allocation.tables, added, ranks)


def _is_packed(request: Request) -> bool:
    """Whether a request concerns one rank alone."""
    allocation = request.allocation
    return allocation is not None and len(allocation.ranks) == 1 and allocation.source_ranks <= allocation.ranks


def _place_in_plan(entry: tuple[Request, int]) -> tuple[bool, int]:
    """Key that puts a plan's requests in order: packed ones last (see `Plan.packed`), and rows of one adapter side by
    side, as they are computed together."""
    request, _ = entry
    return _is_packed(request), -1 if request.adapter is None else request.adapter.adapter_id


def _request_step(
    request: Request, allocation: Allocation, end: int, sampled: SampledBy | None, *, is_packed: bool
) -> RequestStep:
    """What a step computes of a request that has its pages already."""
    start, num_known, drafts = request.num_planned, len(request.token_ids), request.drafts
    tokens = [*request.token_ids[start:], *(draft.token_id for draft in drafts)] if drafts else request.token_ids
    return RequestStep(
        request_id=request.request_id,
        start=start,
        end=end,
        num_known=num_known,
        tokens=sampled or tokens,
        num_skipped=0 if drafts else start,
        samples=() if end < num_known else sample_rows(request, end - 1 - len(drafts)),
        scores=() if request.params.prompt_logprobs is None else _scores(request, allocation, start, end),
        rope_len=request.rope_len,
        adapter_id=None if request.adapter is None else request.adapter.adapter_id,
        is_packed=is_packed,
    )


def _scores(request: Request, allocation: Allocation, start: int, end: int) -> Sequence[ScoreRun]:
    """Prompt rows whose next token is a prompt token, but for those that are scored already."""
    num_logprobs = request.params.prompt_logprobs
    assert num_logprobs is not None
    start, end = max(start, len(request.prompt_logprobs)), min(end, request.prompt_len - 1)
    return score_runs(request.request_id, allocation.tables[0], request.token_ids, start, end, num_logprobs)
