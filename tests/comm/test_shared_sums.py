"""Sums in shared memory: the same bits as those of messages, pieces, late and lost processes, and who can share."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, pairwise

import pytest
import torch

from longspan.comm.base import PROCESSES
from longspan.comm.peers import Peers, span
from longspan.comm.recording import RecordingCommunicator
from longspan.comm.shared_sums import SLOT_BYTES, Look, shared_by_processes, shared_by_threads
from longspan.comm.threads import thread_group
from longspan.errors import CommunicationError
from longspan.native import kernels
from longspan.native.sums import Waited

pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="no C compiler when longspan was installed")


def connected(size):
    """Sockets of every member of a group, by peer."""
    found = [{} for _ in range(size)]
    for one, other in combinations(range(size), 2):
        found[one][other], found[other][one] = socket.socketpair(socket.AF_UNIX)
    return found


def over_sockets(sockets, timeout_s=20.0, look_s=0.0):
    def join(index):
        return shared_by_processes(sockets[index], index, names=PROCESSES, timeout_s=timeout_s, look_s=look_s)

    with ThreadPoolExecutor(len(sockets)) as threads:
        return list(threads.map(join, range(len(sockets))))


def parts_of(size, *shape):
    return torch.randn(size, *shape, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 896), (5, 3, 2), (3, SLOT_BYTES // 4 + 31)])
@pytest.mark.parametrize("by_threads", [False, True])
def test_sums_have_the_bits_of_those_that_are_messages(size, shape, by_threads):
    parts = parts_of(size, *shape)
    shared = shared_by_threads(size, names=PROCESSES, timeout_s=20.0) if by_threads else over_sockets(connected(size))
    found = []
    for sums in (shared, [None] * size):
        comms = thread_group(size, timeout_s=20.0, names=PROCESSES)
        peers = [Peers(comm, one) for comm, one in zip(comms, sums, strict=True)]
        with ThreadPoolExecutor(size) as threads:
            found += threads.map(Peers.sum, peers, parts)
        assert peers[0].bytes_summed > 0
    assert all(torch.equal(one, found[0]) for one in found)
    assert found[0].shape == shape


def test_counts_what_the_others_read_and_leaves_other_dtypes_to_messages():
    shared = shared_by_threads(3, names=PROCESSES, timeout_s=20.0)
    peers = [Peers(comm, one) for comm, one in zip(thread_group(3, timeout_s=20.0), shared, strict=True)]
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(Peers.sum, peers, parts_of(3, 10)))
        assert [peer.bytes_summed for peer in peers] == [3 * 2 * 40] * 3
        halves = list(threads.map(Peers.sum, peers, parts_of(3, 10).bfloat16()))
    assert all(half.dtype is torch.bfloat16 and torch.equal(half, halves[0]) for half in halves)


@pytest.mark.parametrize("num_rows", [1, 5, SLOT_BYTES // 16 + 1])
def test_columns_are_joined_in_the_first_process_between_sums(num_rows):
    """Of few rows in shared memory, of many as messages."""
    size, width = 3, 11
    shared = shared_by_threads(size, names=PROCESSES, timeout_s=20.0)
    comms = [RecordingCommunicator(comm) for comm in thread_group(size, timeout_s=20.0)]
    whole, parts = parts_of(1, num_rows, width)[0], parts_of(size, 3)

    def run(index):
        peers, found = Peers(comms[index], shared[index]), []
        for turn in range(4):
            found.append(peers.gather((whole + turn)[:, span(width, index, size)], width))
            found.append(peers.sum(parts[index] + turn))
        return found

    with ThreadPoolExecutor(size) as threads:
        found = list(threads.map(run, range(size)))
    for turn in range(4):
        assert torch.equal(found[0][2 * turn], whole + turn)
        assert torch.equal(found[2][2 * turn], (whole + turn)[:, span(width, 2, size)]), "its own columns"
        assert all(torch.equal(one[2 * turn + 1], found[0][2 * turn + 1]) for one in found)
    assert (comms[1].messages_sent == 0) == (num_rows < SLOT_BYTES // 16)


def test_a_process_that_does_not_come_is_named():
    shared = shared_by_threads(3, names=PROCESSES, timeout_s=0.2)

    def add(sums):
        with pytest.raises(CommunicationError) as caught:
            sums.add(torch.ones(1))
        return str(caught.value)

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(add, shared[::2]))
    assert found == [f"process {index}: sum with process 1 failed: not done within 0.2 s" for index in (0, 2)]


def test_a_process_that_has_left_is_noticed_long_before_the_deadline():
    sockets = connected(2)
    shared = over_sockets(sockets)
    sockets[1][0].close()
    started = time.monotonic()
    with pytest.raises(CommunicationError, match=r"^process 0: sum with process 1 failed: it has closed the connec"):
        shared[0].add(torch.ones(1))
    assert time.monotonic() - started < 5.0


def test_a_process_that_looks_in_vain_sleeps_at_once_for_longer_and_longer():
    look, looks = Look(0.5), []
    for _ in range(1000):
        looks.append(look.next_s())
        if looks[-1]:
            look.note(Waited.SLEPT)
    gaps = [b - a - 1 for a, b in pairwise(i for i, look_s in enumerate(looks) if look_s)]
    assert gaps == [4, 8, 16, 32, 64, 128, 256, 256]
    while not look.next_s():
        pass
    look.note(Waited.NOT)  # says nothing
    assert look.next_s() == 0.5
    look.note(Waited.LOOKED)
    assert look.next_s() == 0.5
    look.note(Waited.IN_VAIN)
    assert [look.next_s() for _ in range(5)] == [0.0] * 4 + [0.5]
    assert Look(0.0).next_s() == 0.0


def test_memory_is_shared_only_where_all_processes_can(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    sockets = connected(3)
    assert over_sockets(sockets) == [None] * 3
    sockets[0][1].sendall(b"next")
    assert sockets[1][0].recv(8) == b"next", "nothing else is under way"
    monkeypatch.undo()
    sockets[2][0] = Far(sockets[2][0])
    assert over_sockets(sockets) == [None] * 3


class Far:
    """Socket that goes to another host."""

    family = socket.AF_INET

    def __init__(self, near):
        self._near = near

    def __getattr__(self, name):
        return getattr(self._near, name)
