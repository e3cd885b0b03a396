"""Runs plans on one rank: model, page pools and communicator.

Holds the mirrored page tables and the step. Must not know how plans are made, how they arrive, or what a request's
text is.
Read next: `longspan.cp.attend`; `longspan.worker.process`, the process around it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from longspan.attention.base import AttentionBackend
from longspan.comm.base import Communicator
from longspan.comm.recording import RecordingCommunicator
from longspan.cp.attend import StepAttention
from longspan.errors import LongspanError
from longspan.group.heartbeat import Progress
from longspan.kv.pool import PagePool
from longspan.models.hook import AttentionCall
from longspan.models.last_layer import READ_ROWS
from longspan.plan.types import (
    FailedRow,
    Literals,
    Plan,
    QueryRun,
    RankResult,
    SampledToken,
    SampleRow,
    ScoredRun,
    ScoreRun,
    TableDelta,
)
from longspan.sharding.pages import PageTable
from longspan.types import ModelSpec
from longspan.worker.fault import Injector
from longspan.worker.sampler import sample_all, token_logprobs

if TYPE_CHECKING:
    from longspan.worker.graphs import FixedSteps

GraphMode = Literal["never", "launched", "captured"]
"""Decode steps of any shape; of fixed shapes, launched kernel by kernel; or of fixed shapes, as CUDA graphs."""


class _Answer(NamedTuple):
    """What came of a rank's rows that need logits."""

    sampled: tuple[SampledToken, ...] = ()
    scored: tuple[ScoredRun, ...] = ()
    failed: tuple[FailedRow, ...] = ()


class _Rows(NamedTuple):
    """A rank's packed rows, and which of them need logits."""

    token_ids: list[int]
    positions: list[int]
    samples: list[SampleRow]
    scores: list[ScoreRun]
    read: list[int]
    """The rows of `samples`, then those of `scores`."""


