"""Proves the compiled decode kernel against float64, and that the backend is right with and without it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.attention import native
from longspan.attention.base import RowSegment
from longspan.attention.cpu import CPUBackend
from longspan.attention.reference import ReferenceBackend
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams

needs_kernel = pytest.mark.skipif(not native.is_available(), reason="no C compiler when longspan was installed")


def expected(rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    scores = rows.double() @ k.double().transpose(1, 2) * scale
    return torch.softmax(scores, dim=-1) @ v.double(), torch.logsumexp(scores, dim=-1)


@needs_kernel
@settings(max_examples=150, deadline=None)
@given(
    heads=st.integers(1, 5),
    num_rows=st.integers(1, native.MAX_ROWS),
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
        out, lse = native.decode(rows, k, v, 0.3, num_runs)
    finally:
        torch.set_num_threads(before)
    run_len = -(-num_keys // num_runs)
    for run in range(num_runs):
        part = slice(run * run_len, (run + 1) * run_len)
        want_out, want_lse = expected(rows, k[:, part], v[:, part], 0.3)
        largest = max(1.0, want_lse.abs().max().item())
        torch.testing.assert_close(lse[run].double(), want_lse, rtol=0, atol=3e-6 * largest)
        torch.testing.assert_close(out[run].double(), want_out, rtol=0, atol=2e-5 * max(1.0, size))


@needs_kernel
@pytest.mark.parametrize("score", [-1e4, 1e4])
def test_huge_scores_neither_overflow_nor_underflow(score):
    k = torch.zeros(1, 300, 16)
    k[..., 0] = score
    k[0, 299, 0] = score + 1
    rows = torch.zeros(1, 2, 16)
    rows[..., 0] = 1.0
    v = torch.randn(1, 300, 16)
    out, lse = native.decode(rows, k, v, 1.0, 1)
    want_out, want_lse = expected(rows, k, v, 1.0)
    torch.testing.assert_close(out[0].double(), want_out, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse[0].double(), want_lse, rtol=1e-6, atol=0)


@needs_kernel
def test_nan_in_a_visible_key_is_not_hidden():
    k, v = torch.randn(1, 200, 32), torch.randn(1, 200, 32)
    k[0, 150, 3] = torch.nan
    out, lse = native.decode(torch.randn(1, 4, 32), k, v, 1.0, 1)
    assert torch.isnan(out).all() or torch.isnan(lse).all()


@pytest.mark.parametrize("available", [pytest.param(True, marks=needs_kernel), False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(8, 1), (8, 2), (7, 1), (4, 4)])
def test_decode_is_right_with_and_without_the_kernel(monkeypatch, available, dtype, heads):
    monkeypatch.setattr(native, "is_available", lambda: available)
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


def test_what_the_kernel_cannot_do_is_left_to_the_other_one():
    assert not native.can_decode(9, 64, torch.float32)
    assert not native.can_decode(0, 64, torch.float32)
    assert not native.can_decode(4, 72, torch.float32)
    assert not native.can_decode(4, 272, torch.float32)
    assert not native.can_decode(4, 64, torch.float64)
    assert native.can_decode(4, 64, torch.bfloat16)
