"""Profile of a rank's first plans, by PyTorch's profiler.

Holds when it starts and ends, and the file. Must not know what a plan does.
Read next: `longspan.worker.runner`, whose plans it records.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from longspan.plan.types import Plan

NUM_PLANS = 64
"""Plans that are recorded: more make a trace that browsers cannot show."""


class PlanProfiler:
    """Recorder of one rank's first plans, as a trace for chrome://tracing or ui.perfetto.dev.

    The trace, `rank-N.json`, is written when `NUM_PLANS` have run, or when the rank ends. A profiler records its whole
    process, so a process has one; the thread that begins it must end it.
    """

    def __init__(self, directory: str, rank: int) -> None:
        """Prepare; the first plan starts the profile.

        Args:
            directory: where the trace goes; it is made.
            rank: this rank.
        """
        self._path = Path(directory) / f"rank-{rank}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._num_plans = 0
        on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profile: profile | None = profile(activities=[ProfilerActivity.CPU, *on_gpu])

    @contextmanager
    def record(self, plan: Plan) -> Iterator[None]:
        """Name what happens inside after a plan; the last one of `NUM_PLANS` ends the profile."""
        if self._profile is None:
            yield
            return
        if not self._num_plans:
            self._profile.start()
        with record_function(f"plan {plan.plan_id}: {plan.phase.value}, {sum(plan.num_tokens)} tokens"):
            yield
        self._num_plans += 1
        if self._num_plans == NUM_PLANS:
            self.close()

    def close(self) -> None:
        """Write the trace, unless it is written already."""
        if self._profile is not None and self._num_plans:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._path))
        self._profile = None
