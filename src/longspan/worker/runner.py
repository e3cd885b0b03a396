"""Execution of plans on one rank: model, page pools and communicator.

Holds the copies of page tables and the step. Must not know how plans are made, how they arrive, or what a request's
text is.
Read next: `longspan.worker.forward`, the model; `longspan.cp.step`, its attention; `longspan.worker.process`, the
process around it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from longspan.attention.base import AttentionBackend
from longspan.comm.base import Communicator
from longspan.comm.peers import Peers
from longspan.comm.recording import RecordingCommunicator
from longspan.cp.eager import EagerStepAttention
from longspan.cp.relay import Relay
from longspan.errors import LongspanError
from longspan.group.heartbeat import ProcessProgress
from longspan.kv.pool import PagePool
from longspan.kv.state_pool import StatePool
from longspan.models.adapters import adapters_of
from longspan.models.latent import params_with_weights
from longspan.plan.fixed_shape import fixed_shape
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
from longspan.types import Adapter, ModelSpec, RopeLengths, TokenLogprobs
from longspan.worker.fault import Injector
from longspan.worker.forward import ModelForward, StepOutput
from longspan.worker.sampler import sample_all, token_logprobs

if TYPE_CHECKING:
    from longspan.worker.graphs import FixedSteps
    from longspan.worker.profile import PlanProfiler

STATES, SUMS = "states", "sums"
"""Names of states, and of sums inside of ranks, among strategies, where the bytes that are sent are counted."""

GraphMode = Literal["never", "launched", "captured"]
"""Way to run decode steps: in any shape; in fixed shapes, kernel by kernel; in fixed shapes, as CUDA graphs."""


class _Answer(NamedTuple):
    """Results of a rank's rows that need logits."""

    sampled: tuple[SampledToken, ...] = ()
    scored: tuple[ScoredRun, ...] = ()
    failed: tuple[FailedRow, ...] = ()


class _PackedStep(NamedTuple):
    """Packed rows of a rank, and those that need logits."""

    token_ids: list[int]
    positions: list[int]
    samples: list[SampleRow]
    scores: list[ScoreRun]
    read: list[int]
    """Packed rows that need logits: those of `samples`, then those of `scores`."""
    lengths: list[int] | None
    """Length that counts for RoPE in every row; None where it does not matter."""
    adapters: list[int | None] | None
    """Adapter of every row; None where no row has one."""


class _LayerStart:
    """Function called before every layer: it counts progress, and triggers a fault that is due."""

    def __init__(self, progress: ProcessProgress, faults: Injector) -> None:
        self._progress, self._faults = progress, faults
        self.num_plans = 0
        """Number of plans that the rank has run before this one."""

    def __call__(self, layer: int) -> None:
        self._progress.count += 1
        self._faults.before_layer(self.num_plans, layer)


