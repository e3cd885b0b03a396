"""Ranks as worker processes, wherever they run: what all launchers share.

Holds the conversation with the workers, and the watch over them. Must not know how processes are started, schedulers,
or requests.
Read next: `longspan.engine.launcher`; `longspan.group.worker_link`, the other end; `longspan.group.failures`.
"""

import threading
import time
from concurrent.futures import Future

import msgspec

from longspan.costmodel.measured import RankMeasurement
from longspan.engine.executor import PendingMeasurements, PendingPlans
from longspan.engine.launcher import Launcher
from longspan.errors import ConfigError, LongspanError, WorkerError
from longspan.group.driver_link import DriverLink
from longspan.group.failures import Failures
from longspan.group.heartbeat import MARGIN_S, silence_limit_s
from longspan.group.membership import Roster
from longspan.group.messages import (
    Alive,
    Answer,
    Failed,
    Files,
    Hello,
    Measure,
    Measured,
    Pulse,
    Ready,
    Refused,
    RunPlan,
    Start,
    Stop,
    ToDriver,
    decode_to_driver,
    encode,
)
from longspan.group.versions import own_versions
from longspan.plan.types import Plan, PlanResult

POLL_MS = 100
"""How often dead processes are looked for while nothing arrives."""

PULSE_EVERY_S = 0.5
"""How often workers hear that the driver runs, and connections that are gone are noticed."""

STOP_S = 1.0
"""How long idle workers may take to end when asked; then they are killed."""

LATECOMERS_S = 2.0
"""How long a group that cannot start tells workers on other hosts so, who come a little later than the first."""

GRACE_S = 0.5
"""How long the driver listens after a first sign of failure, to tell the cause from its consequences."""


