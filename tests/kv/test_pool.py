"""Pools hold what a layout says, and move rows of all of it."""

import pytest
import torch

from longspan.kv.layout import KVComponent, KVGroup, KVLayout, KVSpec
from longspan.kv.pool import PagePool

CPU = torch.device("cpu")
NARROW_VALUES = KVSpec.uniform(2, 8, 4, "float32").layout
MIXED = KVLayout((KVComponent("k", 2, 8, "bfloat16"), KVComponent("v", 2, 8, "float32")))
VALUES_IN_KEYS = KVLayout((KVComponent("k", 1, 9, "float32"),), v_width_in_k=6)
LAYOUTS = pytest.mark.parametrize(
    "layout", [NARROW_VALUES, MIXED, VALUES_IN_KEYS], ids=["narrow values", "mixed", "values in keys"]
)


def make_pool(layout: KVLayout, num_pages: int = 5, page_size: int = 3) -> PagePool:
    return PagePool(KVGroup((1, 4), KVSpec(layout, "float32"), 4), num_pages, page_size, CPU)


def new_tokens(layout: KVLayout, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of new tokens, each in the dtype in which it is stored."""
    k = torch.randn(layout.num_kv_heads, count, layout.k_width).to(getattr(torch, layout.components[0].dtype))
    if layout.v_width_in_k is not None:
        return k, k[:, :, : layout.v_width]
    return k, torch.randn(layout.num_kv_heads, count, layout.v_width)


@LAYOUTS
def test_a_pool_takes_the_bytes_that_its_layout_says(layout):
    pool = make_pool(layout)
    assert sum(rows.nbytes for rows in pool.rows(0, 5)) == 5 * pool.group.page_bytes(3)
    assert sum(rows.nbytes for rows in pool.rows(2, 1)) == pool.group.page_bytes(3)
    assert len(pool.rows(0, 5)) == 2 * len(layout.components)


@LAYOUTS
@pytest.mark.parametrize("is_scattered", [False, True])
def test_what_is_stored_is_found_in_its_row(layout, is_scattered):
    pool, (k, v) = make_pool(layout), new_tokens(layout, 4)
    if is_scattered:
        pool.scatter(4, k, v, torch.tensor([7, 8, 2, 12]))
    else:
        pool.write(4, k, v, [(0, 7, 2), (2, 2, 1), (3, 12, 1)])
    rows = [7, 8, 2, 12]
    assert torch.equal(pool.k[4][:, rows], k)
    assert torch.equal(pool.v[4][:, rows], v)


@LAYOUTS
def test_copied_pages_hold_the_same_in_every_layer(layout):
    pool = make_pool(layout)
    for rows in pool.rows(0, 5):
        rows.copy_(torch.randn(rows.shape))
    pool.copy_pages_(1, 3, 2)
    for source, target in zip(pool.rows(1, 2), pool.rows(3, 2), strict=True):
        assert torch.equal(source, target)


def test_values_in_keys_are_no_second_copy():
    pool = make_pool(VALUES_IN_KEYS)
    pool.k[1].zero_()
    pool.v[1][0, 3] = 7.0
    assert pool.k[1][0, 3].tolist() == [7.0] * 6 + [0.0] * 3


def group_of(layers: tuple[int, ...]) -> KVGroup:
    return KVGroup(layers, KVSpec.uniform(2, 4, 4, "float32"), 4)


def test_groups_that_share_memory_take_their_layers_tensors_in_order():
    memory = PagePool(group_of((1, 4)), 5, 3, CPU)
    whole, part = (PagePool(group_of(layers), 5, 3, CPU, memory=memory) for layers in ((0, 3), (2,)))
    whole.k[0].fill_(1.0)
    whole.v[3].fill_(2.0)
    assert torch.equal(memory.k[1], whole.k[0])
    assert torch.equal(part.k[2], whole.k[0])
    assert torch.equal(memory.v[4], whole.v[3])


@pytest.mark.parametrize(("layers", "num_pages"), [((1, 2, 3), 5), ((1,), 4)])
def test_rejects_memory_that_is_smaller_or_has_other_pages(layers, num_pages):
    memory = PagePool(group_of((0, 4)), 5, 3, CPU)
    with pytest.raises(AssertionError):
        PagePool(group_of(layers), num_pages, 3, CPU, memory=memory)
