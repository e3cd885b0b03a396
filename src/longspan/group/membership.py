"""Who has come: the workers of a group, as they introduce themselves, and whether they fit together.

Holds what is known of every rank, and the comparisons. Must not know sockets, time or processes.
Read next: `longspan.engine.workers`.
"""

from collections.abc import Sequence

from longspan.errors import ConfigError
from longspan.group.messages import Hello, Versions


class Roster:
    """The ranks of one group."""

    def __init__(self, size: int, versions: Versions) -> None:
        """Args: ranks expected, and the driver's own versions."""
        self._size, self._versions = size, versions
        self._hellos: dict[int, Hello] = {}
        self._fingerprints: dict[int, str] = {}
        self._ready: set[int] = set()

    def admit(self, hello: Hello) -> None:
        """A worker introduces itself.

        Raises:
            ConfigError: it cannot be in this group.
        """
        who = _name(hello)
        if hello.world_size != self._size:
            raise ConfigError(
                f"WORLD_SIZE: got {hello.world_size} from {who}, legal is the driver's context_parallel_size, "
                f"{self._size}"
            )
        if not 0 <= hello.rank < self._size:
            raise ConfigError(f"RANK: got {hello.rank} from {who}, legal is 0 to {self._size - 1}")
        if hello.rank in self._hellos:
            raise ConfigError(
                f"RANK: got {hello.rank} from {who} and from {_name(self._hellos[hello.rank])}, legal is one process "
                "per rank"
            )
        for package in Versions.__struct_fields__:
            theirs, ours = getattr(hello.versions, package), getattr(self._versions, package)
            if theirs != ours:
                raise ConfigError(f"version of {package}: got {theirs} from {who}, legal is the driver's, {ours}")
        self._hellos[hello.rank] = hello

    def compare_files(self, rank: int, fingerprint: str) -> None:
        """A rank tells which files it has of the model.

        Raises:
            ConfigError: another rank has others.
        """
        self._fingerprints[rank] = fingerprint
        for other, theirs in sorted(self._fingerprints.items()):
            if theirs != fingerprint:
                first, second = sorted((rank, other))
                raise ConfigError(
                    f"model: got other files on {self.name(second)} than on {self.name(first)}, legal is the same "
                    "config.json and weights on all hosts"
                )

    def note_ready(self, rank: int) -> bool:
        """A rank can run plans. Returns whether now all can, for the first time."""
        was_complete = len(self._ready) == self._size
        self._ready.add(rank)
        return len(self._ready) == self._size and not was_complete

    def is_ready(self, rank: int) -> bool:
        return rank in self._ready

    def has_come(self, rank: int) -> bool:
        return rank in self._hellos

    def is_process(self, rank: int, host: str, pid: int) -> bool:
        """Whether this is the process of a rank that has come."""
        hello = self._hellos.get(rank)
        return hello is not None and (hello.host, hello.pid) == (host, pid)

    @property
    def missing(self) -> Sequence[int]:
        """Ranks that have not come."""
        return [rank for rank in range(self._size) if rank not in self._hellos]

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host of every rank; all must have come."""
        return tuple(self._hellos[rank].host for rank in range(self._size))

    def name(self, rank: int) -> str:
        """A rank in words, with process and host if it has come."""
        return _name(self._hellos[rank]) if rank in self._hellos else f"rank {rank}"


def _name(hello: Hello) -> str:
    return f"rank {hello.rank} (pid {hello.pid} on {hello.host})"
