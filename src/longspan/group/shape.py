"""Ranks, their processes, and the numbers of both.

Holds identities and arithmetic. Must not know hosts, process ids, messages or how a process is started.
Read next: `longspan.group.membership`, the processes that were admitted; `longspan.worker.device`, their devices.

Note [Rank, process, device]
    A *rank* is a position in the cp_group: it stores pages and computes their tokens. Schedulers, page tables and plans
    name ranks alone. A *process* is one of the operating system's; a rank has `processes_per_rank` of them, its
    tensor-parallel peers, and each computes on one *device* of its own. Peers have adjacent numbers, as torchrun
    and similar launchers count processes (RANK, below WORLD_SIZE). Three ranks of two processes:

        number      0       1       2       3       4       5
        process     (0, 0)  (0, 1)  (1, 0)  (1, 1)  (2, 0)  (2, 1)      (rank, tp_index)
        rank        0               1               2

    A rank is ready when all its processes are, and lost when one of them is. Its first process answers for it; every
    process gives signs of life of its own. Processes with the same `tp_index` exchange keys, queries and partials with
    each other, at their ranks' positions: each such column has a communicator of its own.
"""

from collections.abc import Iterable
from typing import NamedTuple

from longspan.config import EngineConfig


class ProcessId(NamedTuple):
    """Place of a process in its group."""

    rank: int
    """Position of the process's rank in the cp_group."""
    tp_index: int
    """Position of the process among those of its rank."""

    @property
    def speaks_for_rank(self) -> bool:
        """Whether this process answers for its rank."""
        return self.tp_index == 0


def speaker(rank: int) -> ProcessId:
    """Process that answers for a rank."""
    return ProcessId(rank, 0)


class GroupShape(NamedTuple):
    """Number of ranks in a group, and of processes per rank. Its text form is for users."""

    num_ranks: int
    processes_per_rank: int

    @classmethod
    def of(cls, config: EngineConfig) -> "GroupShape":
        """Shape of the group that a config describes."""
        return cls(config.context_parallel_size, config.tensor_parallel_size)

    @property
    def world_size(self) -> int:
        """Number of processes in the group."""
        return self.num_ranks * self.processes_per_rank

    @property
    def processes(self) -> tuple[ProcessId, ...]:
        """All processes, in the order of their numbers."""
        return tuple(self.process(number) for number in range(self.world_size))

    def process(self, number: int) -> ProcessId:
        """Process with a number from 0 to `world_size - 1`."""
        return ProcessId(*divmod(number, self.processes_per_rank))

    def number(self, process: ProcessId) -> int:
        """Number of a process."""
        return process.rank * self.processes_per_rank + process.tp_index

    def name(self, process: ProcessId) -> str:
        """Name of a process for the user: just its rank where a rank has one process."""
        suffix = f", process {process.tp_index}" if self.processes_per_rank > 1 else ""
        return f"rank {process.rank}{suffix}"

    def names(self, processes: Iterable[ProcessId]) -> str:
        """Names of one or more processes for the user."""
        found = list(processes)
        if len(found) == 1 or self.processes_per_rank > 1:
            return "; ".join(map(self.name, found))
        return f"ranks {', '.join(str(process.rank) for process in found)}"

    def __str__(self) -> str:
        suffix = f" of {self.processes_per_rank} processes" if self.processes_per_rank > 1 else ""
        return f"{self.num_ranks} rank{'s' * (self.num_ranks != 1)}{suffix}"
