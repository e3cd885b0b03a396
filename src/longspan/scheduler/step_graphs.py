"""Which decode steps have a fixed shape, and which of these are captured as CUDA graphs and replayed.

Holds the decision, for all ranks at once, and which shapes ranks keep. Must not know how a rank launches or captures.
Read next: `longspan.plan.fixed_shape`; `longspan.worker.graphs`, which does what is decided here.

Note [One decision for all ranks]
    NCCL asks that a capture be the same on all ranks that talk, and that a replay be of the graph of that capture. A
    rank that decided alone could do something else than its peers: it sees other plans than they do, so it would keep
    other shapes. So a plan says how its step runs, and in which slot ranks keep what belongs to its shape:

        first step of a shape     launch    kernels are compiled, NCCL sets up its channels: neither may be captured
        second one                capture   launched as before; then captured, which runs nothing
        while answers are out     launch
        all ranks have captured   replay
        a rank could not          launch, this shape and every new one, for good: the reason lies in model or driver

    A shape belongs to the ranks of its plans. When there are too many, the one that was not used for longest loses its
    slot: ranks drop what they have there when the next shape comes to it.
"""

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longspan.config import EngineConfig
from longspan.plan.fixed_shape import (
    MOST_SHARED,
    FixedShape,
    fixed_shape,
    has_adapters,
    has_fixed_steps,
    is_captured,
)
from longspan.plan.types import GraphStep, Plan, PlanResult
from longspan.sharding.pages import PageTable
from longspan.types import ModelSpec

MAX_SHAPES = 48
"""Most shapes whose buffers and graphs ranks keep."""

_Key = tuple[tuple[int, ...], FixedShape]


@dataclass(slots=True)
class _Shape:
    """State of one shape on the ranks of its plans."""

    slot: int
    is_captured: bool = False
    is_tried: bool = False
    """Whether a plan has captured it, which may not have come back or may have failed."""


class StepGraphs:
    """Shapes that ranks keep, and what they do in a step."""

    def __init__(self, model: ModelSpec, config: EngineConfig, num_pages: Sequence[Sequence[int]]) -> None:
        """Begin without shapes.

        Args:
            model: the model's facts.
            config: options, which say whether steps have fixed shapes and are captured.
            num_pages: pages of every pool, [rank][KV group]; slots of states behind them do not matter.
        """
        self._is_on, self._may_capture = has_fixed_steps(config, model), is_captured(config)
        self._num_pages = num_pages
        self._shapes: OrderedDict[_Key, _Shape] = OrderedDict()
        self._captures: dict[int, _Shape] = {}  # by the number of a plan that has not come back

    def step(self, plan: Plan, tables: Sequence[Mapping[int, PageTable]]) -> GraphStep | None:
        """Decide how a plan's step runs, and take it down; None for a step that is not fixed.

        Args:
            plan: the plan.
            tables: per KV group, page tables that have grown, or are new, since the last step of their requests.
        """
        shape = fixed_shape(plan) if self._is_on and not has_adapters(plan) else None
        if shape is None or not self._has_room(plan, tables):
            return None
        key = (plan.ranks, shape)
        found = self._shapes.get(key)
        if found is None:
            self._shapes[key] = found = _Shape(self._free_slot())
            return GraphStep(found.slot, "launch")
        self._shapes.move_to_end(key)
        if found.is_captured:
            return GraphStep(found.slot, "replay")
        if found.is_tried or not self._may_capture:
            return GraphStep(found.slot, "launch")
        found.is_tried = True
        self._captures[plan.plan_id] = found
        return GraphStep(found.slot, "capture")

    def note_result(self, result: PlanResult) -> None:
        """Take in whether a plan's ranks have captured what they were asked to."""
        shape = self._captures.pop(result.plan_id, None)
        if shape is not None:
            shape.is_captured = not any(rank.capture_failed for rank in result.ranks)
            self._may_capture &= shape.is_captured

    def forget_ranks(self) -> None:
        """The ranks were lost, and new ones keep nothing."""
        self._shapes.clear()
        self._captures.clear()

    def _free_slot(self) -> int:
        if len(self._shapes) < MAX_SHAPES:
            return len(self._shapes)
        _, oldest = self._shapes.popitem(last=False)
        return oldest.slot

    def _has_room(self, plan: Plan, tables: Sequence[Mapping[int, PageTable]]) -> bool:
        """Whether every rank's buffer has room for the key tiles of a step (`MOST_SHARED`)."""
        for group_idx, of_group in enumerate(tables):
            pools = {rank: MOST_SHARED * self._num_pages[rank][group_idx] for rank in plan.ranks}
            if sum(table.num_pages for table in of_group.values()) <= min(pools.values()):
                continue
            seen: Counter[int] = Counter()
            for table in of_group.values():
                for run in table.runs:
                    seen[run.rank] += run.num_pages
            if any(pages > pools[rank] for rank, pages in seen.items()):
                return False
        return True
