"""Communicators of a process: with one process of every other rank, and with the other processes of its own rank.

Holds which communicator a device and an executor call for. Must not know plans or models.
Read next: `longspan.group.shape`, ranks and processes; `longspan.comm.base`.

Note [Two groups of a process]
    Processes of equal `tp_index` exchange keys, queries and partials: a cp_group. Those of a rank add their parts: a
    tp_group. Three ranks of two processes, by number:

        rank   0    1    2        cp_groups   {0, 2, 4} and {1, 3, 5}
               0    2    4        tp_groups   {0, 1}, {2, 3} and {4, 5}
               1    3    5

    torch.distributed has one default group per process, so where ranks have several processes it is of all of them, and
    the others are groups within it, which every process makes in one order, its own or not.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist

from longspan.comm.base import Communicator, GroupNames
from longspan.comm.connect import Meeting, Store
from longspan.comm.distributed import DistributedCommunicator, GroupCommunicator
from longspan.comm.nccl import BatchedCommunicator, NCCLCommunicator
from longspan.comm.shared_sums import SharedSums
from longspan.comm.sockets import LOOK_S, SocketCommunicator
from longspan.comm.threads import thread_group
from longspan.cpu_binding import num_cores
from longspan.errors import CommunicationError
from longspan.group.messages import Start
from longspan.group.shape import GroupShape, ProcessId


class Joined(NamedTuple):
    """Communicators of a process. See Note [Two groups of a process]."""

    cp: Communicator
    """One process of every rank; a process has its rank's number in it."""
    tp: Communicator | None
    """The processes of this rank; a process has its `tp_index` as its number in it. None if it is the only one."""
    sums: SharedSums | None
    """Sums of the processes of this rank in memory that they share; None where there is none, or no other process."""


def join(
    process: ProcessId, start: Start, shape: GroupShape, meeting: Meeting, device: torch.device, *, may_look: bool
) -> Joined:
    """Join the communicators of a process.

    Args:
        process: this process.
        start: the driver's start message.
        shape: ranks and processes of the group.
        meeting: where the processes meet.
        device: device of this process.
        may_look: whether a process with a core of its own polls for messages before it sleeps.

    Raises:
        CommunicationError: not all processes came.

    Collective: all processes of the group.
    """
    config, timeout_s = start.config, start.config.exchange_timeout_s
    num_threads = config.num_threads * (shape.world_size if config.cpu_binding == "none" else 1)
    has_core = config.executor == "processes" and num_threads <= num_cores()
    look_s = LOOK_S if may_look and has_core else 0.0
    if shape.world_size == 1:
        return Joined(thread_group(1, timeout_s=timeout_s)[0], None, None)
    if shape.processes_per_rank > 1:
        return _join_both(process, shape, meeting, device, timeout_s, look_s)
    rank, size = process.rank, shape.num_ranks
    if device.type == "cuda":
        return Joined(NCCLCommunicator(rank, size, meeting.init_method, device, timeout_s=timeout_s), None, None)
    return Joined(SocketCommunicator(rank, size, meeting, timeout_s=timeout_s, look_s=look_s), None, None)


def _join_both(
    process: ProcessId, shape: GroupShape, meeting: Meeting, device: torch.device, timeout_s: float, look_s: float
) -> Joined:
    """Join both groups of a process, where ranks have several processes."""
    number, size = shape.number(process), shape.world_size
    world: DistributedCommunicator
    if device.type == "cuda":
        world = NCCLCommunicator(number, size, meeting.init_method, device, timeout_s=timeout_s)
    else:
        world = DistributedCommunicator(number, size, meeting.init_method, timeout_s=timeout_s)
    ranks, indices = range(shape.num_ranks), range(shape.processes_per_rank)
    cp_groups = [_group(shape, [ProcessId(rank, index) for rank in ranks]) for index in indices]
    tp_groups = [_group(shape, [ProcessId(rank, index) for index in indices]) for rank in ranks]
    me = shape.name(process)

    def member(kind: str, group: dist.ProcessGroup, place: int, count: int, noun: str) -> Communicator:
        """Make this process's communicator of a group, in which it has the number `place`."""
        names, store = GroupNames(noun, me), _Within(world.store, kind)
        if count == 1:
            return thread_group(1, timeout_s=timeout_s, names=names)[0]
        if device.type == "cuda":
            return BatchedCommunicator(group, store, timeout_s=timeout_s, names=names)
        large = GroupCommunicator(group, store, timeout_s=timeout_s, names=names)
        where = _meeting_of(meeting, kind)
        return SocketCommunicator(place, count, where, timeout_s=timeout_s, look_s=look_s, large=large)

    rank, index = process
    cp = member(f"c{index}", cp_groups[index], rank, shape.num_ranks, "rank")
    tp = member(f"t{rank}", tp_groups[rank], index, shape.processes_per_rank, "process")
    return Joined(cp, tp, tp.share_sums() if isinstance(tp, SocketCommunicator) else None)


class _Within:
    """Keys of one group in the store of all processes."""

    def __init__(self, store: Store, kind: str) -> None:
        self._store, self._kind = store, kind

    def set(self, key: str, value: bytes) -> None:
        self._store.set(f"{self._kind}-{key}", value)

    def get(self, key: str) -> bytes:
        return self._store.get(f"{self._kind}-{key}")


def _group(shape: GroupShape, members: Iterable[ProcessId]) -> dist.ProcessGroup:
    """Make a group within all processes.

    Collective: all processes, whether they are members or not.
    """
    try:
        group: dist.ProcessGroup = dist.new_group([shape.number(member) for member in members])
    except (RuntimeError, dist.DistError) as error:
        raise CommunicationError(f"the processes of {shape} could not meet: {error}") from error
    return group


def _meeting_of(meeting: Meeting, kind: str) -> Meeting:
    """Return the place where a group meets: a directory of its own, where there is one."""
    if meeting.directory is None:
        return meeting
    directory = meeting.directory / kind
    directory.mkdir(exist_ok=True)
    return meeting._replace(directory=directory)
