"""Decode steps in fixed shapes, each captured as a CUDA graph the second time that its shape comes.

Holds the choice to launch, capture or replay a step, and the state of its shape. Must not know how plans are made, or
how rows are sampled. No GPU has captured a step yet; the launches are tested without graphs.
Read next: `longspan.cp.fixed`, the attention of such steps; `longspan.worker.forward`, the model's call.

Note [Capture]
    A decode step of a model of 32 layers is several hundred launches. A graph repeats them with one. The first step of
    a shape runs without a graph: kernels are compiled then, and NCCL sets up its channels, neither of which may happen
    in a capture. Ranks of one plan may differ in whether they replay, launch or capture: the messages are the same.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from longspan.comm.recording import RecordingCommunicator, Traffic
from longspan.cp.fixed import FixedStepAttention
from longspan.cp.fixed_buffers import FixedInputs
from longspan.kv.pool import PagePool
from longspan.plan.fixed_shape import BUCKETS, FixedShape
from longspan.plan.types import Plan
from longspan.sharding.pages import PageTable
from longspan.worker.forward import ModelForward, StepOutput

MAX_SHAPES = 48
"""Most shapes whose buffers and graphs are kept; the least recently used one is dropped first."""

Launch = Callable[[], Tensor | None]
"""Function that launches all kernels of a step and returns its logits."""


class Graph(Protocol):
    """Launches that are repeated as one."""

    def capture(self, launch: Launch) -> None:
        """Record the launches of `launch`, without running them."""

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
        # NCCL's watchdog asks for events meanwhile, in a thread of its own.
        with torch.cuda.graph(self._graph, pool=self._memory, capture_error_mode="thread_local"):
            self._logits = launch()

    def replay(self) -> Tensor | None:
        self._graph.replay()
        return self._logits


@dataclass(slots=True)
class _Step:
    """State of one shape."""

    attention: FixedStepAttention
    sent: Traffic | None = None
    """Traffic of one step in the communicator's counters; None before the first step."""
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
            make_graph: maker of graphs, if device and communicator can be captured; None launches every step.
        """
        self._forward, self._pools, self._comm, self._make_graph = forward, pools, comm, make_graph
        self._inputs = FixedInputs(pools, comm.size)
        self._all_rows = torch.arange(BUCKETS[-1], device=pools[0].device)
        self._steps: OrderedDict[FixedShape, _Step] = OrderedDict()
        self.num_replays = 0
        """Number of steps that ran as a graph."""

    def run(
        self,
        shape: FixedShape,
        plan: Plan,
        tables: Sequence[Mapping[int, PageTable]],
        token_ids: Sequence[int],
        read: Sequence[int],
    ) -> StepOutput:
        """Run a plan of a fixed shape.

        Args:
            shape: shape of the plan.
            plan: plan to run.
            tables: per KV group, the page table of every request in the plan.
            token_ids: input tokens of this rank's rows.
            read: rows whose logits are needed.

        Collective: all ranks of the plan, with the same plan.
        """
        step = self._step(shape)
        is_capturable = step.attention.fill(plan, tables, token_ids)
        if is_capturable and step.sent is not None and self._make_graph is not None:
            logits = self._replay(step, step.sent, self._make_graph)
        else:
            before = self._comm.traffic
            logits = self._launch(step.attention)
            step.sent = self._comm.traffic.since(before)
        return StepOutput(None if logits is None else _some(logits, read), step.attention.bytes_sent)

    def _step(self, shape: FixedShape) -> _Step:
        if shape not in self._steps:
            if len(self._steps) == MAX_SHAPES:
                self._steps.popitem(last=False)
            params = self._forward.layer_params
            self._steps[shape] = _Step(FixedStepAttention(shape, self._inputs, self._pools, self._comm, params))
        self._steps.move_to_end(shape)
        return self._steps[shape]

    def _launch(self, attention: FixedStepAttention) -> Tensor | None:
        """Launch all kernels of a step. As it may be captured, it must not read the device's data."""
        if not attention.num_rows:
            self._forward.join(attention)
            return None
        rows = slice(attention.num_rows)
        return self._forward.run(
            attention, self._inputs.token_ids[rows], self._inputs.positions[rows], self._all_rows[rows]
        )

    def _replay(self, step: _Step, sent: Traffic, make_graph: Callable[[], Graph]) -> Tensor | None:
        """Run all kernels of a step as one launch, captured first if the shape has no graph yet."""
        before = self._comm.traffic
        if step.graph is None:
            step.graph = make_graph()
            step.graph.capture(lambda: self._launch(step.attention))
        else:
            self._forward.begin_layers()
        logits = step.graph.replay()
        self.num_replays += 1
        self._comm.traffic = before.plus(sent)  # a capture sends nothing; a replay's messages bypass the counters
        return logits


def _some(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows of logits; a view if they are the first ones."""
    if list(rows) == list(range(len(rows))):
        return logits[: len(rows)]
    return logits[torch.tensor(rows, dtype=torch.long, device=logits.device)]