class ModelRunner:
    """Runner of plans on one rank."""

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
        profiler: PlanProfiler | None = None,
        peers: Peers | None = None,
        progress: ProcessProgress | None = None,
        faults: Injector | None = None,
    ) -> None:
        """Allocate the pools.

        Args:
            model: model with the `longspan` attention function.
            spec: the model's facts.
            num_pages: pages of the pool per KV group; behind them slots of states, if the model has recurrent layers.
            page_size: tokens per page.
            comm: this rank's communicator.
            backend: this rank's attention kernels.
            dense_threads: function from (plan, rank) to threads for all but attention and exchanges; None: no change.
            graphs: whether decode steps have fixed shapes, and are captured as CUDA graphs.
            profiler: recorder of plans; None for none.
            peers: processes of this rank that share the model, a part of which is this process's; None if it is alone.
            progress: counter of this process's progress; None if no thread reads it.
            faults: faults of this rank, for tests; None for none.
        """
        self.model: Any = model
        self._dense_threads = dense_threads
        self.spec, self.backend = spec, backend
        self.comm = RecordingCommunicator(comm)
        self.peers = peers
        """Processes that share this rank's model; None if this is the rank's only one."""
        self.rank = comm.rank
        self._page_size = page_size
        self.device = next(model.parameters()).device
        self.pools = [
            PagePool(group, pages, page_size, self.device)
            for group, pages in zip(spec.kv_groups, num_pages, strict=False)
        ]
        """This rank's pool of every KV group."""
        self._states = StatePool(spec.state_groups, num_pages[-1], self.device) if spec.state_groups else None
        self._tables: list[dict[int, PageTable]] = [{} for _ in spec.kv_groups]  # per KV group: request to table
        self._profiler = profiler
        self._progress = progress or ProcessProgress()
        self._layer_start = _LayerStart(self._progress, faults or Injector(None))
        self.layer_params = params_with_weights(spec, model)
        """Attention parameters of every layer, with this rank's weights where attention needs them."""
        layouts = None if self._states is None else self._states.components
        self._forward = ModelForward(model, self.layer_params, self._layer_start, layouts)
        self.fixed = None if graphs == "never" else self._fixed_steps(graphs)
        """Runner of decode steps in fixed shapes; None if all steps run in any shape."""
        self._sampled_by = -1  # the last plan that sampled here
        self._sampled: dict[int, int] = {}  # request to its token of that plan
        self._tokens_computed = 0
        self._busy_s = 0.0
        self._strategy_bytes: Counter[str] = Counter()

    def _fixed_steps(self, graphs: GraphMode) -> FixedSteps:
        from longspan.worker.graphs import CUDAGraphs, FixedSteps  # imports Triton

        return FixedSteps(self._forward, self.pools, self.comm, CUDAGraphs() if graphs == "captured" else None)

    @torch.inference_mode()
    def run(self, plan: Plan) -> RankResult:
        """Run one plan.

        Collective: every rank that the plan names runs it, in the order in which plans were submitted to the rank.

        Raises:
            CommunicationError: a peer did not answer.
            LongspanError: the model's output is NaN, or the plan refers to something unknown.
        """
        started = time.perf_counter()
        self._progress.count += 1
        try:
            with nullcontext() if self._profiler is None else self._profiler.record(plan):
                answer, capture_failed = self._run(plan)
            if self.device.type == "cuda":  # a plan's writes are complete when its answer is sent, on every rank
                torch.cuda.current_stream(self.device).synchronize()
        finally:
            step_s = time.perf_counter() - started
            self._busy_s += step_s
            self._layer_start.num_plans += 1
        strategy_bytes = {name: self._num_processes * sent for name, sent in self._strategy_bytes.items()}
        if self.peers is not None:
            strategy_bytes[SUMS] = self.peers.bytes_summed
        return RankResult(
            plan_id=plan.plan_id,
            rank=self.rank,
            sampled=answer.sampled,
            scored=answer.scored,
            failed=answer.failed,
            capture_failed=capture_failed,
            tokens_computed=self._tokens_computed,
            bytes_sent=self._num_processes * self.comm.bytes_sent,
            step_s=step_s,
            busy_s=self._busy_s,
            strategy_bytes=strategy_bytes,
        )

    def load_adapter(self, adapter: Adapter) -> None:
        """Load an adapter, for plans whose runs name it.

        Raises:
            ConfigError: its files do not fit the model, or are not those that the driver has read.
        """
        adapters_of(self.model).load(adapter)

    def unload_adapter(self, adapter_id: int) -> None:
        """Let go of an adapter that no later plan names."""
        adapters_of(self.model).unload(adapter_id)

    def close(self) -> None:
        """Finish what is written when a rank ends."""
        if self._profiler is not None:
            self._profiler.close()

    def _run(self, plan: Plan) -> tuple[_Answer, bool]:
        """Run a plan; return this rank's results, and whether the step could not be captured."""
        assert self.rank in plan.ranks, f"plan {plan.plan_id} is for ranks {plan.ranks}, this is rank {self.rank}"
        for request_id in plan.released:
            for tables in self._tables:
                tables.pop(request_id, None)
        self._copy_pages(plan)
        for delta in plan.table_deltas:
            self._apply(delta)
        rows = self._rows(plan)
        if self.fixed is not None and plan.graph is not None and (shape := fixed_shape(plan)) is not None:
            output = self.fixed.run(shape, plan.graph, plan, self._tables, rows.token_ids, rows.read)
        else:
            output = self._run_eagerly(plan, rows)
        self._strategy_bytes.update(output.bytes_sent)
        answer = _Answer() if output.logits is None else self._read(plan, rows, output.logits)
        return answer, output.capture_failed

    def _copy_pages(self, plan: Plan) -> None:
        """Copy pages within this rank, and send and receive pages of other ranks."""
        sends: list[tuple[int, Tensor]] = []
        recvs: list[tuple[int, Tensor]] = []
        arriving: list[tuple[Tensor, Tensor]] = []  # (received, where it belongs)
        for copy in plan.page_copies:
            source, target, pool = copy.source, copy.target, self.pools[copy.group_idx]
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

    def _rows(self, plan: Plan) -> _PackedStep:
        """Pack this rank's rows of a plan."""
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
        lengths = None if self.spec.rope_lengths is None else _row_lengths(runs, self.spec.rope_lengths)
        return _PackedStep(token_ids, positions, samples, scores, rows, lengths, _row_adapters(runs))

    def _run_eagerly(self, plan: Plan, rows: _PackedStep) -> StepOutput:
        """Run a plan of any shape."""
        attention = EagerStepAttention(plan, self._tables, self.pools, self.comm, self.backend, self.layer_params)
        states = None if self._states is None else Relay(plan, self._states, self.comm)
        logits: Tensor | None = None
        if not attention.num_rows:
            self._forward.join(attention)
        else:
            logits = self._forward.run(
                attention,
                self._ids(rows.token_ids),
                self._ids(rows.positions),
                self._ids(rows.read),
                states=states,
                dense_threads=None if self._dense_threads is None else self._dense_threads(plan, self.rank),
                row_lengths=rows.lengths,
                row_adapters=rows.adapters,
            )
        if states is None:
            return StepOutput(logits, attention.bytes_sent)
        return StepOutput(logits, {**attention.bytes_sent, STATES: states.bytes_sent})

    def _read(self, plan: Plan, rows: _PackedStep, logits: Tensor) -> _Answer:
        """Sample and score.

        Args:
            plan: plan of the step.
            rows: this rank's rows of the plan.
            logits: [n, vocab] logits of `rows.read`, in the process that speaks for the rank.
        """
        samples, scores = rows.samples, rows.scores
        self._tokens_computed += len(rows.token_ids)
        sampled: list[SampledToken] = []
        failed: list[FailedRow] = []
        if not self._speaks:
            self._note_sampled(plan, samples, [0] * len(samples))
            return _Answer()
        token_of = sample_all(logits[: len(samples)], samples)
        self._note_sampled(plan, samples, [0 if isinstance(token, LongspanError) else token for token in token_of])
        reported = self._sampled_logprobs(logits, samples, token_of)
        for i, (row, token_id) in enumerate(zip(samples, token_of, strict=True)):
            if isinstance(token_id, LongspanError):
                failed.append(FailedRow(row.request_id, row.position + 1, str(token_id)))
                continue
            sampled.append(SampledToken(row.request_id, row.position + 1, token_id, reported.get(i)))
        scored: list[ScoredRun] = []
        first = len(samples)
        for score in scores:
            count = len(score.targets)
            found = token_logprobs(logits[first : first + count], self._ids(score.targets), score.num_logprobs)
            scored.append(ScoredRun(score.request_id, score.position + 1, tuple(found)))
            first += count
        return _Answer(tuple(sampled), tuple(scored), tuple(failed))

    def _sampled_logprobs(
        self, logits: Tensor, samples: Sequence[SampleRow], token_of: Sequence[int | LongspanError]
    ) -> dict[int, TokenLogprobs]:
        """Log-probabilities that sampled rows ask for, by row; rows that ask for as many are computed together."""
        wanted: dict[int, list[int]] = {}
        for i, (row, token_id) in enumerate(zip(samples, token_of, strict=True)):
            if row.num_logprobs is not None and isinstance(token_id, int):
                wanted.setdefault(row.num_logprobs, []).append(i)
        found: dict[int, TokenLogprobs] = {}
        for num_top, rows in wanted.items():
            tokens = [token for i in rows if isinstance(token := token_of[i], int)]
            found |= zip(rows, token_logprobs(logits[self._ids(rows)], self._ids(tokens), num_top), strict=True)
        return found

    @property
    def _num_processes(self) -> int:
        """Processes of this rank; each sends as much to other ranks as this one."""
        return 1 if self.peers is None else self.peers.size

    @property
    def _speaks(self) -> bool:
        """Whether this process samples for its rank, as it has the logits."""
        return self.peers is None or self.peers.index == 0

    def _note_sampled(self, plan: Plan, samples: Sequence[SampleRow], token_ids: Sequence[int]) -> None:
        """Keep what the rank has sampled, for a plan that goes on from it; 0 where a row has failed.

        Args:
            plan: the plan.
            samples: its rows that are sampled here.
            token_ids: their tokens in the process that samples; anything in the others.

        Collective: all processes of the rank; eight bytes per row to each of the others.
        """
        told = token_ids if self.peers is None else self.peers.tell(token_ids, self.device)
        self._sampled_by = plan.plan_id
        self._sampled = {row.request_id: token_id for row, token_id in zip(samples, told, strict=True)}

    def _tokens(self, plan: Plan, run: QueryRun) -> Sequence[int]:
        """Input tokens of a run."""
        if isinstance(run.tokens, Literals):
            return run.tokens.token_ids
        assert run.tokens is not None, "a rank's own runs name their tokens"
        if run.tokens.plan_id != self._sampled_by or run.num_tokens != 1:
            raise LongspanError(
                f"plan {plan.plan_id}: needs {run.num_tokens} tokens of plan {run.tokens.plan_id}, rank {self.rank} "
                f"has sampled for plan {self._sampled_by} last"
            )
        return [self._sampled.get(run.request_id, 0)]  # a request whose row failed has ended: its rows are not read

    def _ids(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def _row_adapters(runs: Sequence[QueryRun]) -> list[int | None] | None:
    """Adapter of every row of a rank's runs; None where no row has one."""
    if all(run.adapter_id is None for run in runs):
        return None
    return [run.adapter_id for run in runs for _ in range(run.num_tokens)]


def _row_lengths(runs: Sequence[QueryRun], rope: RopeLengths) -> list[int]:
    """Length that counts for RoPE in every row of a rank's runs."""
    return [rope.counted(max(run.rope_len, position + 1)) for run in runs for position in range(run.position, run.end)]