class ModelRunner:
    """One rank."""

    def __init__(
        self,
        model: torch.nn.Module,
        spec: ModelSpec,
        *,
        num_pages: Sequence[int],
        page_size: int,
        comm: Communicator,
        backend: AttentionBackend,
        dense_threads: Callable[[Plan, int], int] | None = None,
        graphs: GraphMode = "never",
        progress: Progress | None = None,
        faults: Injector | None = None,
    ) -> None:
        """Allocate the pools.

        Args:
            model: loaded with the `longspan` attention function.
            spec: the model's facts.
            num_pages: per KV group.
            page_size: tokens per page.
            comm: this rank's communicator.
            backend: this rank's attention kernels.
            dense_threads: (plan, rank) to threads for all but attention and exchanges; None: as everywhere.
            graphs: whether decode steps have fixed shapes, and are captured as CUDA graphs.
            progress: counts on while this process gets further; None where nothing reads it.
            faults: what is to go wrong here, for tests; None is nothing.
        """
        self.model: Any = model
        self._dense_threads = dense_threads
        self.spec, self.backend = spec, backend
        self.comm = RecordingCommunicator(comm)
        self.rank = comm.rank
        self._page_size = page_size
        self.device = next(model.parameters()).device
        self._pools = [
            PagePool(group, pages, page_size, self.device)
            for group, pages in zip(spec.kv_groups, num_pages, strict=True)
        ]
        self._tables: list[dict[int, PageTable]] = [{} for _ in spec.kv_groups]  # per KV group: request to table
        self._fixed = None if graphs == "never" else self._fixed_steps(graphs)
        # A mask with four dimensions is taken as it is; without one, Transformers looks for packed rows in every step.
        self._no_mask = torch.empty(1, 1, 0, 0, device=self.device)
        self._sampled_by = -1  # the last plan that sampled here
        self._sampled: dict[int, int] = {}  # request to its token of that plan
        self._progress, self._faults = progress or Progress(), faults or Injector(None)
        self._num_plans = 0
        self._tokens_computed = 0
        self._busy_s = 0.0
        self._strategy_bytes: Counter[str] = Counter()

    def _fixed_steps(self, graphs: GraphMode) -> FixedSteps:
        from longspan.worker.graphs import FixedSteps  # imports Triton

        can_capture = graphs == "captured"
        return FixedSteps(self.model, self.spec, self._pools, self.comm, begin=self._begin, can_capture=can_capture)

    @torch.inference_mode()
    def run(self, plan: Plan) -> RankResult:
        """Run one plan.

        Collective: every rank that the plan names runs it, in the order in which plans were submitted to the rank.

        Raises:
            CommunicationError: a peer did not answer.
            LongspanError: the model's output is not a number, or the plan asks for something unknown.
        """
        started = time.perf_counter()
        self._progress.count += 1
        try:
            answer = self._run(plan)
            if self.device.type == "cuda":  # what a plan wrote is there when its answer says so, on every rank
                torch.cuda.current_stream(self.device).synchronize()
        finally:
            step_s = time.perf_counter() - started
            self._busy_s += step_s
            self._num_plans += 1
        return RankResult(
            plan_id=plan.plan_id,
            rank=self.rank,
            sampled=answer.sampled,
            scored=answer.scored,
            failed=answer.failed,
            tokens_computed=self._tokens_computed,
            bytes_sent=self.comm.bytes_sent,
            step_s=step_s,
            busy_s=self._busy_s,
            strategy_bytes=dict(self._strategy_bytes),
        )

    def _run(self, plan: Plan) -> _Answer:
        assert self.rank in plan.ranks, f"plan {plan.plan_id} is for ranks {plan.ranks}, this is rank {self.rank}"
        for request_id in plan.released:
            for tables in self._tables:
                tables.pop(request_id, None)
        self._copy_pages(plan)
        for delta in plan.table_deltas:
            self._apply(delta)
        rows = self._rows(plan)
        if self._fixed is not None and (shape := self._fixed.shape_of(plan)) is not None:
            fixed = self._fixed.run(shape, plan, self._tables, rows.token_ids)
            self._strategy_bytes.update(self._fixed.strategy_bytes(shape, plan))
            return _Answer() if fixed is None else self._read(plan, rows, _some(fixed, rows.read))
        attention = StepAttention(plan, self._tables, self._pools, self.comm, self.backend, self.spec.layer_params)
        if rows.token_ids:
            answer = self._read(plan, rows, self._compute(plan, rows, attention))
        else:
            for layer in range(self.spec.num_layers):
                self._begin(layer)
                attention.join(layer)
            answer = _Answer()
        self._strategy_bytes.update(attention.bytes_sent)
        return answer

    def _begin(self, layer: int) -> None:
        self._progress.count += 1
        self._faults.before_layer(self._num_plans, layer)

    def _copy_pages(self, plan: Plan) -> None:
        """Copy pages within this rank, and exchange those that go to other ranks or come from them."""
        sends: list[tuple[int, Tensor]] = []
        recvs: list[tuple[int, Tensor]] = []
        arriving: list[tuple[Tensor, Tensor]] = []  # (received, where it belongs)
        for copy in plan.page_copies:
            source, target, pool = copy.source, copy.target, self._pools[copy.group_idx]
            if source.rank == target.rank == self.rank:
                pool.copy_pages_(source.slot, target.slot, source.num_pages)
            elif source.rank == self.rank:
                sends += [(target.rank, rows.contiguous()) for rows in pool.rows(source.slot, source.num_pages)]
            elif target.rank == self.rank:
                for rows in pool.rows(target.slot, target.num_pages):
                    received = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
                    recvs.append((source.rank, received))
                    arriving.append((received, rows))
        if sends or recvs:
            self.comm.exchange(sends, recvs).wait()
        for received, rows in arriving:
            rows.copy_(received)

    def _apply(self, delta: TableDelta) -> None:
        tables = self._tables[delta.group_idx]
        if delta.replace or delta.request_id not in tables:
            tables[delta.request_id] = PageTable(self._page_size)
        table = tables[delta.request_id]
        table.free_before(delta.freed_before)
        table.apply(list(delta.added))

    def _rows(self, plan: Plan) -> _Rows:
        """This rank's share of a plan."""
        runs = [run for run in plan.query_runs if run.compute_rank == self.rank]
        token_ids: list[int] = []
        positions: list[int] = []
        row_of: dict[tuple[int, int], int] = {}  # (request, position) to packed row
        for run in runs:
            for i in range(run.num_tokens):
                row_of[run.request_id, run.position + i] = len(positions) + i
            token_ids += self._tokens(plan, run)
            positions += range(run.position, run.end)
        samples = [row for row in plan.samples if (row.request_id, row.position) in row_of]
        scores = [run for run in plan.scores if (run.request_id, run.position) in row_of]
        rows = [row_of[row.request_id, row.position] for row in samples]
        for score in scores:
            rows += [row_of[score.request_id, score.position + i] for i in range(len(score.targets))]
        return _Rows(token_ids, positions, samples, scores, rows)

    def _compute(self, plan: Plan, rows: _Rows, attention: StepAttention) -> Tensor:
        """[len(rows.read), vocab] logits, by a forward pass over this rank's tokens."""
        own = torch.get_num_threads()
        dense = own if self._dense_threads is None else self._dense_threads(plan, self.rank)
        torch.set_num_threads(dense)
        try:
            return self._forward(rows.token_ids, rows.positions, rows.read, attention, own)
        finally:
            torch.set_num_threads(own)

    def _read(self, plan: Plan, rows: _Rows, logits: Tensor) -> _Answer:
        """Sampling and scoring. Args: `logits`: [len(rows.read), vocab]."""
        samples, scores = rows.samples, rows.scores
        self._tokens_computed += len(rows.token_ids)
        sampled: list[SampledToken] = []
        failed: list[FailedRow] = []
        token_of = sample_all(logits[: len(samples)], samples)
        self._sampled_by, self._sampled = plan.plan_id, {}
        for i, (row, token_id) in enumerate(zip(samples, token_of, strict=True)):
            if isinstance(token_id, LongspanError):
                failed.append(FailedRow(row.request_id, str(token_id)))
                continue
            self._sampled[row.request_id] = token_id
            logprobs = None
            if row.num_logprobs is not None:
                (logprobs,) = token_logprobs(logits[i : i + 1], self._ids([token_id]), row.num_logprobs)
            sampled.append(SampledToken(row.request_id, row.position + 1, token_id, logprobs))
        scored: list[ScoredRun] = []
        first = len(samples)
        for score in scores:
            count = len(score.targets)
            found = token_logprobs(logits[first : first + count], self._ids(score.targets), score.num_logprobs)
            scored.append(ScoredRun(score.request_id, score.position + 1, tuple(found)))
            first += count
        return _Answer(tuple(sampled), tuple(scored), tuple(failed))

    def _tokens(self, plan: Plan, run: QueryRun) -> Sequence[int]:
        """The input tokens of a run."""
        if isinstance(run.tokens, Literals):
            return run.tokens.token_ids
        if run.tokens.plan_id != self._sampled_by or run.num_tokens != 1:
            raise LongspanError(
                f"plan {plan.plan_id}: needs {run.num_tokens} tokens of plan {run.tokens.plan_id}, rank {self.rank} "
                f"has sampled for plan {self._sampled_by} last"
            )
        return [self._sampled.get(run.request_id, 0)]  # whose row could not be sampled has ended: nobody reads the rest

    def _ids(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def _forward(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        rows: Sequence[int],
        attention: StepAttention,
        attention_threads: int,
    ) -> Tensor:
        """[len(rows), vocab] logits of some packed rows."""
        params, dense_threads = self.spec.layer_params, torch.get_num_threads()

        def attend(call: AttentionCall) -> Tensor:
            self._begin(call.layer)
            expected = params[call.layer]
            assert (call.scale, call.softcap, call.window) == (expected.scale, expected.softcap, expected.window)
            torch.set_num_threads(attention_threads)  # the others compute too
            attended = attention.attend(call.layer, call.q, call.k, call.v, sinks=call.sinks)
            torch.set_num_threads(dense_threads)
            return attended

        output = self.model(
            input_ids=self._ids(token_ids)[None],
            position_ids=self._ids(positions)[None],
            attention_mask=self._no_mask,
            use_cache=False,
            logits_to_keep=self._ids(rows),
            longspan_attend=attend,
            **{READ_ROWS: attention.read_rows},
        )
        logits: Tensor = output.logits[0]
        assert logits.shape[0] == len(rows)
        return logits


def _some(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of logits; a view where they are the first ones."""
    if list(rows) == list(range(len(rows))):
        return logits[: len(rows)]
    return logits[torch.tensor(rows, dtype=torch.long, device=logits.device)]
