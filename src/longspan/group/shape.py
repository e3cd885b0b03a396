"""Ranks, their processes, and how both are counted.

Holds identities and arithmetic. Must not know hosts, process ids, messages or how a process is started.
Read next: `longspan.group.membership`, which processes have come; `longspan.worker.device`, what each computes on.

Note [Rank, process, device]
    A *rank* is a position in the cp_group: it stores pages and computes their tokens. Schedulers, page tables and plans
    speak of ranks alone. A *process* is one of the operating system's; a rank has `processes_per_rank` of them, its
    tensor-parallel peers, and each computes on one *device* of its own. Peers have adjacent numbers, which is how
    torchrun and its like count processes (RANK, below WORLD_SIZE). Three ranks of two processes:

        number      0       1       2       3       4       5
        process     (0, 0)  (0, 1)  (1, 0)  (1, 1)  (2, 0)  (2, 1)      (rank, tp_index)
        rank        0               1               2

    A rank is there when all its processes are, and lost when one of them is. Its first process answers for it; every
    process gives signs of life of its own. Processes with the same `tp_index` exchange keys, queries and partials with
    each other, at their ranks' positions: the communicators of these columns know nothing of each other.
"""

from collections.abc import Iterable
from typing import NamedTuple

from longspan.config import EngineConfig


class ProcessId(NamedTuple):
    """One process of a group, by its place in it."""

    rank: int
    """Its rank's position in the cp_group."""
    tp_index: int
    """Its position among the processes of its rank."""

    @property
    def speaks_for_rank(self) -> bool:
        """Whether this process answers for its rank."""
        return self.tp_index == 0


def speaker(rank: int) -> ProcessId:
    """The process that answers for a rank."""
    return ProcessId(rank, 0)


class GroupShape(NamedTuple):
    """How many ranks a group has, and processes each of them. Its text is for users."""

    num_ranks: int
    processes_per_rank: int

    @classmethod
    def of(cls, config: EngineConfig) -> "GroupShape":
        """The shape of the group that a config describes."""
        return cls(config.context_parallel_size, processes_per_rank=1)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.num_ranks * self.processes_per_rank

    @property
    def processes(self) -> tuple[ProcessId, ...]:
        """All of them, in the order of their numbers."""
        return tuple(self.process(number) for number in range(self.world_size))

    def process(self, number: int) -> ProcessId:
        """The process with a number from 0 and below `world_size`."""
        return ProcessId(*divmod(number, self.processes_per_rank))

    def number(self, process: ProcessId) -> int:
        """The number of a process."""
        return process.rank * self.processes_per_rank + process.tp_index

    def name(self, process: ProcessId) -> str:
        """A process in words: its rank says all where there is one process per rank."""
        suffix = f", process {process.tp_index}" if self.processes_per_rank > 1 else ""
        return f"rank {process.rank}{suffix}"

    def names(self, processes: Iterable[ProcessId]) -> str:
        """Some processes in words; at least one."""
        found = list(processes)
        if len(found) == 1 or self.processes_per_rank > 1:
            return "; ".join(map(self.name, found))
        return f"ranks {', '.join(str(process.rank) for process in found)}"

    def __str__(self) -> str:
        suffix = f" of {self.processes_per_rank} processes" if self.processes_per_rank > 1 else ""
        return f"{self.num_ranks} ranks{suffix}"
