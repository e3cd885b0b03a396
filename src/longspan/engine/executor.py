"""Protocol of executors, which run plans, and the bookkeeping that they share.

Holds futures of plans. Must not know sockets, threads or models.
Read next: `longspan.engine.start`, which chooses an executor.
"""

import threading
from concurrent.futures import Future
from typing import Protocol

from longspan.costmodel.measured import RankMeasurement
from longspan.engine.launcher import Launcher
from longspan.errors import ConfigError
from longspan.plan.moves import Move, Moved
from longspan.plan.types import Plan, PlanResult, RankResult
from longspan.types import Adapter


class Executor(Protocol):
    """A group of ranks that run plans."""

    def submit(self, plan: Plan) -> "Future[PlanResult]":
        """Hand a plan to its ranks.

        Plans on disjoint ranks run at the same time; per rank they run in the order submitted.

        Returns:
            Future of the answers of the plan's ranks. It fails with a ConfigError where the ranks cannot do what the
            options ask for, and else with a WorkerError.
        """

    def move(self, move: Move) -> "Future[Moved]":
        """Hand a move of pages to its rank, behind the plans and moves that it was handed before.

        Returns:
            Future of the rank's answer; it fails as that of a plan does.
        """

    def measure(self, nodes: tuple[int, ...], machines: tuple[int, ...]) -> list[RankMeasurement]:
        """Let all ranks measure their kernels and links. Must come before the first plan.

        Args:
            nodes: node of every rank.
            machines: machine of every rank; ranks of one machine share its cores.

        Returns:
            One measurement per rank, in the order of ranks.

        Raises:
            LongspanError: the ranks have failed.
        """

    def load_adapter(self, adapter: Adapter) -> "Future[None]":
        """Let all ranks load an adapter, behind the plans that they were handed before.

        Returns:
            Future of their answers. It fails with a ConfigError where one of them cannot load it, and goes on without;
            and as that of a plan does.
        """

    def unload_adapter(self, adapter_id: int) -> None:
        """Let all ranks go of an adapter, if they have it, behind the plans that they were handed before."""

    @property
    def failure(self) -> BaseException | None:
        """Error that made the ranks fail; None while they run."""

    @property
    def hosts(self) -> tuple[str, ...]:
        """Name of every rank's host."""

    def close(self) -> None:
        """End all ranks, and wait until they are gone. Plans in flight fail. May be called twice."""

    def replace(self) -> Launcher | None:
        """End all ranks; return the launcher that can start new ones sooner, or None if there is none."""


class PendingPlans:
    """Collects the ranks' answers to plans in flight. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: dict[int, tuple[Plan, Future[PlanResult], dict[int, RankResult]]] = {}
        self._error: BaseException | None = None
        self.num_failed = 0
        """Plans that were in flight when the ranks failed or the executor closed."""

    @property
    def error(self) -> BaseException | None:
        """Error that every plan fails with; None while the ranks run."""
        return self._error

    def add(self, plan: Plan) -> "Future[PlanResult]":
        """Return a future for a plan; the future has failed already if the ranks have."""
        future: Future[PlanResult] = Future()
        with self._lock:
            if self._error is None:
                self._futures[plan.plan_id] = (plan, future, {})
                return future
        future.set_exception(self._error)
        return future

    def owing(self) -> set[int]:
        """Ranks whose answer to a plan in flight is missing."""
        with self._lock:
            return {rank for plan, _, got in self._futures.values() for rank in plan.ranks if rank not in got}

    def answer(self, result: RankResult) -> None:
        """Note one rank's answer; the last one completes the future. Answers after a failure are ignored."""
        with self._lock:
            if result.plan_id not in self._futures:
                return
            plan, future, results = self._futures[result.plan_id]
            results[result.rank] = result
            if len(results) < len(plan.ranks):
                return
            del self._futures[result.plan_id]
        future.set_result(PlanResult(plan.plan_id, tuple(results[rank] for rank in plan.ranks)))

    def fail(self, error: BaseException) -> None:
        """Fail all plans in flight and all later ones, with the first error that was given."""
        with self._lock:
            if self._error is None:
                self._error = error
            failed, self._futures = list(self._futures.values()), {}
            self.num_failed += len(failed)
        for _, future, _ in failed:
            future.set_exception(self._error)


class PendingMoves:
    """Collects the ranks' answers to moves in flight. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: dict[int, Future[Moved]] = {}
        self._error: BaseException | None = None

    def add(self, move: Move) -> "Future[Moved]":
        """Return a future for a move; it has failed already if the ranks have."""
        future: Future[Moved] = Future()
        with self._lock:
            if self._error is None:
                self._futures[move.move_id] = future
                return future
        future.set_exception(self._error)
        return future

    def answer(self, moved: Moved) -> None:
        """Note a rank's answer. Answers after a failure are ignored."""
        with self._lock:
            future = self._futures.pop(moved.move_id, None)
        if future is not None:
            future.set_result(moved)

    def fail(self, error: BaseException) -> None:
        """Fail all moves in flight and all later ones, with the first error that was given."""
        with self._lock:
            self._error = self._error or error
            failed, self._futures = list(self._futures.values()), {}
        for future in failed:
            future.set_exception(self._error)


class PendingAdapters:
    """Collects the processes' answers to adapters that are being loaded. Safe to use from several threads."""

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes
        self._lock = threading.Lock()
        self._futures: dict[int, tuple[Future[None], list[str | None]]] = {}
        self._error: BaseException | None = None

    def add(self, adapter_id: int) -> "Future[None]":
        """Return a future for an adapter; it has failed already if the ranks have."""
        future: Future[None] = Future()
        with self._lock:
            if self._error is None:
                self._futures[adapter_id] = (future, [])
                return future
        future.set_exception(self._error)
        return future

    def answer(self, adapter_id: int, error: str | None) -> None:
        """Note one process's answer; the last one completes the future. Answers after a failure are ignored."""
        with self._lock:
            if adapter_id not in self._futures:
                return
            future, errors = self._futures[adapter_id]
            errors.append(error)
            if len(errors) < self._num_processes:
                return
            del self._futures[adapter_id]
        wrong = next((error for error in errors if error is not None), None)
        if wrong is None:
            future.set_result(None)
        else:
            future.set_exception(ConfigError(wrong))

    def fail(self, error: BaseException) -> None:
        """Fail all loads in flight and all later ones, with the first error that was given."""
        with self._lock:
            self._error = self._error or error
            failed, self._futures = list(self._futures.values()), {}
        for future, _ in failed:
            future.set_exception(self._error)


class PendingMeasurements:
    """Collects the ranks' measurements of themselves."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._found: dict[int, RankMeasurement] = {}
        self.all: Future[list[RankMeasurement]] = Future()
        """Future of all ranks' measurements, in the order of ranks; fails with the ranks."""

    def answer(self, measurement: RankMeasurement) -> None:
        """Note one rank's measurement."""
        self._found[measurement.rank] = measurement
        if len(self._found) == self._num_ranks:
            self.all.set_result([self._found[rank] for rank in range(self._num_ranks)])

    def fail(self, error: BaseException) -> None:
        """Fail `all`, unless every rank has answered."""
        if not self.all.done():
            self.all.set_exception(error)
