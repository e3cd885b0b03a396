"""Proves the compiled kernels against float64, and that what calls them is right with and without them."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from longspan.attention.base import RowSegment
from longspan.attention.cpu import CPUBackend
from longspan.attention.reference import ReferenceBackend
from longspan.models.linear import CPULinear, replace_linears_
from longspan.native import kernels, onednn
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams

pytestmark = pytest.mark.usefixtures("binary")
needs_kernel = pytest.mark.skipif(not kernels.is_available(), reason="no C compiler when longspan was installed")


def expected(rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    scores = rows.double() @ k.double().transpose(1, 2) * scale
    return torch.softmax(scores, dim=-1) @ v.double(), torch.logsumexp(scores, dim=-1)


@needs_kernel
@settings(max_examples=150, deadline=None)
@given(
    heads=st.integers(1, 5),
    num_rows=st.integers(1, kernels.MAX_ROWS),
    num_keys=st.integers(1, 700),
    width=st.sampled_from([16, 32, 48, 64, 80, 128, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    num_runs=st.integers(1, 4),
    num_threads=st.integers(1, 3),
    size=st.sampled_from([1e-3, 1.0, 20.0]),
    seed=st.integers(0, 2**31),
)
def test_the_kernel_agrees_with_float64(heads, num_rows, num_keys, width, dtype, num_runs, num_threads, size, seed):
    if -(-num_keys // num_runs) * (num_runs - 1) >= num_keys:
        num_runs = 1
    generator = torch.Generator().manual_seed(seed)
    pool_k, pool_v = (torch.full((heads, num_keys + 9, width), torch.nan, dtype=dtype) for _ in range(2))
    k, v = pool_k[:, 4 : 4 + num_keys], pool_v[:, 4 : 4 + num_keys]  # strided heads, and NaN on either side
    k.copy_(torch.randn(k.shape, generator=generator) * size)
    v.copy_(torch.randn(v.shape, generator=generator))
    rows = torch.randn(heads, num_rows, width, generator=generator).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        out, lse = kernels.decode(rows, k, v, 0.3, num_runs)
    finally:
        torch.set_num_threads(before)
    run_len = -(-num_keys // num_runs)
    for run in range(num_runs):
        part = slice(run * run_len, (run + 1) * run_len)
        want_out, want_lse = expected(rows, k[:, part], v[:, part], 0.3)
        # A score may be far smaller than the products that it sums up, and is rounded as these are.
        products = (rows.double().abs() @ k[:, part].double().abs().transpose(1, 2) * 0.3).max().item()
        torch.testing.assert_close(lse[run].double(), want_lse, rtol=0, atol=max(3e-6, 3e-7 * products))
        torch.testing.assert_close(out[run].double(), want_out, rtol=0, atol=2e-5 * max(1.0, size))


@needs_kernel
@pytest.mark.parametrize(("width", "v_width"), [(192, 128), (576, 512), (48, 32), (16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_values_of_another_width_or_inside_of_keys_agree_with_float64(width, v_width, dtype, num_rows):
    generator = torch.Generator().manual_seed(width)
    k = torch.randn(2, 333, width, generator=generator).to(dtype)
    rows = torch.randn(2, num_rows, width, generator=generator).to(dtype)
    choices = [torch.randn(2, 333, v_width, generator=generator).to(dtype)]
    if v_width < width:
        choices.append(k[:, :, :v_width])
    for v in choices:
        want_out, want_lse = expected(rows, k, v, width**-0.5)
        out, lse = kernels.decode(rows, k, v, width**-0.5, 1)
        torch.testing.assert_close(out[0].double(), want_out, rtol=0, atol=2e-5)
        torch.testing.assert_close(lse[0].double(), want_lse, rtol=0, atol=5e-6)
        q = rows.flatten(0, 1)[None]  # [1, H, D]
        found, found_lse = torch.empty(1, 2 * num_rows, v_width), torch.empty(1, 2 * num_rows)
        batch = kernels.DecodeBatch({0: [(0, 100), (100, 233)]})
        kernels.decode_batch(q, k, v, width**-0.5, batch, found, found_lse)
        torch.testing.assert_close(found[0].view(want_out.shape).double(), want_out, rtol=0, atol=2e-5)
        torch.testing.assert_close(found_lse[0].view(want_lse.shape).double(), want_lse, rtol=0, atol=5e-6)


@needs_kernel
@pytest.mark.parametrize("score", [-1e4, 1e4])
def test_huge_scores_neither_overflow_nor_underflow(score):
    k = torch.zeros(1, 300, 16)
    k[..., 0] = score
    k[0, 299, 0] = score + 1
    rows = torch.zeros(1, 2, 16)
    rows[..., 0] = 1.0
    v = torch.randn(1, 300, 16)
    out, lse = kernels.decode(rows, k, v, 1.0, 1)
    want_out, want_lse = expected(rows, k, v, 1.0)
    torch.testing.assert_close(out[0].double(), want_out, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse[0].double(), want_lse, rtol=1e-6, atol=0)


@needs_kernel
def test_nan_in_a_visible_key_is_not_hidden():
    k, v = torch.randn(1, 200, 32), torch.randn(1, 200, 32)
    k[0, 150, 3] = torch.nan
    out, lse = kernels.decode(torch.randn(1, 4, 32), k, v, 1.0, 1)
    assert torch.isnan(out).all() or torch.isnan(lse).all()


@pytest.mark.parametrize("available", [pytest.param(True, marks=needs_kernel), False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(8, 1), (8, 2), (7, 1), (4, 4)])
def test_decode_is_right_with_and_without_the_kernel(monkeypatch, available, dtype, heads):
    monkeypatch.setattr(kernels, "is_available", lambda: available)
    generator = torch.Generator().manual_seed(0)
    num_heads, num_kv_heads = heads
    q = torch.randn(1, num_heads, 32, generator=generator).to(dtype)
    k, v = (torch.randn(num_kv_heads, 1500, 32, generator=generator).to(dtype) for _ in range(2))
    segments = [
        RowSegment(0, 1, 1499, 0, 900, None, Visibility.FULL),
        RowSegment(0, 1, 1499, 950, 550, None, Visibility.FULL),
    ]
    params = AttentionParams(scale=0.2)
    got = CPUBackend().partial_attention(q, k, v, segments, params)
    want = ReferenceBackend().partial_attention(q.double(), k.double(), v.double(), segments, params)
    tolerance = 1e-5 if dtype is torch.float32 else 8e-3
    torch.testing.assert_close(got.out.double(), want.out, rtol=0, atol=tolerance)
    torch.testing.assert_close(got.lse.double(), want.lse, rtol=0, atol=1e-5)


@needs_kernel
def test_a_binary_of_other_signatures_is_not_called(monkeypatch):
    monkeypatch.setattr(kernels, "INTERFACE", kernels.INTERFACE + 1)
    assert kernels.library.__wrapped__() is None
    monkeypatch.undo()
    assert kernels.library.__wrapped__() is not None


def test_what_the_kernel_cannot_do_is_left_to_the_other_one():
    assert not kernels.can_decode(9, 64, 64, torch.float32)
    assert not kernels.can_decode(0, 64, 64, torch.float32)
    assert not kernels.can_decode(4, 72, 64, torch.float32)
    assert not kernels.can_decode(4, 64, 72, torch.float32)
    assert not kernels.can_decode(4, 592, 512, torch.float32)
    assert not kernels.can_decode(4, 64, 64, torch.float64)
    assert kernels.can_decode(4, 64, 64, torch.bfloat16)
    assert kernels.can_decode(4, 576, 512, torch.bfloat16)


# -- batches -----------------------------------------------------------------------------------------------------------


@needs_kernel
@settings(max_examples=100, deadline=None)
@given(
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, kernels.MAX_ROWS),
    width=st.sampled_from([16, 64, 80, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    runs=st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=4), min_size=1, max_size=6),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_a_batch_of_decodes_agrees_with_float64_and_leaves_other_rows_alone(
    num_kv_heads, group, width, dtype, runs, num_threads, seed
):
    """Every query has runs of keys of its own, with NaN between the runs; every second row belongs to somebody else."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = 2 * len(runs)
    q = torch.randn(num_rows, num_kv_heads * group, width, generator=generator).to(dtype)
    total = sum(length + 3 for lengths in runs for length in lengths)
    k, v = (torch.full((num_kv_heads, total, width), torch.nan, dtype=dtype) for _ in range(2))
    keys_of, start = {}, 0
    for i, lengths in enumerate(runs):
        keys_of[2 * i + 1] = []
        for length in lengths:
            for pool in (k, v):
                pool[:, start : start + length] = torch.randn(num_kv_heads, length, width, generator=generator)
            keys_of[2 * i + 1].append((start, length))
            start += length + 3
    out = torch.full((num_rows, num_kv_heads * group, width), 7.0)
    lse = torch.full((num_rows, num_kv_heads * group), 7.0)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        kernels.decode_batch(q, k, v, 0.3, kernels.DecodeBatch(keys_of), out, lse)
    finally:
        torch.set_num_threads(before)
    for row in range(num_rows):
        if row not in keys_of:
            assert out[row].eq(7).all()
            assert lse[row].eq(7).all()
            continue
        index = torch.cat([torch.arange(first, first + length) for first, length in keys_of[row]])
        want_out, want_lse = expected(q[row].view(num_kv_heads, group, width), k[:, index], v[:, index], 0.3)
        largest = max(1.0, want_lse.abs().max().item())
        torch.testing.assert_close(lse[row].double().view(want_lse.shape), want_lse, rtol=0, atol=3e-6 * largest)
        torch.testing.assert_close(out[row].double().view(want_out.shape), want_out, rtol=0, atol=2e-5)