class WorkerExecutor:
    """One worker process per rank."""

    def __init__(self, start: Start, launcher: Launcher, given_up: threading.Event) -> None:
        """Start all ranks and wait until they are ready.

        Args:
            start: what every rank is told.
            launcher: starts them; released when this executor closes.
            given_up: set when nobody waits for them any more.

        Raises:
            WorkerError: a worker died, failed while starting, or never came.
            ConfigError: a worker refused what the user asked for, or does not fit to the others.
            LongspanError: the start was given up.
        """
        self._launcher, self._given_up = launcher, given_up
        self._is_first = start.generation == 0
        self._start = encode(msgspec.structs.replace(start, directory=launcher.directory))
        self._size = start.config.context_parallel_size
        self._connect_timeout_s = start.config.connect_timeout_s
        timeout_s = start.config.exchange_timeout_s
        self._silence_limit_s = silence_limit_s(timeout_s)
        self._stuck_limit_s = timeout_s + MARGIN_S
        self._pending = PendingPlans()
        self._measurements = PendingMeasurements(self._size)
        self._ready: Future[None] = Future()
        self._roster = Roster(self._size, own_versions())
        self._failures = Failures()
        self._voices: dict[int, bytes] = {}  # per rank, its connection for plans and answers
        self._pulses: dict[int, bytes] = {}  # per rank, its connection for signs of life
        self._silence_s = [0.0] * self._size
        self._progress = [0] * self._size
        self._stuck_s = [0.0] * self._size  # since a rank that owes an answer got further
        self._is_closed = False
        self._watcher: threading.Thread | None = None
        self._link: DriverLink | None = None
        try:
            self._link = DriverLink(launcher.bind_address, launcher.secret)
            launcher.start(self._link.address, self._size)
            self._watcher = threading.Thread(target=self._watch, args=(self._link,), name="longspan-watch", daemon=True)
            self._watcher.start()
            self._ready.result()
        except BaseException:
            self.close()
            raise

    # -- the watcher's thread ----------------------------------------------------------------------------------------

    def _watch(self, link: DriverLink) -> None:
        """Take in what the workers say, and notice when one is gone; after a failure, end all of them."""
        error: Exception | None
        try:
            error = self._listen(link)
        except Exception as broken:
            error = broken
        if error is not None:
            try:
                self._wait_for_latecomers(link, error)
                self._tell_all(link, Refused(" ".join(str(error).split())))
                self._launcher.kill()
            finally:  # whatever happens to the ranks, nobody waits for them any more
                self._pending.fail(error)
                self._measurements.fail(error)
                if not self._ready.done():
                    self._ready.set_exception(error)

    def _listen(self, link: DriverLink) -> Exception | None:
        """Returns why the group failed, or None when the executor closes."""
        began = now = time.monotonic()
        pulsed = began - PULSE_EVERY_S
        while not self._is_closed:
            if (refused := self._take_in_all(link, POLL_MS)) is not None:
                return refused
            if self._given_up.is_set() and not self._ready.done():
                return LongspanError("the engine is closed")
            if self._failures.first_s is None and time.monotonic() - now < POLL_MS / 1e3:
                continue
            # Capped: after the driver itself was stopped, or the machine slept, nobody has been silent for long.
            step_s = min(1.0, time.monotonic() - now)
            now = time.monotonic()
            gone: set[int] = set()
            if now - pulsed >= PULSE_EVERY_S:
                pulsed = now
                gone = self._send_pulses(link)
            owing = self._pending.owing()
            for rank in range(self._size):
                self._check(rank, rank in gone, step_s, now)
                self._check_progress(rank, rank in owing, step_s, now)
            first_s = self._failures.first_s
            if first_s is not None and (now - first_s > GRACE_S or self._failures.is_complete(self._size)):
                self._take_in_all(link, 0)  # last words that came behind a rank's end
                return self._failures.cause()
            if self._roster.missing and now - began > self._connect_timeout_s:
                return self._missing(link)
        return None

    def _take_in_all(self, link: DriverLink, timeout_ms: int) -> ConfigError | None:
        """What has come, or comes in time. Returns why the group cannot be started, if somebody shows that."""
        for peer, frame in link.receive(timeout_ms):
            try:
                self._take_in(link, peer, frame)
            except ConfigError as error:
                link.send(peer, encode(Refused(str(error))))
                # A stray worker must end neither ranks that run, nor those that replace lost ones.
                if self._is_first and not self._ready.done():
                    return error
        return None

    def _take_in(self, link: DriverLink, peer: bytes, frame: bytes) -> None:
        """One message. Raises: ConfigError, if its sender cannot be in this group."""
        try:
            message: ToDriver = decode_to_driver(frame)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"message: got one of another version of longspan from a worker: {error}") from error
        if isinstance(message, Hello):
            is_early = self._failures.first_s is not None and self._ready.done()  # for the group that comes next
            if is_early or self._voices.get(message.rank) == peer:  # or said twice, over a connection made twice
                return
            self._roster.admit(message)
            self._voices[message.rank] = peer
            self._silence_s[message.rank] = 0.0
            link.send(peer, self._start)
        elif isinstance(message, Alive):
            rank = message.rank
            if self._roster.is_process(rank, message.host, message.pid):  # else not yet admitted, or not at all
                self._pulses.setdefault(rank, peer)
                self._silence_s[rank] = 0.0
                if self._progress[rank] != message.progress:
                    self._progress[rank], self._stuck_s[rank] = message.progress, 0.0
        elif self._voices.get(_rank_of(message)) != peer:
            link.send(peer, encode(Refused(f"{type(message).__name__} came from a worker that is not in this group")))
        elif isinstance(message, Answer):
            rank = message.result.rank
            self._silence_s[rank] = self._stuck_s[rank] = 0.0
            self._pending.answer(message.result)
        elif isinstance(message, Measured):
            self._measurements.answer(message.measurement)
        elif isinstance(message, Files):
            self._roster.compare_files(message.rank, message.fingerprint)
        elif isinstance(message, Ready):
            if self._roster.note_ready(message.rank):
                self._ready.set_result(None)
        else:
            assert isinstance(message, Failed)
            if self._launcher.is_remote:
                reason = f"{message.reason}; said by {self._roster.name(message.rank)}"
                message = msgspec.structs.replace(message, reason=reason)
            self._failures.said(message, time.monotonic())

    def _check(self, rank: int, is_gone: bool, step_s: float, now: float) -> None:
        """Look for one rank's end, and for its signs of life."""
        if (how := self._launcher.ended(rank)) is not None:
            self._failures.ended(rank, self._name(rank), how, now)
        elif is_gone and self._launcher.is_remote:
            self._failures.lost(rank, self._name(rank), now)
        elif self._roster.has_come(rank):
            self._silence_s[rank] += step_s
            is_loading = not self._launcher.is_remote and not self._roster.is_ready(rank)  # which may take all it can
            if self._silence_s[rank] > (self._stuck_limit_s if is_loading else self._silence_limit_s):
                why = "its process is stopped" + ", or its host is out of reach" * self._launcher.is_remote
                self._failures.silent(rank, self._name(rank), self._silence_s[rank], why, now)

    def _check_progress(self, rank: int, is_owing: bool, step_s: float, now: float) -> None:
        """Look whether a rank that owes an answer gets any further."""
        self._stuck_s[rank] = self._stuck_s[rank] + step_s if is_owing else 0.0
        if self._stuck_s[rank] > self._stuck_limit_s:
            self._failures.stuck(rank, self._name(rank), self._stuck_limit_s, now)

    def _wait_for_latecomers(self, link: DriverLink, error: Exception) -> None:
        """Who comes while a group fails to start, or has just come, must not wait for a driver that is gone."""
        if not self._launcher.is_remote or self._ready.done():
            return
        deadline = time.monotonic() + LATECOMERS_S
        while (self._roster.missing or set(self._voices) != set(self._pulses)) and time.monotonic() < deadline:
            for peer, frame in link.receive(POLL_MS):
                try:
                    self._take_in(link, peer, frame)
                except ConfigError:
                    link.send(peer, encode(Refused(str(error))))
            if self._is_closed:
                return

    def _send_pulses(self, link: DriverLink) -> set[int]:
        """Tell the workers that the driver runs. Returns the ranks whose connection is gone."""
        pulse = encode(Pulse())
        return {rank for rank, peer in self._pulses.items() if not link.send(peer, pulse)}

    def _missing(self, link: DriverLink) -> WorkerError:
        """Who never came."""
        ranks = self._roster.missing
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        text = f"{who} did not connect to {link.address} within {self._connect_timeout_s:g} s (connect_timeout_s)"
        if link.num_strangers:
            where = ", ".join(sorted(link.strangers)) or "an unknown address"
            text += f"; connections with another secret came from {where}"
        return WorkerError(text)

    def _name(self, rank: int) -> str:
        return self._launcher.name(rank) or self._roster.name(rank)

    def _tell_all(self, link: DriverLink, message: Stop | Refused) -> None:
        """Say it to workers that no signal reaches, busy or not."""
        if self._launcher.is_remote:
            for rank, peer in self._voices.items():
                link.send(self._pulses.get(rank, peer), encode(message))

    # -- the caller's thread -----------------------------------------------------------------------------------------

    def submit(self, plan: Plan) -> "Future[PlanResult]":
        future = self._pending.add(plan)
        if not future.done():  # else the ranks have failed
            assert self._link is not None
            message = encode(RunPlan(plan))
            for rank in plan.ranks:
                self._link.send(self._voices[rank], message)  # the watcher notices whoever is gone
        return future

    def measure(self, nodes: tuple[int, ...], machines: tuple[int, ...]) -> list[RankMeasurement]:
        assert self._link is not None
        message = encode(Measure(nodes, machines))
        for peer in self._voices.values():
            self._link.send(peer, message)
        return self._measurements.all.result()

    @property
    def failure(self) -> BaseException | None:
        return self._pending.error

    @property
    def hosts(self) -> tuple[str, ...]:
        return self._roster.hosts

    def close(self) -> None:
        if not self._is_closed:
            self._launcher.release(STOP_S if self._end() else 0.0)
            self._close_link()

    def replace(self) -> Launcher | None:
        if self._is_closed:
            return None
        self._end()
        self._close_link()  # before new ranks look for a driver
        if self._launcher.renew():
            return self._launcher
        self._launcher.release(0.0)
        return None

    def _end(self) -> bool:
        """End the watch, and tell the ranks to end. Returns whether they were idle, and will."""
        self._is_closed = True
        self._pending.fail(LongspanError("the engine is closed"))
        is_idle = self._ready.done() and self._ready.exception() is None and not self._pending.num_failed
        if self._link is not None:
            if self._watcher is not None:
                self._link.wake()
                self._watcher.join()
            if is_idle:
                for peer in self._voices.values():
                    self._link.send(peer, encode(Stop()))
            else:
                # Whoever starts, or is busy with a plan that nobody waits for, would only cost the user a second.
                self._tell_all(self._link, Stop())
        return is_idle

    def _close_link(self) -> None:
        if self._link is not None:
            self._link.close()


def _rank_of(message: Answer | Measured | Files | Ready | Failed) -> int:
    """Whose it is."""
    if isinstance(message, Answer):
        return message.result.rank
    return message.measurement.rank if isinstance(message, Measured) else message.rank
