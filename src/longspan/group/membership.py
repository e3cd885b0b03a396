"""Membership of a group: the processes that the driver admitted, and which of them can run plans.

Holds the driver's knowledge of every process. Must not know sockets (a connection is a name here), time, or how a
process is started.
Read next: `longspan.group.shape`; `longspan.engine.watch`, which uses this.
"""

import ipaddress
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from longspan.errors import ConfigError
from longspan.group.messages import Alive, Hello, Versions
from longspan.group.shape import GroupShape, ProcessId, speaker


@dataclass(slots=True)
class Member:
    """Process that was admitted."""

    hello: Hello
    """Introduction of the process."""
    voice: bytes
    """Connection for plans and answers."""
    heartbeat: bytes | None = None
    """Connection for signs of life; None until the first one comes."""
    fingerprint: str | None = None
    """Fingerprint of the model's files on the process's host; None until the process sends it."""
    is_ready: bool = False
    """Whether the process can run plans."""

    @property
    def urgent(self) -> bytes:
        """Connection that the process hears while it computes: the heartbeat's; before its first sign, the voice."""
        return self.heartbeat or self.voice


class Membership:
    """Processes of one group, from their admission on."""

    def __init__(self, shape: GroupShape, versions: Versions, pool_bytes: Sequence[int] | None = None) -> None:
        """Start without a member.

        Args:
            shape: ranks and processes that are expected.
            versions: the driver's own versions.
            pool_bytes: memory of its host that every rank is to hold KV in; None for none.
        """
        self._shape, self._versions = shape, versions
        self._pool_bytes = pool_bytes or (0,) * shape.num_ranks
        self._members: dict[ProcessId, Member] = {}
        # For every plan and answer, so kept: connections of each rank, and the process at each connection.
        self._voices: list[list[bytes]] = [[] for _ in range(shape.num_ranks)]
        self._speakers: dict[bytes, ProcessId] = {}

    def admit(self, hello: Hello, voice: bytes) -> ProcessId:
        """Admit a process that introduces itself over a connection; return its id.

        Raises:
            ConfigError: the process cannot be in this group.
        """
        shape = self._shape
        who = self._described(hello)
        if hello.world_size != shape.world_size:
            times = f" x {shape.processes_per_rank} processes per rank" if shape.processes_per_rank > 1 else ""
            raise ConfigError(
                f"WORLD_SIZE: got {hello.world_size} from {who}, legal is the driver's context_parallel_size{times}, "
                f"{shape.world_size}"
            )
        if not 0 <= hello.number < shape.world_size:
            raise ConfigError(f"RANK: got {hello.number} from {who}, legal is 0 to {shape.world_size - 1}")
        process = shape.process(hello.number)
        if process in self._members:
            raise ConfigError(
                f"RANK: got {hello.number} from {who} and from {self.name(process)}, legal is each number once"
            )
        for package in Versions.__struct_fields__:
            theirs, ours = getattr(hello.versions, package), getattr(self._versions, package)
            if theirs != ours:
                raise ConfigError(f"version of {package}: got {theirs} from {who}, legal is the driver's, {ours}")
        self._check_host(process, hello, who)
        self._check_memory(process.rank, hello, who)
        self._check_addresses(hello)
        self._members[process] = Member(hello, voice)
        self._voices[process.rank].append(voice)
        self._speakers[voice] = process
        return process

    def _check_host(self, process: ProcessId, hello: Hello, who: str) -> None:
        """Check that the processes of a rank share a host: they add up after every product of a layer.

        Raises:
            ConfigError: another process of the rank is on another host.
        """
        for other, member in self._members.items():
            if other.rank == process.rank and member.hello.host != hello.host:
                number, size = self._shape.number(process), self._shape.processes_per_rank
                first = size * process.rank
                raise ConfigError(
                    f"RANK: got {number} from {who}, and {self._shape.number(other)} from {self.name(other)}, legal is "
                    f"one host for both: {first} to {first + size - 1} are one rank (tensor_parallel_size)"
                )

    def _check_memory(self, rank: int, hello: Hello, who: str) -> None:
        """Check that a host has the memory that the driver means its ranks to have.

        Raises:
            ConfigError: the pools of this rank and of those that came before it from its host are too large.
        """
        others = [p.rank for p, member in self._members.items() if member.hello.host == hello.host and p.rank != rank]
        ranks = sorted({rank, *others})
        needed = sum(self._pool_bytes[one] for one in ranks)
        if needed > hello.memory_bytes:
            raise ConfigError(
                f"kv_cache_memory: got {self._pool_bytes[rank]} bytes for {who}, and {needed} with all ranks of its "
                f"host so far, legal is what the host has, {hello.memory_bytes} bytes"
            )

    def _check_addresses(self, hello: Hello) -> None:
        """Check that processes on several hosts can find each other, when one more has come.

        Raises:
            ConfigError: one of them is found at its own host's loopback, or looks for process 0 there.
        """
        hellos = [member.hello for member in self._members.values()] + [hello]
        if len({one.host for one in hellos}) == 1:
            return
        first = next((one for one in hellos if one.number == 0), None)
        for one in hellos:
            who = self._described(one)
            if one.address is not None and ipaddress.ip_address(one.address).is_loopback:
                raise ConfigError(
                    f"interface: got none for {who}, whose address would be {one.address}, its own host's alone, while "
                    "others are on other hosts; legal is --interface with one that they reach"
                )
            if one.master is not None and first is not None and first.host != one.host:
                raise ConfigError(
                    f"MASTER_ADDR: got {one.master!r} from {who}, where that is its own host, legal is an address of "
                    f"{first.host}, the host of {self._shape.name(self._shape.process(0))}"
                )

    def compare_files(self, process: ProcessId, fingerprint: str) -> None:
        """Note the fingerprint of the model's files on a process's host.

        Raises:
            ConfigError: another process has different files.
        """
        self._members[process].fingerprint = fingerprint
        for other, member in sorted(self._members.items()):
            if member.fingerprint not in (None, fingerprint):
                first, second = sorted((process, other))
                raise ConfigError(
                    f"model: got other files on {self.name(second)} than on {self.name(first)}, legal is the same "
                    "config.json and weights on all hosts"
                )

    def note_ready(self, process: ProcessId) -> bool:
        """Note that a process can run plans; return True once, when all processes can."""
        if self._members[process].is_ready:
            return False
        self._members[process].is_ready = True
        return all(self.is_ready(rank) for rank in range(self._shape.num_ranks))

    def note_alive(self, alive: Alive, heartbeat: bytes) -> ProcessId | None:
        """Note a sign of life that came over a connection; return its process, None if that was not admitted."""
        process = self._shape.process(alive.number)
        member = self._members.get(process)
        if member is None or (member.hello.host, member.hello.pid) != (alive.host, alive.pid):
            return None
        if member.heartbeat is None:
            member.heartbeat = heartbeat
        return process

    def get(self, process: ProcessId) -> Member | None:
        """Return the member of an id; None if the process has not been admitted."""
        return self._members.get(process)

    def at(self, voice: bytes) -> ProcessId | None:
        """The process that speaks over a connection; None if none was admitted over it."""
        return self._speakers.get(voice)

    @property
    def members(self) -> Collection[Member]:
        """All admitted processes."""
        return self._members.values()

    def is_ready(self, rank: int) -> bool:
        """Whether all processes of a rank can run plans."""
        found = [self._members.get(ProcessId(rank, i)) for i in range(self._shape.processes_per_rank)]
        return all(member is not None and member.is_ready for member in found)

    def voices(self, rank: int) -> Sequence[bytes]:
        """Connections for plans of a rank's processes."""
        return self._voices[rank]

    @property
    def missing(self) -> list[ProcessId]:
        """Processes that have not been admitted yet."""
        return [process for process in self._shape.processes if process not in self._members]

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host of every rank's first process; all of them must have been admitted."""
        return tuple(self._members[speaker(rank)].hello.host for rank in range(self._shape.num_ranks))

    def name(self, process: ProcessId) -> str:
        """Name of a process for the user, with its operating-system id and host if it has been admitted."""
        member = self._members.get(process)
        return self._shape.name(process) if member is None else self._described(member.hello)

    def _described(self, hello: Hello) -> str:
        return f"{self._shape.name(self._shape.process(hello.number))} (pid {hello.pid} on {hello.host})"
