"""What travels between ranks of keys and values: one message, as they are stored."""

import pytest
import torch

from longspan.cp.base import KVBlock
from longspan.kv.layout import KVComponent, KVLayout, KVSpec
from longspan.sharding.pages import KeyRun

CPU = torch.device("cpu")
LAYOUTS = pytest.mark.parametrize(
    "layout",
    [
        KVSpec.uniform(2, 8, 8, "bfloat16").layout,
        KVSpec.uniform(3, 5, 7, "float32").layout,
        KVLayout((KVComponent("k", 1, 9, "float32"),), v_width_in_k=6),
    ],
    ids=["equal widths", "unequal widths", "values in keys"],
)


@LAYOUTS
@pytest.mark.parametrize("runs", [[(3, 4)], [(3, 4), (9, 1), (0, 2)]], ids=["one run", "several runs"])
def test_a_message_brings_rows_of_a_pool_to_another_rank(layout, runs):
    k = torch.randn(layout.num_kv_heads, 12, layout.k_width).to(getattr(torch, layout.components[0].dtype))
    v = k[:, :, : layout.v_width] if layout.v_width_in_k else torch.randn(k.shape[0], 12, layout.v_width).to(k.dtype)
    sent, received = KVBlock(layout, 10, CPU), KVBlock(layout, 10, CPU)
    num_rows = sent.pack(k, v, [(0, KeyRun(0, row, count)) for row, count in runs])
    message = sent.message(num_rows)
    assert message.nbytes == num_rows * layout.token_bytes
    received.message(num_rows).copy_(message)
    rows = [row + i for row, count in runs for i in range(count)]
    found_k, found_v = received.views(num_rows)
    assert torch.equal(found_k, k[:, rows])
    assert torch.equal(found_v, v[:, rows])
