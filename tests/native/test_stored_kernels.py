"""Kernels that read keys and values as they are stored agree with float64 over the numbers that these stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.kv.layout import KVSpec
from longspan.kv.stored import exact_rows, round_rows
from longspan.native import kernels

pytestmark = [
    pytest.mark.skipif(not kernels.is_available(), reason="no C compiler"),
    pytest.mark.usefixtures("binary"),
]
DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")


def make(dtype, heads, num_keys, width, v_width, seed):
    generator = torch.Generator().manual_seed(seed)
    k, v = KVSpec.uniform(heads, width, v_width, "float32").stored_as(dtype).layout.components
    return tuple(round_rows(torch.randn(heads, num_keys, part.width, generator=generator) * 2, part) for part in (k, v))


def expected(q, k, v, scale, seen):
    """Output and lse of queries [t, H, D] in float64; `seen` [t, S] bool."""
    group = q.shape[1] // k.shape[0]
    keys = exact_rows(k, q.shape[2], torch.float32).double().repeat_interleave(group, dim=0)
    values = exact_rows(v, v.shape[2] - k.shape[2] + q.shape[2], torch.float32).double().repeat_interleave(group, dim=0)
    scores = torch.einsum("thd,hsd->ths", q.double(), keys) * scale
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return torch.einsum("ths,hsd->thd", scores.softmax(-1), values), scores.logsumexp(-1)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    q_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    heads=st.integers(1, 3),
    group=st.integers(1, kernels.MAX_ROWS),
    num_keys=st.integers(1, 300),
    width=st.sampled_from([16, 64, 80]),
    v_width=st.sampled_from([16, 64, 96]),
    seed=st.integers(0, 99),
)
def test_decode(dtype, q_dtype, heads, group, num_keys, width, v_width, seed):
    k, v = make(dtype, heads, num_keys, width, v_width, seed)
    q = torch.randn(2, heads * group, width, generator=torch.Generator().manual_seed(seed)).to(q_dtype)
    wanted, wanted_lse = expected(q, k, v, 0.2, torch.ones(2, num_keys).bool())
    folded = q[:1].view(heads, group, width)
    out, lse = kernels.decode(folded, k, v, 0.2, 1)
    torch.testing.assert_close(out[0].reshape(heads * group, v_width).double(), wanted[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(lse[0].reshape(-1).double(), wanted_lse[0], rtol=0, atol=2e-5)
    out, lse = torch.empty(2, heads * group, v_width), torch.empty(2, heads * group)
    kernels.decode_batch(q, k, v, 0.2, kernels.DecodeBatch({0: [(0, num_keys)], 1: [(0, num_keys)]}), out, lse)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    q_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    heads=st.integers(1, 2),
    group=st.integers(1, 4),
    num_queries=st.integers(1, 70),
    before=st.integers(0, 200),
    width=st.sampled_from([16, 64, 80]),
    seed=st.integers(0, 99),
)
def test_prefill(dtype, q_dtype, heads, group, num_queries, before, width, seed):
    num_keys = before + num_queries
    k, v = make(dtype, heads, num_keys, width, 64, seed)
    q = torch.randn(num_queries, heads * group, width, generator=torch.Generator().manual_seed(seed)).to(q_dtype)
    out, lse = torch.empty(num_queries, heads * group, 64), torch.empty(num_queries, heads * group)
    kernels.prefill(q, k, v, 0.2, [kernels.SeenKeys(0, num_keys, before)], out, lse)
    seen = torch.arange(num_keys)[None] <= torch.arange(num_queries)[:, None] + before
    wanted, wanted_lse = expected(q, k, v, 0.2, seen)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=2e-5)


def test_every_number_of_eight_bits_is_read_right():
    for dtype, numbers in (("int8", torch.arange(-127, 128)), ("float8_e4m3fn", torch.arange(256))):
        held = numbers.to(torch.int8 if dtype == "int8" else torch.uint8)
        if dtype != "int8":
            held = held[~held.view(torch.float8_e4m3fn).float().isnan()]
        scale = torch.ones(1).view(held.dtype)
        rows = torch.zeros(1, len(held), 20, dtype=held.dtype)
        rows[0, :, 0], rows[0, :, 16:] = held, scale
        q = torch.zeros(1, 1, 16)
        q[0, 0, 0] = 1.0
        for row in range(len(held)):  # a lone key: its score is the lse, its value the output
            out, lse = kernels.decode(q, rows[:, row : row + 1], rows[:, row : row + 1], 1.0, 1)
            value = float(exact_rows(rows[:, row], 1, torch.float32))
            assert (float(out[0, 0, 0, 0]), float(lse)) == (value, value)
