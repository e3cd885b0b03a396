"""Plans that ranks are running, and the wait for one of them to end.

Holds futures, and the queue that wakes the wait. Must not know what plans say, nor requests.
Read next: `longspan.engine.engine`, which waits here once per step.
"""

import queue
from collections.abc import Iterator
from concurrent.futures import Future

from longspan.plan.types import PlanResult


class PlansInFlight:
    """Futures of plans, in the order submitted. Any thread may call `wake`; one thread calls the rest."""

    def __init__(self) -> None:
        self._futures: dict[Future[PlanResult], None] = {}
        self._bell: queue.SimpleQueue[Future[PlanResult] | None] = queue.SimpleQueue()  # None: `wake`

    def __len__(self) -> int:
        return len(self._futures)

    def __iter__(self) -> Iterator[Future[PlanResult]]:
        return iter(self._futures)

    def add(self, future: Future[PlanResult]) -> None:
        """Note a plan that was submitted."""
        self._futures[future] = None
        future.add_done_callback(self._bell.put)

    def remove(self, future: Future[PlanResult]) -> bool:
        """Forget a plan; return whether it was known, unlike plans of ranks that were replaced."""
        if future not in self._futures:
            return False
        del self._futures[future]
        return True

    def clear(self) -> None:
        """Forget all plans."""
        self._futures.clear()

    def ended(self) -> list[Future[PlanResult]]:
        """Return the plans that have ended, newest first.

        A plan that is queued behind another ends after it, so asking for the newest first never misses the other.
        """
        return [future for future in reversed(self._futures) if future.done()]

    def wait(self, timeout_s: float) -> bool:
        """Wait until a plan has ended or `wake` was called; return False if neither came in time."""
        while not self.ended():
            try:
                if self._bell.get(timeout=timeout_s) is None:
                    break
            except queue.Empty:
                return False
        while not self._bell.empty():  # one wake-up is enough: `ended` finds all plans
            self._bell.get_nowait()
        return True

    def wake(self) -> None:
        """End the current wait, or else the next one."""
        self._bell.put(None)