@pytest.mark.parametrize("available", [pytest.param(True, marks=needs_kernel), False])
def test_a_batch_with_prompts_and_decodes_is_right_with_and_without_the_kernel(monkeypatch, available):
    """Rows 0 to 4 are a prompt, 5 and 7 decode over several runs, 6 sees nothing."""
    monkeypatch.setattr(kernels, "is_available", lambda: available)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(8, 6, 32, generator=generator)
    k, v = (torch.randn(2, 500, 32, generator=generator) for _ in range(2))
    segments = [
        RowSegment(0, 5, 100, 0, 100, None, Visibility.FULL),
        RowSegment(0, 5, 100, 100, 5, 100, Visibility.CAUSAL),
        RowSegment(5, 1, 90, 200, 70, None, Visibility.FULL),
        RowSegment(5, 1, 90, 300, 21, None, Visibility.FULL),
        RowSegment(7, 1, 49, 400, 50, None, Visibility.FULL),
    ]
    params = AttentionParams(scale=0.2)
    got = CPUBackend().partial_attention(q, k, v, segments, params)
    want = ReferenceBackend().partial_attention(q.double(), k.double(), v.double(), segments, params)
    torch.testing.assert_close(got.out.double(), want.out, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.lse.double(), want.lse, rtol=0, atol=1e-5)


