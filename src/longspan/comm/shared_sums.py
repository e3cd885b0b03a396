"""Sums through memory that the processes of a rank have in common.

Holds that memory, pieces of large parts, and what happens when a process does not come. Must not know models or plans.
Read next: `longspan.native.sums` and its C source, Note [Two slots]; `longspan.comm.peers`, which chooses between this
and messages.

A sum of one row of 896 between two processes takes 9 us here, and 47 over a socket, most of it in system calls
(docs/decisions/0090-sums-in-shared-memory.md). Other messages of a rank's processes stay with its communicator.
"""

import mmap
import os
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from longspan.comm.base import GroupNames
from longspan.errors import CommunicationError
from longspan.native import kernels
from longspan.native.sums import LINE, SharedSum, Waited, memory_bytes

SLOT_BYTES = 1024 * 1024
"""Bytes of a part that are added at once; a larger one goes piece by piece."""

CHECK_S = 0.1
"""Seconds of sleep between two looks whether the other processes are still there."""

FIRST_PAUSE, LONGEST_PAUSE = 4, 256
"""Sums for which a process does not look after it has looked in vain, once, and most often."""

_FDS = 1
_YES, _NO = b"y", b"n"


class SharedSums:
    """Sums of a rank's processes, as one of them sees them. All of them make the same calls in the same order."""

    def __init__(
        self,
        memory: np.ndarray,
        index: int,
        size: int,
        *,
        names: GroupNames,
        timeout_s: float,
        look_s: float = 0.0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Take memory that all have.

        Args:
            memory: [memory_bytes(size, SLOT_BYTES)] uint8, zeros at first.
            index: number of this process.
            size: number of processes.
            names: of the processes, in errors.
            timeout_s: longest wait for a process.
            look_s: seconds for which a wait looks before it sleeps; for processes with a core of their own.
            check: raises `CommunicationError` if a process is gone.
        """
        self._memory, self._index, self._size = memory, index, size
        self._names, self._timeout_s, self._check = names, timeout_s, check
        self._look = Look(look_s)
        self._sum = SharedSum(memory.ctypes.data, index, size, SLOT_BYTES)

    def add(self, part: Tensor) -> Tensor:
        """Add the parts of all processes, in the order of processes; the result has the same bits in all of them.

        Args:
            part: contiguous float32 on the CPU, of the same shape in all processes.

        Raises:
            CommunicationError: a process did not come within the deadline, or is gone.

        Collective: all processes of the rank.
        """
        out = torch.empty_like(part)
        if part.nbytes <= SLOT_BYTES:
            self._add(part, out)
            return out
        whole, total, count = part.view(-1), out.view(-1), SLOT_BYTES // part.itemsize
        for start in range(0, len(whole), count):
            self._add(whole[start : start + count], total[start : start + count])
        return out

    def gather(self, part: Tensor, widths: Sequence[int]) -> Tensor:
        """Join the processes' columns in the first process. See `Peers.gather`.

        Args:
            part: [..., w] of what `add` takes; `can_gather` holds.
            widths: columns of each process.

        Collective: all processes of the rank.
        """
        rows = part.shape[:-1]
        slots = [
            torch.from_numpy(self._memory[start : start + rows.numel() * columns * part.itemsize].view(np.float32))
            for start, columns in zip(map(self._sum.next_slot, range(self._size)), widths, strict=True)
        ]
        slots[self._index].copy_(part.reshape(-1))
        nothing = part.new_empty(0)
        self._add(nothing, nothing)
        if self._index:
            return part
        return torch.cat([slot.view(*rows, columns) for slot, columns in zip(slots, widths, strict=True)], dim=-1)

    def can_gather(self, part: Tensor, widths: Sequence[int]) -> bool:
        """Whether the columns of every process fit; the answer is the same in all of them."""
        return part.shape[:-1].numel() * max(widths) * part.itemsize <= SLOT_BYTES

    def _add(self, part: Tensor, out: Tensor) -> None:
        look_s, wait_s = self._look.next_s(), min(CHECK_S, self._timeout_s)
        waited = self._sum.add(part, out, look_s, wait_s)
        if look_s:
            self._look.note(waited)
        if waited is not Waited.IN_VAIN:
            return
        started = time.monotonic()
        while self._sum.again(part, out, wait_s) is Waited.IN_VAIN:
            self._check()
            if time.monotonic() >= started + self._timeout_s:
                missing = ", ".join(self._names.peer(peer) for peer in self._missing())
                raise CommunicationError(
                    f"{self._names.own(self._index)}: sum with {missing} failed: not done within {self._timeout_s:g} s"
                )

    def _missing(self) -> list[int]:
        """Processes that have not written their part of this process's step."""
        steps = [int(self._memory[member * LINE :][:4].view(np.uint32)[0]) for member in range(self._size)]
        return [peer for peer, step in enumerate(steps) if step != steps[self._index]]


class Look:
    """How long a process looks for the others before it sleeps: not at all for a while, after it has looked in vain.

    Waking up takes 30 us, which a look saves where every process has a core. Where another program has a core of
    theirs, or they compute for longer than a look, whoever looks keeps the core busy that the others may wait for.
    """

    def __init__(self, look_s: float) -> None:
        self._look_s, self._pause, self._left = look_s, 0, 0

    def next_s(self) -> float:
        """Seconds to look for in the next sum."""
        if self._left:
            self._left -= 1
            return 0.0
        return self._look_s

    def note(self, waited: Waited) -> None:
        """Note how a sum was waited for in which it looked."""
        if waited is Waited.LOOKED:
            self._pause = 0
        elif waited is not Waited.NOT:
            self._pause = min(2 * self._pause, LONGEST_PAUSE) or FIRST_PAUSE
            self._left = self._pause


def shared_by_threads(size: int, *, names: GroupNames, timeout_s: float) -> list[SharedSums] | list[None]:
    """Make the sums of `size` threads of this process, one for each; None without kernels."""
    if not kernels.is_available():
        return [None] * size
    memory = torch.zeros(memory_bytes(size, SLOT_BYTES), dtype=torch.uint8).numpy()
    return [SharedSums(memory, index, size, names=names, timeout_s=timeout_s) for index in range(size)]


def shared_by_processes(
    sockets: Mapping[int, socket.socket], index: int, *, names: GroupNames, timeout_s: float, look_s: float
) -> SharedSums | None:
    """Make the sums of processes that are connected to each other by sockets.

    The first process makes memory without a name, which goes when the last process does, and sends it to the others.

    Args:
        sockets: to every other process, without messages under way.
        index: number of this process.
        names: see `SharedSums`, as the rest.
        timeout_s: longest wait for a process, here as well.
        look_s: see `SharedSums`.

    Returns:
        None in all processes, where one of them is on another host, or has no kernels.

    Raises:
        CommunicationError: a process is gone, or did not come.

    Collective: all processes of the rank.
    """
    size = len(sockets) + 1
    is_near = all(one.family == socket.AF_UNIX for one in sockets.values())
    can = is_near and kernels.is_available() and hasattr(os, "memfd_create")
    try:
        for one in sockets.values():
            one.settimeout(timeout_s)
        descriptor = _make(sockets, size, can) if index == 0 else _receive(sockets[0], can)
        for one in sockets.values():
            one.setblocking(False)
        if descriptor is None:
            return None
        memory = np.frombuffer(mmap.mmap(descriptor, memory_bytes(size, SLOT_BYTES)), dtype=np.uint8)
        os.close(descriptor)
    except OSError as error:
        raise CommunicationError(f"{names.own(index)}: could not share memory of {size} processes: {error}") from error

    def check() -> None:
        _check_connections(sockets, index, names)

    return SharedSums(memory, index, size, names=names, timeout_s=timeout_s, look_s=look_s, check=check)


def _make(sockets: Mapping[int, socket.socket], size: int, can: bool) -> int | None:
    """Make the memory if all processes can use it, and tell the others; return its descriptor."""
    answers = [one.recv(1) for one in sockets.values()]
    if any(answer not in (_YES, _NO) for answer in answers):
        raise OSError("a process has left")
    if not can or _NO in answers:
        for one in sockets.values():
            one.sendall(_NO)
        return None
    descriptor = os.memfd_create("longspan-sums")
    os.ftruncate(descriptor, memory_bytes(size, SLOT_BYTES))
    for one in sockets.values():
        socket.send_fds(one, [_YES], [descriptor])
    return descriptor


def _receive(first: socket.socket, can: bool) -> int | None:
    """Tell the first process whether this one can use shared memory; return its descriptor, if there is one."""
    first.sendall(_YES if can else _NO)
    answer, descriptors, _, _ = socket.recv_fds(first, 1, _FDS)
    if answer == _NO:
        return None
    if answer != _YES or len(descriptors) != 1:
        raise OSError("the first process has left")
    return descriptors[0]


def _check_connections(sockets: Mapping[int, socket.socket], index: int, names: GroupNames) -> None:
    poller = select.poll()
    peers = {one.fileno(): peer for peer, one in sockets.items()}
    for descriptor in peers:
        poller.register(descriptor, 0)  # a closed connection is always told
    gone = sorted(peers[descriptor] for descriptor, _ in poller.poll(0))
    if gone:
        raise CommunicationError(
            f"{names.own(index)}: sum with {names.peer(gone[0])} failed: it has closed the connection"
        )
