"""Writes a plan once it is decided who takes part: tokens, page tables, strategies, rows to sample.

Holds the costs that strategies are chosen by. Must not know queues, turns or budgets, nor torch.
Read next: `longspan.costmodel.choose`, which picks strategies; `longspan.plan.types`, what is written.
"""

from collections.abc import Iterable, Sequence

from longspan.config import EngineConfig
from longspan.costmodel.choose import BLOCK_LEN, plan_group
from longspan.costmodel.explain import Choices
from longspan.costmodel.parameters import Costs, costs_by_bytes
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
from longspan.scheduler.memory import KVMemory
from longspan.scheduler.request import Request
from longspan.scheduler.sampling import sample_row
from longspan.types import ModelSpec, Phase, Strategy


class PlanWriter:
    """Turns requests and the positions that they are taken to into plans."""

    def __init__(self, model: ModelSpec, config: EngineConfig, memory: KVMemory) -> None:
        """Args: `memory` allocates the pages."""
        self._model, self._config, self._memory = model, config, memory
        self.costs = costs_by_bytes(config.known_nodes or (0,) * config.context_parallel_size)
        """What the ranks and links can do; until they have measured it, every link is the same."""
        self.choices = Choices()
        """Which strategies were chosen so far, and why."""
        last_layer = model.num_layers - 1
        (self._last_group_idx,) = [i for i, group in enumerate(model.kv_groups) if last_layer in group.layers]

    def use_costs(self, costs: Costs) -> None:
        """Choose strategies by these numbers from now on."""
        self.costs = costs

    def write(
        self,
        plan_id: int,
        ranks: set[int],
        chosen: Sequence[tuple[Request, int]],
        movers: Phase | None,
        released: set[int],
        behind: Plan | None,
    ) -> Plan:
        """The plan that takes every chosen request to its end.

        Args:
            plan_id: its number.
            ranks: that run it.
            chosen: (request, end).
            movers: the phase of requests with keys on several ranks.
            released: requests that these ranks may forget.
            behind: the plan that samples the tokens; None if they are known.
        """
        phase = Phase.PREFILL if any(request.phase is Phase.PREFILL for request, _ in chosen) else Phase.DECODE
        sampled = None if behind is None else SampledBy(behind.plan_id)
        query_runs: list[QueryRun] = []
        copies: list[PageCopy] = []
        deltas: list[TableDelta] = []
        samples: list[SampleRow] = []
        scores: list[ScoreRun] = []
        for request, end in chosen:
            start = request.num_planned
            copies += request.copies
            deltas += self._deltas(request, end, ranks)
            for rank, first, last in request.tables[0].owners(start, end):
                for position in range(first, last, BLOCK_LEN):  # no run is longer than a block of queries
                    stop = min(last, position + BLOCK_LEN)
                    tokens = sampled or Literals(tuple(request.token_ids[position:stop]))
                    query_runs.append(QueryRun(request.request_id, position, stop - position, rank, tokens))
            samples += self._samples(request, end)
            scores += self._scores(request, start, end)
            request.num_planned, request.last_plan_id = end, plan_id
        forced = self._config.forced_decode_strategy if movers is Phase.DECODE else self._config.forced_strategy
        groups: list[GroupStep] = []
        for i, group in enumerate(self._model.kv_groups):
            tables = {r.request_id: r.tables[i] for r, _ in chosen}
            step = plan_group(query_runs, tables, group, self.costs, forced=forced)
            self.choices.note(movers or phase, i, step, tables, group, self.costs, is_forced=forced is not None)
            groups.append(step)
        moves_queries = any(step.strategy in (Strategy.PASS_Q, Strategy.TREE) for step in groups)
        for request, _ in chosen:
            request.moves_queries = moves_queries and len(request.page_ranks) > 1
        last_layer: GroupStep | None = None
        read = read_runs(query_runs, samples, scores) if phase is Phase.PREFILL else query_runs  # all rows of a decode
        if read is not query_runs and _num_tokens(read) < _num_tokens(query_runs):
            i = self._last_group_idx
            tables = {r.request_id: r.tables[i] for r, _ in chosen}
            last_layer = plan_group(read, tables, self._model.kv_groups[i], self.costs, forced=forced)
        return Plan(
            plan_id=plan_id,
            phase=phase,
            ranks=tuple(sorted(ranks)),
            query_runs=tuple(query_runs),
            table_deltas=tuple(deltas),
            groups=tuple(groups),
            samples=tuple(samples),
            scores=tuple(scores),
            page_copies=tuple(copies),
            released=tuple(sorted(released)),
            last_layer=last_layer,
        )

    def _deltas(self, request: Request, end: int, ranks: set[int]) -> list[TableDelta]:
        """Allocate what a step needs, and say what the ranks must learn of the page tables."""
        size = self._config.page_size
        replace = not ranks <= request.informed_ranks
        if not replace:
            for table in request.tables:
                if table.num_pages * size < end:
                    break
            else:
                return []
        added = self._memory.grow(request, end)
        if replace:
            request.informed_ranks |= ranks
            request.involved_ranks |= ranks
            added = [list(table.runs) for table in request.tables]
        deltas: list[TableDelta] = []
        for group_idx, (table, runs) in enumerate(zip(request.tables, added, strict=True)):
            if runs or replace:
                freed_before = table.runs[0].page_idx if table.runs else table.num_pages
                deltas.append(TableDelta(request.request_id, group_idx, replace, tuple(runs), freed_before))
                request.informed_ranks &= ranks  # the others miss this one
        assert all(table.num_pages * size >= end for table in request.tables)
        return deltas

    def _samples(self, request: Request, end: int) -> list[SampleRow]:
        """The row to sample from, if this step computes the request's last token."""
        if end < len(request.token_ids):
            return []
        return [sample_row(request, end - 1)]

    def _scores(self, request: Request, start: int, end: int) -> list[ScoreRun]:
        """Prompt rows whose next token is a prompt token, if prompt_logprobs were asked for and are not known yet."""
        num_logprobs = request.params.prompt_logprobs
        if num_logprobs is None:
            return []
        start, end = max(start, len(request.prompt_logprobs)), min(end, request.prompt_len - 1)
        if start >= end:
            return []
        return [
            ScoreRun(request.request_id, first, tuple(request.token_ids[first + 1 : last + 1]), num_logprobs)
            for _, first, last in request.tables[0].owners(start, end)
        ]


def _num_tokens(runs: Iterable[QueryRun]) -> int:
    return sum(run.num_tokens for run in runs)
