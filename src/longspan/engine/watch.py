"""The watch over the processes of a group: what they say, and whether they live.

Holds the thread that hears them, and what follows from each message and each sign of failure. Must not know how
processes are started, schedulers, or requests.
Read next: `longspan.engine.workers`, which plans go through; `longspan.group.failures`, why a group failed.
"""

import threading
import time
from concurrent.futures import Future

import msgspec

from longspan.engine.executor import PendingMeasurements, PendingPlans
from longspan.engine.launcher import Launcher
from longspan.errors import ConfigError, LongspanError, WorkerError
from longspan.group.driver_link import DriverLink
from longspan.group.failures import Failures
from longspan.group.liveness import Liveness
from longspan.group.membership import Membership
from longspan.group.messages import (
    Alive,
    Answer,
    Failed,
    Files,
    Heartbeat,
    Hello,
    Measured,
    Ready,
    Refused,
    Start,
    Stop,
    ToDriver,
    decode_to_driver,
    encode,
)
from longspan.group.shape import GroupShape, ProcessId, speaker
from longspan.group.versions import own_versions

POLL_MS = 100
"""How often dead processes are looked for while nothing arrives."""

HEARTBEAT_EVERY_S = 0.5
"""How often workers hear that the driver runs, and connections that are gone are noticed."""

LATECOMERS_S = 2.0
"""How long a group that cannot start tells workers on other hosts so, who come a little later than the first."""

GRACE_S = 0.5
"""How long the driver listens after a first sign of failure, to tell the cause from its consequences."""


