"""Messages of partials: what lies where, how many bytes there are, and what comes out of them."""

import pytest
import torch
from cp_cases import make_group

from longspan.attention.partial import PartialAttention
from longspan.cp.wire import PartialMessage, partial_views
from longspan.plan.message_format import PartialFormat, row_bytes

DEVICE = torch.device("cpu")


def partial_of(num_rows, num_heads, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(num_rows, num_heads, width, generator=generator, dtype=dtype)
    return PartialAttention(out, torch.randn(num_rows, num_heads, generator=generator, dtype=dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_a_message_has_the_bytes_that_the_cost_model_counts(dtype, num_rows):
    group = make_group([0], query_heads=3, v_width=5, dtype=dtype)
    form = PartialFormat.of(group)
    assert PartialMessage(form, num_rows, DEVICE).data.numel() == num_rows * row_bytes("partial", group)


def test_the_log_sum_exps_lie_before_the_rows_they_belong_to():
    form = PartialFormat.of(make_group([0], query_heads=2, v_width=4, dtype="bfloat16"))  # the note's example
    assert (3 * form.lse_bytes, 3 * form.row_bytes) == (24, 72)
    data = torch.zeros(72, dtype=torch.uint8)
    lse, out = partial_views(data, form, 3)
    lse.fill_(1.0)
    assert data[:24].view(torch.float32).tolist() == [1.0] * 6
    out.fill_(2.0)
    assert data[24:].view(torch.bfloat16).tolist() == [2.0] * 24


def test_several_messages_in_one_tensor_are_each_laid_out_like_one_alone():
    form = PartialFormat.of(make_group([0], query_heads=2, v_width=4, dtype="bfloat16"))
    data = torch.zeros(2, 3 * form.row_bytes, dtype=torch.uint8)
    lses, outs = partial_views(data, form, 2, 3)
    partial = partial_of(3, 2, 4)
    lses[1], outs[1] = partial.lse, partial.out
    assert data[1].equal(PartialMessage(form, 3, DEVICE).pack(partial))
    assert not data[0].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("bfloat16", 2**-8)])
def test_what_is_packed_is_merged_into_the_rows_that_it_names(dtype, tolerance):
    form = PartialFormat.of(make_group([0], query_heads=2, v_width=4, dtype=dtype))
    sent, message = partial_of(3, 2, 4), PartialMessage(form, 3, DEVICE)
    message.pack(sent)
    homes = [PartialAttention.empty(4, 2, 4, torch.float32, DEVICE) for _ in range(2)]
    message.merge_into_(homes, [(1, 2, 1), (0, 0, 2)])
    found = [homes[1].out[2], *homes[0].out[:2]]
    for wanted, out in zip(sent.out, found, strict=True):
        assert ((out - wanted).abs() <= tolerance * wanted.abs()).all()
    assert torch.stack([homes[1].lse[2], *homes[0].lse[:2]]).equal(sent.lse)  # never rounded
    assert homes[1].lse[:2].isneginf().all()
