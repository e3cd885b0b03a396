"""Watch over the processes of a group: their messages, and whether they are alive.

Holds the thread that receives messages, and the reaction to each message and sign of failure. Must not know how
processes are started, schedulers, or requests.
Read next: `longspan.engine.workers`, which sends plans; `longspan.group.failures`, which finds the cause of a failure.
"""

import threading
import time
from concurrent.futures import Future

import msgspec

from longspan.engine.executor import PendingAdapters, PendingMeasurements, PendingMoves, PendingPlans
from longspan.engine.launcher import Launcher
from longspan.errors import ConfigError, LongspanError, WorkerError
from longspan.group.driver_link import DriverLink
from longspan.group.failures import Failures
from longspan.group.liveness import Liveness
from longspan.group.membership import Membership
from longspan.group.messages import (
    AdapterLoaded,
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
from longspan.plan.moves import Moved

POLL_MS = 100
"""Milliseconds between checks for dead processes while no message arrives."""

HEARTBEAT_EVERY_S = 0.5
"""Seconds between heartbeats to workers, which also reveal connections that are gone."""

LATECOMERS_S = 2.0
"""Seconds that a group that cannot start goes on telling so to workers that connect a little later."""

GRACE_S = 0.5
"""Seconds that the driver listens after a first sign of failure, to tell the cause from its consequences."""


FromMember = Answer | Moved | AdapterLoaded | Measured | Files | Ready | Failed
"""Messages of a process that was admitted."""


class Watch:
    """Receives the messages of one group's processes, in its own thread, until it is ended or the group has failed."""

    def __init__(
        self, start: Start, shape: GroupShape, launcher: Launcher, link: DriverLink, given_up: threading.Event
    ) -> None:
        """Make the watch; call `begin` when the processes are being started.

        Args:
            start: what every process is told.
            shape: shape of the group.
            launcher: launcher of the group's processes.
            link: link to the processes.
            given_up: event that is set when the caller no longer waits for the processes.
        """
        self._shape, self._launcher, self._link, self._given_up = shape, launcher, link, given_up
        self._is_first = start.generation == 0
        self._start = encode(msgspec.structs.replace(start, directory=launcher.directory))
        self._connect_timeout_s = start.config.connect_timeout_s
        self._failures = Failures(shape)
        self._liveness = Liveness(shape.processes, start.config.exchange_timeout_s)
        self.membership = Membership(shape, own_versions(), _pool_bytes(start))
        """Processes that have connected."""
        self.pending = PendingPlans()
        """Plans in flight."""
        self.moves = PendingMoves()
        """Moves of pages in flight."""
        self.adapters = PendingAdapters(shape.world_size)
        """Adapters that the processes were told to load."""
        self.measurements = PendingMeasurements(shape.num_ranks)
        """Measurements that the ranks were asked for."""
        self.ready: Future[None] = Future()
        """Future that is done when all processes can run plans; fails if the group fails before."""
        self._is_ended = False
        self._thread = threading.Thread(target=self._run, name="longspan-watch", daemon=True)

    # -- the caller's thread -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the thread."""
        self._thread.start()

    def end(self) -> None:
        """End the thread, and wait for its end."""
        self._is_ended = True
        if self._thread.ident is not None:
            self._link.wake()
            self._thread.join()

    def tell_all(self, message: Stop | Refused) -> None:
        """Send a message to processes that no signal reaches, busy or not. After `end` any thread may call it."""
        if self._launcher.is_remote:
            for member in self.membership.members:
                self._link.send(member.urgent, encode(message))

    # -- the thread of the watch -------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Receive messages and notice processes that are gone; after a failure, end all of them."""
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
            finally:  # whatever happens to the processes, no caller may go on waiting for them
                self.pending.fail(error)
                self.moves.fail(error)
                self.adapters.fail(error)
                self.measurements.fail(error)
                if not self.ready.done():
                    self.ready.set_exception(error)

    def _listen(self) -> Exception | None:
        """Return why the group failed, or None when the watch is ended."""
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
                self._take_in_all(0)  # last messages, which arrive after a process's end
                return self._failures.cause()
            if self.membership.missing and now - began > self._connect_timeout_s:
                return self._missing()
        return None

    def _take_in_all(self, timeout_ms: int) -> ConfigError | None:
        """Take in messages; return why the group cannot be started, if a message shows that."""
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
            peer: connection that the message came over.
            frame: bytes of the message.

        Raises:
            ConfigError: the sender cannot be in this group.
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
        """Admit a process that introduces itself.

        Raises:
            ConfigError: the process cannot be in this group.
        """
        is_early = self._failures.first_s is not None and self.ready.done()  # it belongs to the group that comes next
        known = self.membership.get(self._shape.process(hello.number))
        if is_early or (known is not None and known.voice == peer):  # or it came twice, over a connection made twice
            return
        self._liveness.got_further(self.membership.admit(hello, peer))
        self._link.send(peer, self._start)

    def _hear(self, process: ProcessId, message: FromMember) -> None:
        """Take in a message of a process of the group.

        Raises:
            ConfigError: the message shows that its sender cannot be in this group.
        """
        if isinstance(message, Answer):
            self._liveness.got_further(process)
            self.pending.answer(message.result)
        elif isinstance(message, Moved):
            self.moves.answer(message)
        elif isinstance(message, AdapterLoaded):
            self.adapters.answer(message.adapter_id, message.error)
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
        """Check whether a process has ended, or has been silent for too long."""
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
        """Refuse processes that connect while the group fails to start: they would wait for a driver that is gone."""
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
        """Tell the processes that the driver runs; return those whose connection is gone."""
        message = encode(Heartbeat())
        gone: set[ProcessId] = set()
        for process in self._shape.processes:
            member = self.membership.get(process)
            if member is not None and member.heartbeat is not None and not self._link.send(member.heartbeat, message):
                gone.add(process)
        return gone

    def _missing(self) -> WorkerError:
        """Return the error that names the processes that never connected."""
        link = self._link
        who = self._shape.names(self.membership.missing)
        text = f"{who} did not connect to {link.address} within {self._connect_timeout_s:g} s (connect_timeout_s)"
        if link.num_strangers:
            where = ", ".join(sorted(link.strangers)) or "an unknown address"
            text += f"; connections with another secret came from {where}"
        return WorkerError(text)

    def _name(self, process: ProcessId) -> str:
        return self._launcher.name(process) or self.membership.name(process)


def _pool_bytes(start: Start) -> list[int] | None:
    """KV and states of every rank in the memory of its host, in bytes; None if they are elsewhere."""
    if start.config.device == "cuda":
        return None
    sizes = [group.page_bytes(start.config.page_size) for group in start.spec.kv_groups]
    if start.spec.state_groups:
        sizes.append(start.spec.state_bytes)
    parts = start.config.tensor_parallel_size
    own = [parts * sum(count * size for count, size in zip(of_rank, sizes, strict=True)) for of_rank in start.num_pages]
    drafts = None if start.draft is None else _pool_bytes(start.draft)
    return own if drafts is None else [sum(of_rank) for of_rank in zip(own, drafts, strict=True)]


def _may_say(process: ProcessId, message: FromMember) -> bool:
    """Whether a process may send a message; answers and measurements come only from a rank's first process."""
    if isinstance(message, Answer):
        return process.speaks_for_rank and process.rank == message.result.rank
    if isinstance(message, Moved):
        return process.speaks_for_rank and process.rank == message.rank
    return process == (speaker(message.measurement.rank) if isinstance(message, Measured) else message.process)