class Watch:
    """Hears the processes of one group, in a thread of its own, until it is ended or the group has failed."""

    def __init__(
        self, start: Start, shape: GroupShape, launcher: Launcher, link: DriverLink, given_up: threading.Event
    ) -> None:
        """Make the watch; `begin` it when the processes are being started.

        Args:
            start: what every process is told.
            shape: of the group.
            launcher: of its processes.
            link: to them.
            given_up: set when nothing waits for the processes any more.
        """
        self._shape, self._launcher, self._link, self._given_up = shape, launcher, link, given_up
        self._is_first = start.generation == 0
        self._start = encode(msgspec.structs.replace(start, directory=launcher.directory))
        self._connect_timeout_s = start.config.connect_timeout_s
        self._failures = Failures(shape)
        self._liveness = Liveness(shape.processes, start.config.exchange_timeout_s)
        self.membership = Membership(shape, own_versions())
        """Which processes have come."""
        self.pending = PendingPlans()
        """Plans in flight."""
        self.measurements = PendingMeasurements(shape.num_ranks)
        """What ranks say of themselves when they are asked to measure."""
        self.ready: Future[None] = Future()
        """Done when all processes can run plans; or what made the group fail before."""
        self._is_ended = False
        self._thread = threading.Thread(target=self._run, name="longspan-watch", daemon=True)

    # -- the caller's thread -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start to listen."""
        self._thread.start()

    def end(self) -> None:
        """Listen no more; returns when the thread has ended."""
        self._is_ended = True
        if self._thread.ident is not None:
            self._link.wake()
            self._thread.join()

    def tell_all(self, message: Stop | Refused) -> None:
        """Say it to processes that no signal reaches, busy or not. Any thread may call it when the watch has ended."""
        if self._launcher.is_remote:
            for member in self.membership.members:
                self._link.send(member.urgent, encode(message))

    # -- the thread of the watch -------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Take in what the processes say, and notice when one is gone; after a failure, end all of them."""
        error: Exception | None
        try:
            error = self._listen()
        except Exception as broken:
            error = broken
        if error is not None:
            try:
                self._wait_for_latecomers(error)
                self.tell_all(Refused(" ".join(str(error).split())))
                self._launcher.kill()
            finally:  # whatever happens to the processes, nothing waits for them any more
                self.pending.fail(error)
                self.measurements.fail(error)
                if not self.ready.done():
                    self.ready.set_exception(error)

    def _listen(self) -> Exception | None:
        """Returns why the group failed, or None when the watch is ended."""
        began = now = time.monotonic()
        told = began - HEARTBEAT_EVERY_S
        while not self._is_ended:
            if (refused := self._take_in_all(POLL_MS)) is not None:
                return refused
            if self._given_up.is_set() and not self.ready.done():
                return LongspanError("the engine is closed")
            if self._failures.first_s is None and time.monotonic() - now < POLL_MS / 1e3:
                continue
            # Capped: after the driver itself was stopped, or the machine slept, no process has been silent for long.
            step_s = min(1.0, time.monotonic() - now)
            now = time.monotonic()
            gone: set[ProcessId] = set()
            if now - told >= HEARTBEAT_EVERY_S:
                told = now
                gone = self._send_heartbeats()
            owing = self.pending.owing()
            for process in self._shape.processes:
                self._look_for(process, process in gone, step_s, now)
                if self._liveness.work(process, step_s, is_owing=process.rank in owing):
                    self._failures.stuck(process, self._name(process), self._liveness.stuck_limit_s, now)
            first_s = self._failures.first_s
            if first_s is not None and (now - first_s > GRACE_S or self._failures.is_complete):
                self._take_in_all(0)  # last words that came behind a process's end
                return self._failures.cause()
            if self.membership.missing and now - began > self._connect_timeout_s:
                return self._missing()
        return None

    def _take_in_all(self, timeout_ms: int) -> ConfigError | None:
        """What has come, or comes in time. Returns why the group cannot be started, if a message shows that."""
        for peer, frame in self._link.receive(timeout_ms):
            try:
                self.take_in(peer, frame)
            except ConfigError as error:
                self._link.send(peer, encode(Refused(str(error))))
                # A stray worker must end neither ranks that run, nor those that replace lost ones.
                if self._is_first and not self.ready.done():
                    return error
        return None

    def take_in(self, peer: bytes, frame: bytes) -> None:
        """Take in one message.

        Args:
            peer: the connection that it came over.
            frame: its bytes.

        Raises:
            ConfigError: its sender cannot be in this group.
        """
        try:
            message: ToDriver = decode_to_driver(frame)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"message: got one of another version of longspan from a worker: {error}") from error
        if isinstance(message, Hello):
            self._welcome(message, peer)
        elif isinstance(message, Alive):
            if (process := self.membership.note_alive(message, peer)) is not None:
                self._liveness.heard(process, message.progress)
        else:
            process = self.membership.at(peer)
            if process is None or not _may_say(process, message):
                reason = f"{type(message).__name__} came from a worker that is not in this group"
                self._link.send(peer, encode(Refused(reason)))
            else:
                self._hear(process, message)

    def _welcome(self, hello: Hello, peer: bytes) -> None:
        """A process introduces itself.

        Raises:
            ConfigError: it cannot be in this group.
        """
        is_early = self._failures.first_s is not None and self.ready.done()  # for the group that comes next
        known = self.membership.get(self._shape.process(hello.number))
        if is_early or (known is not None and known.voice == peer):  # or said twice, over a connection made twice
            return
        self._liveness.got_further(self.membership.admit(hello, peer))
        self._link.send(peer, self._start)

    def _hear(self, process: ProcessId, message: Answer | Measured | Files | Ready | Failed) -> None:
        """A process of the group speaks.

        Raises:
            ConfigError: it shows that it cannot be in this group.
        """
        if isinstance(message, Answer):
            self._liveness.got_further(process)
            self.pending.answer(message.result)
        elif isinstance(message, Measured):
            self.measurements.answer(message.measurement)
        elif isinstance(message, Files):
            self.membership.compare_files(process, message.fingerprint)
        elif isinstance(message, Ready):
            if self.membership.note_ready(process):
                self.ready.set_result(None)
        else:
            if self._launcher.is_remote:
                reason = f"{message.reason}; said by {self.membership.name(process)}"
                message = msgspec.structs.replace(message, reason=reason)
            self._failures.said(message, time.monotonic())

    def _look_for(self, process: ProcessId, is_gone: bool, step_s: float, now: float) -> None:
        """Look for the end of a process, and for its signs of life."""
        is_remote = self._launcher.is_remote
        member = self.membership.get(process)
        if (how := self._launcher.ended(process)) is not None:
            self._failures.ended(process, self._name(process), how, now)
        elif is_gone and is_remote:
            self._failures.lost(process, self._name(process), now)
        elif member is not None:
            is_loading = not is_remote and not member.is_ready
            silence_s = self._liveness.wait(process, step_s, is_loading=is_loading)
            if silence_s is not None:
                why = "its process is stopped" + ", or its host is out of reach" * is_remote
                self._failures.silent(process, self._name(process), silence_s, why, now)

    def _wait_for_latecomers(self, error: Exception) -> None:
        """A process that comes while a group fails to start must not wait for a driver that is gone."""
        if not self._launcher.is_remote or self.ready.done():
            return
        deadline = time.monotonic() + LATECOMERS_S
        while (
            self.membership.missing or any(one.heartbeat is None for one in self.membership.members)
        ) and time.monotonic() < deadline:
            for peer, frame in self._link.receive(POLL_MS):
                try:
                    self.take_in(peer, frame)
                except ConfigError:
                    self._link.send(peer, encode(Refused(str(error))))
            if self._is_ended:
                return

    def _send_heartbeats(self) -> set[ProcessId]:
        """Tell the processes that the driver runs. Returns those whose connection is gone."""
        message = encode(Heartbeat())
        gone: set[ProcessId] = set()
        for process in self._shape.processes:
            member = self.membership.get(process)
            if member is not None and member.heartbeat is not None and not self._link.send(member.heartbeat, message):
                gone.add(process)
        return gone

    def _missing(self) -> WorkerError:
        """Which processes never came."""
        link = self._link
        who = self._shape.names(self.membership.missing)
        text = f"{who} did not connect to {link.address} within {self._connect_timeout_s:g} s (connect_timeout_s)"
        if link.num_strangers:
            where = ", ".join(sorted(link.strangers)) or "an unknown address"
            text += f"; connections with another secret came from {where}"
        return WorkerError(text)

    def _name(self, process: ProcessId) -> str:
        return self._launcher.name(process) or self.membership.name(process)


def _may_say(process: ProcessId, message: Answer | Measured | Files | Ready | Failed) -> bool:
    """Whether a process may say this: what is about a rank's work, the rank's first process says."""
    if isinstance(message, Answer):
        return process.speaks_for_rank and process.rank == message.result.rank
    return process == (speaker(message.measurement.rank) if isinstance(message, Measured) else message.process)
