"""Executor whose ranks are worker processes, whatever launcher starts them.

Holds the sending of plans to the processes, and the end of the group. Must not know how processes are started,
schedulers, or requests.
Read next: `longspan.engine.watch`, which receives answers; `longspan.engine.launcher`; `longspan.worker.process`, which
runs in every process.
"""

import threading
from concurrent.futures import Future

from longspan.costmodel.measured import RankMeasurement
from longspan.engine.launcher import Launcher
from longspan.engine.watch import Watch
from longspan.errors import LongspanError
from longspan.group.driver_link import DriverLink
from longspan.group.membership import Membership
from longspan.group.messages import LoadAdapter, Measure, Start, Stop, ToWorker, UnloadAdapter, encode
from longspan.group.plans import PlanSender
from longspan.group.shape import GroupShape
from longspan.plan.moves import Move, Moved
from longspan.plan.types import Plan, PlanResult
from longspan.types import Adapter


class WorkerExecutor:
    """Executor of a group of worker processes."""

    def __init__(self, start: Start, shape: GroupShape, launcher: Launcher, given_up: threading.Event) -> None:
        """Start all processes and wait until they are ready.

        Args:
            start: what every process is told.
            shape: shape of the group.
            launcher: starts the processes; released when this executor closes.
            given_up: event that is set when the caller no longer waits for the processes.

        Raises:
            WorkerError: a worker died, failed while starting, or never connected.
            ConfigError: a worker refused what the user asked for, or differs from the others.
            LongspanError: the start was given up.
        """
        self._launcher, self._stop_s = launcher, start.config.stop_s
        self._are_bound = start.config.cpu_binding != "none"
        self._plans = PlanSender()
        self._is_closed = False
        try:
            self._link = DriverLink(launcher.bind_address, launcher.secret)
        except BaseException:
            launcher.release(0.0)
            raise
        self._watch = Watch(start, shape, launcher, self._link, given_up)
        try:
            launcher.start(self._link.address, shape)
            self._watch.begin()
            self._watch.ready.result()
        except BaseException:
            self.close()
            raise

    def submit(self, plan: Plan) -> "Future[PlanResult]":
        future = self._watch.pending.add(plan)
        if not future.done():  # else the group has failed
            for rank, message in self._plans.messages(plan).items():
                for voice in self._watch.membership.voices(rank):
                    self._link.send(voice, message)  # the watch notices a process that is gone
        return future

    def move(self, move: Move) -> "Future[Moved]":
        future = self._watch.moves.add(move)
        if not future.done():
            for voice in self._watch.membership.voices(move.rank):
                self._link.send(voice, encode(move))
        return future

    def measure(self, nodes: tuple[int, ...], machines: tuple[int, ...]) -> list[RankMeasurement]:
        self._tell(Measure(nodes, machines, self._are_bound))
        return self._watch.measurements.all.result()

    def load_adapter(self, adapter: Adapter) -> "Future[None]":
        future = self._watch.adapters.add(adapter.adapter_id)
        if not future.done():
            self._tell(LoadAdapter(adapter))
        return future

    def unload_adapter(self, adapter_id: int) -> None:
        self._tell(UnloadAdapter(adapter_id))

    def _tell(self, message: ToWorker) -> None:
        """Send a message to all processes, behind the plans that they were sent."""
        encoded = encode(message)
        for member in self.membership.members:
            self._link.send(member.voice, encoded)

    @property
    def failure(self) -> BaseException | None:
        return self._watch.pending.error

    @property
    def hosts(self) -> tuple[str, ...]:
        return self.membership.hosts

    @property
    def membership(self) -> Membership:
        """The processes of the group."""
        return self._watch.membership

    @property
    def address(self) -> str:
        """Address at which workers find this driver."""
        return self._link.address

    def close(self) -> None:
        if not self._is_closed:
            self._launcher.release(self._stop_s if self._end() else 0.0)
            self._link.close()

    def replace(self) -> Launcher | None:
        if self._is_closed:
            return None
        self._end()
        self._link.close()  # before new ranks look for a driver
        if self._launcher.renew():
            return self._launcher
        self._launcher.release(0.0)
        return None

    def _end(self) -> bool:
        """End the watch, and tell the processes to end; return whether they were idle, and so end at once."""
        self._is_closed = True
        watch = self._watch
        closed = LongspanError("the engine is closed")
        watch.pending.fail(closed)
        watch.moves.fail(closed)
        watch.adapters.fail(closed)
        is_idle = watch.ready.done() and watch.ready.exception() is None and not watch.pending.num_failed
        watch.end()
        if is_idle:
            for member in self.membership.members:
                self._link.send(member.voice, encode(Stop()))
        else:
            # Waiting for processes that start, or run a plan of no use any more, would only cost the user a second.
            watch.tell_all(Stop())
        return is_idle
