"""Slots hold states of layers that differ in layout, and bytes are those of the tensors."""

import torch

from longspan.kv.state_layout import StateComponent, StateGroup
from longspan.kv.state_pool import StatePool

CONV = StateComponent("conv", 0, (6, 4), "bfloat16")
DELTA = StateComponent("recurrent", 0, (2, 3, 5), "float32")
GROUPS = (StateGroup((0, 2), (CONV, DELTA)), StateGroup((3,), (CONV,)))


def test_bytes_are_those_of_the_tensors():
    pool = StatePool(GROUPS, 7, torch.device("cpu"))
    found = sum(tensor.nbytes for tensors in pool.tensors.values() for tensor in tensors)
    assert found == 7 * sum(group.state_bytes for group in GROUPS)
    assert GROUPS[0].state_bytes == 2 * (6 * 4 * 2 + 2 * 3 * 5 * 4)
    assert list(pool.components) == [0, 2, 3]


def test_a_slot_is_contiguous_and_gathered_states_are_copies():
    pool = StatePool(GROUPS, 5, torch.device("cpu"))
    slots = torch.tensor([4, 1])
    pool.scatter(2, slots, [torch.full((2, 6, 4), 3.0, dtype=torch.bfloat16), torch.ones(2, 2, 3, 5)])
    conv, delta = pool.state(2, 1)
    assert conv.is_contiguous()
    assert delta.is_contiguous()
    assert float(conv[0, 0, 0]) == 3
    assert float(delta.sum()) == 30
    gathered = pool.gather(2, slots)
    gathered[1].zero_()
    assert float(pool.state(2, 4)[1].sum()) == 30
    assert [tuple(tensor.shape) for tensor in pool.empty(3)] == [(1, 6, 4)]