@needs_kernel
@settings(max_examples=150, deadline=None)
@given(
    num_rows=st.one_of(st.integers(1, kernels.MAX_ROWS), st.integers(1, kernels.MAX_LINEAR_ROWS)),
    width=st.sampled_from([16, 32, 48, 80, 512, 1376, 8192]),
    num_out=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_the_linear_kernel_agrees_with_float64(num_rows, width, num_out, dtype, num_threads, seed):
    """No more threads than outputs, or more; the error is at most twice that of torch's own product."""
    assume(kernels.can_multiply(num_rows, width, dtype))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, num_rows, width, generator=generator).to(dtype)
    weight = torch.randn(num_out, width, generator=generator).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        got = kernels.linear(x, weight)
    finally:
        torch.set_num_threads(before)
    want = x.double() @ weight.double().T
    assert (got.shape, got.dtype) == (want.shape, dtype)
    eps = torch.finfo(torch.float32).eps * width + (torch.finfo(dtype).eps if dtype is torch.bfloat16 else 0)
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=eps * width**0.5)


@needs_kernel
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "is_kernel"), [((1, 1, 64), True), ((128, 64), True), ((129, 64), False), ((0, 64), False)]
)
def test_linear_layers_give_few_rows_to_the_kernel(monkeypatch, bias, shape, is_kernel):
    calls = []
    real = kernels.linear
    monkeypatch.setattr(kernels, "linear", lambda x, weight: calls.append(1) or real(x, weight))
    torch.manual_seed(0)
    plain = nn.Linear(64, 40, bias=bias)
    x = torch.randn(shape)
    with torch.inference_mode():
        want = plain(x)
        model = nn.Sequential(plain)
        replace_linears_(model)
        assert type(model[0]) is CPULinear
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    assert bool(calls) == is_kernel


@needs_kernel
def test_linear_layers_of_other_widths_dtypes_and_classes_stay_with_torch(monkeypatch):
    class Own(nn.Linear):
        """Whatever a model's author made of it."""

    monkeypatch.setattr(onednn, "is_available", lambda: False)
    model = nn.Sequential(nn.Linear(40, 3), nn.Linear(48, 3, dtype=torch.float64), Own(48, 3))
    want = [model[0](torch.ones(1, 40)), model[1](torch.ones(1, 48, dtype=torch.float64))]
    replace_linears_(model)
    assert type(model[2]) is Own
    assert torch.equal(model[0](torch.ones(1, 40)), want[0])
    assert torch.equal(model[1](torch.ones(1, 48, dtype=torch.float64)), want[1])


@pytest.mark.skipif(not onednn.is_available(), reason="this torch or this CPU has no use for oneDNN")
@pytest.mark.parametrize("num_rows", [1, 8, 9, 300])
@pytest.mark.parametrize(("width", "num_out"), [(40, 3), (512, 1376), (1000, 7)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_onednn_agrees_with_float64(num_rows, width, num_out, has_bias):
    model = nn.Sequential(nn.Linear(width, num_out, bias=has_bias)).requires_grad_(False)
    x = torch.randn(1, num_rows, width, generator=torch.Generator().manual_seed(0))
    want = nn.functional.linear(x.double(), model[0].weight.double(), model[0].bias.double() if has_bias else None)
    replace_linears_(model)
    assert torch.equal(model(x[:, :0]), x.new_empty(1, 0, num_out))
    torch.testing.assert_close(model(x).double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(onednn.linear(x, model[0].weight, model[0].bias).double(), want, rtol=0, atol=1e-5)
