"""Pages as bytes: what one pool gives another one takes, wherever the slots are, in every layout."""

import pytest
import torch
from test_pool import CPU, MIXED, NARROW_VALUES, VALUES_IN_KEYS, make_pool

from longspan.kv.page_bytes import PageBytes
from longspan.kv.state_layout import StateComponent, StateGroup
from longspan.kv.state_pool import StatePool

LAYOUTS = {
    "narrow values": NARROW_VALUES,
    "mixed": MIXED,
    "values in keys": VALUES_IN_KEYS,
    "int8": NARROW_VALUES.stored_as("int8"),
    "fp8": NARROW_VALUES.stored_as("float8_e4m3fn"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_pages_of_one_pool_are_those_of_another_in_other_slots(name):
    source, target = make_pool(LAYOUTS[name]), make_pool(LAYOUTS[name], num_pages=9)
    for rows in source.rows(0, 5):
        rows.view(torch.uint8).copy_(torch.randint(256, rows.view(torch.uint8).shape, dtype=torch.uint8))
    for rows in target.rows(0, 9):
        rows.zero_()
    pages = PageBytes(source.by_slot()).gather([4, 1, 2])
    assert pages.shape == (3, source.group.page_bytes(3))
    PageBytes(target.by_slot()).scatter([0, 8, 5], pages)
    for slot, other in ((4, 0), (1, 8), (2, 5)):
        for rows, others in zip(source.rows(slot, 1), target.rows(other, 1), strict=True):
            assert torch.equal(rows.view(torch.uint8), others.view(torch.uint8))
    assert not any(rows.any() for slot in (1, 2, 3, 4, 6, 7) for rows in target.rows(slot, 1)), "others are untouched"


def test_a_state_is_a_page_of_its_pool():
    components = (StateComponent("conv", 0, (2, 3), "float32"), StateComponent("recurrent", 0, (4,), "float64"))
    groups = [StateGroup((0, 2), components)]
    source, target = StatePool(groups, 3, CPU), StatePool(groups, 2, CPU)
    for layer in (0, 2):
        for tensor in source.tensors[layer]:
            tensor.copy_(torch.randn(tensor.shape))
    pages = PageBytes(source.by_slot()).gather([2])
    assert pages.shape == (1, groups[0].state_bytes)
    PageBytes(target.by_slot()).scatter([1], pages)
    for layer in (0, 2):
        for mine, other in zip(source.state(layer, 2), target.state(layer, 1), strict=True):
            assert torch.equal(mine, other)
