"""Decode steps in fixed shapes, each captured as a CUDA graph the second time that it comes.

Holds the model's launch over persistent buffers, and the graphs. Must not know how plans are made, or what their rows
are sampled with. No GPU has captured one yet; what they repeat is tested without graphs.
Read next: `longspan.cp.fixed`, the buffers and attention.

Note [Capture]
    A decode step of a model of 32 layers is several hundred launches. A graph repeats them with one. The first of a
    shape runs as it is: kernels are compiled then, and NCCL sets up its channels, neither of which may happen in a
    capture. Ranks of one plan may disagree on whether they replay, launch or capture: the messages are the same.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.comm.recording import RecordingCommunicator
from longspan.cp.fixed import BUCKETS, FixedAttention, FixedInputs, FixedShape, fixed_shape
from longspan.kv.pool import PagePool
from longspan.models.hook import AttentionCall
from longspan.models.last_layer import READ_ROWS
from longspan.plan.types import Plan
from longspan.sharding.pages import PageTable
from longspan.types import ModelSpec

MAX_SHAPES = 48
"""Shapes whose buffers and graphs are kept; the one that was not used for longest goes first."""


@dataclass(slots=True)
class _Step:
    """One shape."""

    attention: FixedAttention
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor | None = None
    """Of the graph: [num_rows, vocab], written by every replay; None on a rank without rows."""
    sent: tuple[int, int, int] = (0, 0, 0)
    """What one step adds to the communicator's counters."""
    has_run: bool = False


class FixedSteps:
    """One rank's."""

    def __init__(
        self,
        model: Any,
        spec: ModelSpec,
        pools: Sequence[PagePool],
        comm: RecordingCommunicator,
        *,
        begin: Callable[[int], None],
        can_capture: bool,
    ) -> None:
        """Allocate the buffers that all shapes share.

        Args:
            model: loaded with the `longspan` attention function.
            spec: its facts.
            pools: this rank's, per KV group.
            comm: this rank's communicator.
            begin: called before every layer.
            can_capture: whether device and communicator take part in graphs; if not, every step is launched.
        """
        self._model, self._spec, self._pools, self._comm = model, spec, pools, comm
        self._begin, self._can_capture = begin, can_capture
        device = pools[0].device
        self._inputs = FixedInputs(pools, comm.size)
        self._all_rows = torch.arange(BUCKETS[-1], device=device)
        self._no_mask = torch.empty(1, 1, 0, 0, device=device)
        self._steps: OrderedDict[FixedShape, _Step] = OrderedDict()
        self._memory = torch.cuda.graph_pool_handle() if can_capture else None
        self.num_replays = 0
        """Steps that were one launch, for whoever wants to know whether graphs are in use."""

    @staticmethod
    def shape_of(plan: Plan) -> FixedShape | None:
        """As `fixed_shape`."""
        return fixed_shape(plan)

    def run(
        self, shape: FixedShape, plan: Plan, tables: Sequence[Mapping[int, PageTable]], token_ids: Sequence[int]
    ) -> Tensor | None:
        """Run a plan of some shape.

        Args:
            shape: of the plan.
            plan: what to run.
            tables: per KV group, the page table of every request in the plan.
            token_ids: of this rank's rows.

        Returns:
            [num_rows, vocab] logits, of this rank's rows first, until the next call; None on a rank without rows.

        Collective: all ranks of the plan, with the same plan.
        """
        step = self._step(shape)
        is_capturable = step.attention.fill(plan, tables, token_ids) and self._can_capture
        if not (is_capturable and step.has_run):
            before = self._counters()
            logits = self._launch(step)
            step.sent = _difference(self._counters(), before)
            step.has_run = True
            return logits
        if step.graph is None:
            step.graph = torch.cuda.CUDAGraph()
            before = self._counters()
            with torch.cuda.graph(step.graph, pool=self._memory, capture_error_mode="thread_local"):
                step.logits = self._launch(step)
            self._add(_difference(before, self._counters()))  # nothing has been sent
        else:
            for layer in range(self._spec.num_layers):
                self._begin(layer)
        step.graph.replay()
        self.num_replays += 1
        self._add(step.sent)
        return step.logits

    def strategy_bytes(self, shape: FixedShape, plan: Plan) -> dict[str, int]:
        """What a plan of some shape, which has run, made this rank send, per strategy."""
        attention, found = self._steps[shape].attention, Counter[str]()
        for i, (step, pool) in enumerate(zip(plan.groups, self._pools, strict=True)):
            found[step.strategy.value] += len(pool.group.layers) * attention.layer_bytes(i)
        return found

    def _step(self, shape: FixedShape) -> _Step:
        if shape not in self._steps:
            if len(self._steps) == MAX_SHAPES:
                self._steps.popitem(last=False)
            attention = FixedAttention(shape, self._inputs, self._pools, self._comm, self._spec.layer_params)
            self._steps[shape] = _Step(attention)
        self._steps.move_to_end(shape)
        return self._steps[shape]

    def _launch(self, step: _Step) -> Tensor | None:
        """All kernels of a step, as they are captured. Nothing in here may look at the device's data."""
        attention, num_rows = step.attention, step.attention.shape.num_rows
        if not attention.has_rows:
            for layer in range(self._spec.num_layers):
                self._begin(layer)
                attention.join(layer)
            return None

        def attend(call: AttentionCall) -> Tensor:
            self._begin(call.layer)
            expected = self._spec.layer_params[call.layer]
            assert (call.scale, call.softcap, call.window) == (expected.scale, expected.softcap, expected.window)
            return attention.attend(call.layer, call.q, call.k, call.v, sinks=call.sinks)

        output = self._model(
            input_ids=self._inputs.token_ids[None, :num_rows],
            position_ids=self._inputs.positions[None, :num_rows],
            attention_mask=self._no_mask,
            use_cache=False,
            logits_to_keep=self._all_rows[:num_rows],
            longspan_attend=attend,
            **{READ_ROWS: None},
        )
        logits: Tensor = output.logits[0]
        return logits

    def _counters(self) -> tuple[int, int, int]:
        return self._comm.num_exchanges, self._comm.messages_sent, self._comm.bytes_sent

    def _add(self, sent: tuple[int, int, int]) -> None:
        """Count what a replay sends: it does not pass through the communicator."""
        self._comm.num_exchanges += sent[0]
        self._comm.messages_sent += sent[1]
        self._comm.bytes_sent += sent[2]


def _difference(after: tuple[int, int, int], before: tuple[int, int, int]) -> tuple[int, int, int]:
    return after[0] - before[0], after[1] - before[1], after[2] - before[2]
