"""Sums of a rank's processes: equal to the bit in all of them, counted, and told apart from other messages."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from longspan.comm.base import PROCESSES
from longspan.comm.checking import CheckingCommunicator, DamagingCommunicator
from longspan.comm.peers import FEW_BYTES, Peers, span
from longspan.comm.recording import RecordingCommunicator
from longspan.comm.threads import thread_group
from longspan.errors import CommunicationError

CPU = torch.device("cpu")


def in_all(size, call, wrap=lambda comm: comm):
    """Results of `call(peers, index)` in every process of a rank, and their communicators."""
    comms = [RecordingCommunicator(wrap(comm)) for comm in thread_group(size, timeout_s=20.0, names=PROCESSES)]
    peers = [Peers(comm) for comm in comms]
    with ThreadPoolExecutor(size) as threads:
        found = list(threads.map(call, peers, range(size)))
    return found, comms, peers


def parts_of(size, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(size)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 7), (5, 3, 2), (FEW_BYTES // 4 + 31,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_the_same_in_all_processes_to_the_bit(size, shape, dtype):
    parts = parts_of(size, shape, dtype)
    found, comms, peers = in_all(size, lambda peer, index: peer.sum(parts[index]))
    wide = parts[0].float()
    for part in parts[1:]:
        wide = wide + part.float()
    for one in found:
        assert torch.equal(one, wide.to(dtype))
    assert sum(comm.bytes_sent for comm in comms) == peers[0].bytes_summed
    whole = parts[0].nbytes <= FEW_BYTES or size == 2
    per_rank = size * (size - 1) if whole else 2 * (size - 1)
    assert peers[0].bytes_summed == per_rank * parts[0].nbytes
    assert comms[0].num_exchanges == (0 if size == 1 else 1 if whole else 2)


def test_a_sum_leaves_its_parts_alone_and_takes_transposed_ones():
    parts = [part.t() for part in parts_of(3, (4, 5))]
    before = [part.clone() for part in parts]
    found, _, _ = in_all(3, lambda peer, index: peer.sum(parts[index]))
    assert all(torch.equal(one, found[0]) for one in found)
    assert torch.allclose(found[0], parts[0] + parts[1] + parts[2])
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))


def test_nothing_is_sent_where_there_is_nothing_to_add():
    found, comms, _ = in_all(2, lambda peer, _: (peer.sum(torch.empty(0, 4)), peer.tell([], CPU)))
    assert all(total.shape == (0, 4) and told == [] for total, told in found)
    assert [comm.messages_sent for comm in comms] == [0, 0]


def test_columns_of_unequal_parts_are_joined_in_the_first_process():
    whole = torch.arange(22.0).view(2, 11)
    found, _, _ = in_all(3, lambda peer, index: peer.gather(whole[:, span(11, index, 3)], 11))
    assert torch.equal(found[0], whole)
    assert found[1].shape == (2, 4), "its own columns"


def test_the_first_process_tells_the_others():
    found, _, _ = in_all(3, lambda peer, index: peer.tell([7 + index, 2**40], CPU))
    assert found == [[7, 2**40]] * 3


def test_spans_cover_all_columns_once():
    for width in (0, 1, 7, 12):
        for size in (1, 2, 5):
            assert [i for index in range(size) for i in range(width)[span(width, index, size)]] == list(range(width))


def test_a_damaged_part_and_a_silent_process_are_noticed():
    def wrap(comm):
        damaging = DamagingCommunicator(comm)
        if comm.rank == 1:
            damaging.damage_next()
        return CheckingCommunicator(damaging, names=PROCESSES)

    def add(peer, _):
        try:
            peer.sum(torch.ones(3))
        except CommunicationError as error:
            return str(error)
        return None

    found, _, _ = in_all(2, add, wrap)
    assert found == ["process 0: a message of 12 bytes from process 1 was damaged on the way", None]
    silent = Peers(thread_group(2, timeout_s=0.05, names=PROCESSES)[0])
    with pytest.raises(CommunicationError, match=r"process 0: nothing from process 1 within 0.05 s"):
        silent.sum(torch.ones(1))
