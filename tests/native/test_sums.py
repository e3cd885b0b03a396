"""The kernel of shared sums: bits, slots that take turns, and members that come late."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from longspan.native import kernels
from longspan.native.sums import SharedSum, Waited, can_add, memory_bytes

pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="no C compiler when longspan was installed")

SLOT = 4096


def members(size):
    memory = torch.zeros(memory_bytes(size, SLOT), dtype=torch.uint8)
    return memory, [SharedSum(memory.data_ptr(), index, size, SLOT) for index in range(size)]


def wait(member, part, out):
    if member.add(part, out, 0.0, 5.0) is Waited.IN_VAIN:
        raise AssertionError("the others did not come")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 31, 513, SLOT // 4])
def test_many_sums_in_turn_have_the_same_bits_in_all_members(size, count):
    memory, group = members(size)
    num_sums = 20
    parts = torch.randn(num_sums, size, count, generator=torch.Generator().manual_seed(size))
    outs = torch.zeros(num_sums, size, count)

    def run(index):
        for turn in range(num_sums):
            wait(group[index], parts[turn, index], outs[turn, index])

    with ThreadPoolExecutor(size) as threads:
        list(threads.map(run, range(size)))
    for turn in range(num_sums):
        wanted = parts[turn, 0].clone()
        for index in range(1, size):
            wanted += parts[turn, index]
        assert all(torch.equal(out, wanted) for out in outs[turn])
    assert len(memory) == size * 128 + 2 * size * SLOT


def test_a_member_that_comes_late_is_waited_for_again():
    _, group = members(2)
    parts, outs = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    started = time.monotonic()
    assert group[0].add(parts[0], outs[0], 0.001, 0.02) is Waited.IN_VAIN
    assert time.monotonic() - started >= 0.02
    assert outs[0] == 0
    late = threading.Timer(0.05, lambda: wait(group[1], parts[1], outs[1]))
    late.start()
    assert group[0].again(parts[0], outs[0], 5.0) is Waited.SLEPT
    late.join()
    assert outs.tolist() == [[3.0], [3.0]]


def test_it_says_how_the_others_were_waited_for():
    _, group = members(2)
    parts, outs = torch.ones(2, 3), torch.zeros(2, 3)
    late = threading.Timer(0.05, lambda: wait(group[1], parts[1], outs[1]))
    late.start()
    assert group[0].add(parts[0], outs[0], 5.0, 0.0) is Waited.LOOKED
    late.join()
    assert group[0].add(parts[0], outs[0], 0.0, 0.0) is Waited.IN_VAIN
    assert group[1].add(parts[1], outs[1], 0.0, 0.0) is Waited.NOT
    assert group[0].again(parts[0], outs[0], 0.0) is Waited.NOT


def test_steps_go_on_behind_the_largest_number():
    memory, group = members(2)
    for member in group:
        member._step = 2**32 - 2
    memory.view(torch.uint8)[:256].view(torch.int32)[[0, 32]] = -2  # the same number, unsigned
    parts, outs = torch.ones(2, 3), torch.zeros(2, 3)

    def run(index):
        for _ in range(3):
            wait(group[index], parts[index], outs[index])

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(run, range(2)))
    assert outs.tolist() == [[2.0] * 3] * 2
    assert [member._step for member in group] == [1, 1]


def test_rejects_parts_that_do_not_fit_and_other_dtypes():
    _, group = members(1)
    with pytest.raises(AssertionError, match="refused to add 1025 elements"):
        group[0].add(torch.zeros(1025), torch.zeros(1025), 0.0, 0.0)
    assert can_add(torch.zeros(3))
    assert not can_add(torch.zeros(3, dtype=torch.bfloat16))
