"""Decode steps in fixed shapes, launched, captured as CUDA graphs, or replayed, as their plans say.

Holds the state of every shape on one rank. Must not know how plans are made, or how rows are sampled. No GPU has
captured a step yet; the launches are tested without graphs.
Read next: `longspan.scheduler.step_graphs`, which decides; `longspan.cp.fixed`, the attention of such steps;
`longspan.worker.forward`, the model's call.

Note [Capture]
    A decode step of a model of 32 layers is several hundred launches. A graph repeats them with one. A step that is to
    be captured is launched first, which gives its results, and then captured, which runs nothing and sends nothing. So
    a rank on which the capture fails, because something in the model waits for the device, has the same results, and
    has exchanged the same messages, as its peers; it says so in its answer, and no rank replays.
"""

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from longspan.comm.recording import RecordingCommunicator, Traffic
from longspan.cp.fixed import FixedStepAttention
from longspan.cp.fixed_buffers import FixedInputs
from longspan.errors import LongspanError
from longspan.kv.pool import PagePool
from longspan.plan.fixed_shape import BUCKETS, FixedShape
from longspan.plan.types import GraphStep, Plan
from longspan.sharding.pages import PageTable
from longspan.worker.forward import ModelForward, StepOutput

Launch = Callable[[], Tensor | None]
"""Function that launches all kernels of a step and returns its logits."""


class Graph(Protocol):
    """Launches that are repeated as one."""

    def capture(self, launch: Launch) -> None:
        """Record the launches of `launch`, without running them.

        Raises:
            RuntimeError: something in `launch` cannot be captured.
        """

    def replay(self) -> Tensor | None:
        """Run the recorded launches; return the result of `launch`, which every replay overwrites."""


class CUDAGraphs:
    """Maker of graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self) -> Graph:
        """Make a graph."""
        return _CUDAGraph(self._memory)


class _CUDAGraph:
    """CUDA graph."""

    def __init__(self, memory: Any) -> None:
        self._graph, self._memory = torch.cuda.CUDAGraph(), memory
        self._logits: Tensor | None = None

    def capture(self, launch: Launch) -> None:
        # Not `torch.cuda.graph`, which leaves its stream the current one if the capture fails.
        torch.cuda.synchronize()
        gc.collect()  # no tensor of an earlier step may be freed meanwhile
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # NCCL's watchdog asks for events meanwhile, in a thread of its own.
            self._graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                self._logits = launch()
            finally:
                self._graph.capture_end()

    def replay(self) -> Tensor | None:
        self._graph.replay()
        return self._logits


@dataclass(slots=True)
class _Step:
    """State of one shape."""

    attention: FixedStepAttention
    sent: Traffic
    """Traffic of one step in the communicator's counters."""
    graph: Graph | None = None


class FixedSteps:
    """Runner of one rank's decode steps of fixed shapes."""

    def __init__(
        self,
        forward: ModelForward,
        pools: Sequence[PagePool],
        comm: RecordingCommunicator,
        make_graph: Callable[[], Graph] | None,
    ) -> None:
        """Allocate the buffers that all shapes share.

        Args:
            forward: this rank's model.
            pools: this rank's pool of every KV group.
            comm: this rank's communicator.
            make_graph: maker of graphs; None where no plan captures.
        """
        self._forward, self._pools, self._comm, self._make_graph = forward, pools, comm, make_graph
        self._inputs = FixedInputs(pools, comm.size)
        self._all_rows = torch.arange(BUCKETS[-1], device=pools[0].device)
        self._steps: dict[int, _Step] = {}  # by slot
        self.num_replays = 0
        """Number of steps that ran as a graph."""

    def run(
        self,
        shape: FixedShape,
        how: GraphStep,
        plan: Plan,
        tables: Sequence[Mapping[int, PageTable]],
        token_ids: Sequence[int],
        read: Sequence[int],
    ) -> StepOutput:
        """Run a plan of a fixed shape.

        Args:
            shape: shape of the plan.
            how: what the plan says of its step.
            plan: plan to run.
            tables: per KV group, the page table of every request in the plan.
            token_ids: input tokens of this rank's rows.
            read: rows whose logits are needed.

        Collective: all ranks of the plan, with the same plan.
        """
        step = self._step(shape, how)
        step.attention.fill(plan, tables, token_ids)
        capture_failed = False
        if how.run == "replay":
            logits = self._replay(step)
        else:
            before = self._comm.traffic
            logits = self._launch(step.attention)
            step.sent = self._comm.traffic.since(before)
            capture_failed = how.run == "capture" and not self._capture(step)
        return StepOutput(None if logits is None else _some(logits, read), step.attention.bytes_sent, capture_failed)

    def _step(self, shape: FixedShape, how: GraphStep) -> _Step:
        """State of a plan's shape, which a plan that launches may bring to its slot."""
        found = self._steps.get(how.slot)
        if found is None or found.attention.shape != shape:
            assert how.run == "launch", f"slot {how.slot} holds no step to {how.run}"
            self._steps.pop(how.slot, None)  # whose buffers go before new ones come
            params = self._forward.layer_params
            found = _Step(FixedStepAttention(shape, self._inputs, self._pools, self._comm, params), self._comm.traffic)
            self._steps[how.slot] = found
        return found

    def _launch(self, attention: FixedStepAttention) -> Tensor | None:
        """Launch all kernels of a step. As it may be captured, it must not read the device's data."""
        if not attention.num_rows:
            self._forward.join(attention)
            return None
        rows = slice(attention.num_rows)
        return self._forward.run(
            attention, self._inputs.token_ids[rows], self._inputs.positions[rows], self._all_rows[rows]
        )

    def _capture(self, step: _Step) -> bool:
        """Capture a step that has been launched; return whether that worked."""
        assert self._make_graph is not None, "a plan captures where nothing can be captured"
        before = self._comm.traffic
        graph = self._make_graph()
        try:
            graph.capture(lambda: self._launch(step.attention))
        except (RuntimeError, LongspanError) as error:
            reason = " ".join(str(error).split())[:300]
            print(
                f"longspan: rank {self._comm.rank} cannot capture decode steps as CUDA graphs, so all ranks launch "
                f"their kernels one by one: {reason}",
                file=sys.stderr,
                flush=True,
            )
            return False
        finally:
            self._comm.traffic = before  # a capture sends nothing
        step.graph = graph
        return True

    def _replay(self, step: _Step) -> Tensor | None:
        """Run all kernels of a step as one launch."""
        assert step.graph is not None, "a plan replays what was not captured"
        before = self._comm.traffic
        self._forward.begin_layers()
        logits = step.graph.replay()
        self.num_replays += 1
        self._comm.traffic = before.plus(step.sent)  # a replay's messages bypass the counters
        return logits


def _some(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows of logits; a view if they are the first ones."""
    if list(rows) == list(range(len(rows))):
        return logits[: len(rows)]
    return logits[torch.tensor(rows, dtype=torch.long, device=logits.device)]
