"""Proves the compiled prefill kernel against float64, on every way that keys can lie and be seen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.native import kernels

pytestmark = pytest.mark.usefixtures("binary")
needs_kernel = pytest.mark.skipif(not kernels.can_prefill(64, 64, torch.float32, torch.float32), reason="no C compiler")


def expected(q, k, v, scale, seen):
    """Attention by its definition: [t, H, Dv] and [t, H], float64."""
    group_size, queries = q.shape[1] // k.shape[0], torch.arange(q.shape[0])[:, None]
    rows = torch.cat([torch.arange(run.row, run.row + run.num_keys) for run in seen])
    newest = [queries + run.lead - torch.arange(run.num_keys) for run in seen]
    hidden = torch.cat([(age < 0) | (age >= run.span) for age, run in zip(newest, seen, strict=True)], dim=1)  # [t, s]
    keys = k[:, rows].double().repeat_interleave(group_size, dim=0)
    values = v[:, rows].double().repeat_interleave(group_size, dim=0)
    scores = (torch.einsum("thd,hsd->hts", q.double(), keys) * scale).masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)  # [H, t]
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None])
    return torch.einsum("hts,hsd->thd", weights, values), lse.T


def run_kernel(q, k, v, scale, seen, num_threads):
    out, lse = torch.empty(*q.shape[:2], v.shape[2]), torch.empty(q.shape[:2])
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        kernels.prefill(q, k, v, scale, seen, out, lse)
    finally:
        torch.set_num_threads(before)
    return out, lse


@st.composite
def runs_of_keys(draw):
    """Disjoint runs with gaps between them, seen whole, causally or in a window, from afar or not at all."""
    seen, row = [], draw(st.integers(0, 5))
    for _ in range(draw(st.integers(1, 4))):
        num_keys = draw(st.integers(1, 300))
        lead = draw(st.one_of(st.just(kernels.FAR), st.integers(-150, 400)))
        span = (
            draw(st.one_of(st.just(2 * kernels.FAR), st.integers(1, 300))) if lead != kernels.FAR else 2 * kernels.FAR
        )
        seen.append(kernels.SeenKeys(row, num_keys, lead, span))
        row += num_keys + draw(st.integers(0, 5))
    return seen


@pytest.mark.cover
@needs_kernel
@settings(max_examples=200, deadline=None)
@given(
    seen=runs_of_keys(),
    heads=st.integers(1, 3),
    group_size=st.sampled_from([1, 2, 3, 4, 7]),
    num_queries=st.integers(1, 150),
    width=st.sampled_from([16, 48, 64, 128, 256]),
    v_width=st.sampled_from([16, 64, 112]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    num_threads=st.integers(1, 3),
    size=st.sampled_from([1e-3, 1.0, 20.0]),
    seed=st.integers(0, 2**31),
)
def test_the_kernel_agrees_with_float64(
    seen, heads, group_size, num_queries, width, v_width, dtype, num_threads, size, seed
):
    generator = torch.Generator().manual_seed(seed)
    num_rows = seen[-1].row + seen[-1].num_keys + 3
    k, v = (torch.full((heads, num_rows, w), torch.nan, dtype=dtype) for w in (width, v_width))
    for run in seen:  # rows outside every run hold NaN
        rows = slice(run.row, run.row + run.num_keys)
        k[:, rows] = torch.randn(heads, run.num_keys, width, generator=generator) * size
        v[:, rows] = torch.randn(heads, run.num_keys, v_width, generator=generator)
    q = torch.randn(heads * group_size, num_queries, width, generator=generator).to(dtype).transpose(0, 1)
    out, lse = run_kernel(q, k, v, width**-0.5, seen, num_threads)
    want_out, want_lse = expected(q, k, v, width**-0.5, seen)
    is_empty = want_lse.isneginf()
    assert torch.equal(lse.isneginf(), is_empty)
    assert not out[is_empty].any()
    largest = max(1.0, size)
    torch.testing.assert_close(lse[~is_empty].double(), want_lse[~is_empty], rtol=0, atol=5e-6 * largest)
    torch.testing.assert_close(out.double(), want_out, rtol=0, atol=2e-5 * largest)


@needs_kernel
@pytest.mark.parametrize("score", [-1e4, 1e4])
def test_huge_scores_neither_overflow_nor_underflow(score):
    k = torch.zeros(1, 300, 16)
    k[..., 0] = score
    k[0, 299, 0] = score + 1
    q = torch.zeros(9, 1, 16)
    q[..., 0] = 1.0
    v = torch.randn(1, 300, 16)
    out, lse = torch.empty(9, 1, 16), torch.empty(9, 1)
    kernels.prefill(q, k, v, 1.0, [kernels.SeenKeys(0, 300)], out, lse)
    want_out, want_lse = expected(q, k, v, 1.0, [kernels.SeenKeys(0, 300)])
    torch.testing.assert_close(out.double(), want_out, rtol=0, atol=2e-3)  # scores have 10 bits behind
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=0)


@needs_kernel
def test_nan_in_a_visible_key_is_not_hidden_from_many_rows_and_others_are():
    q, k, v = torch.randn(40, 2, 32), torch.randn(1, 500, 32), torch.randn(1, 500, 32)
    k[0, 480, 3] = torch.nan
    out, lse = torch.empty(40, 2, 32), torch.empty(40, 2)
    kernels.prefill(q, k, v, 0.1, [kernels.SeenKeys(0, 500, lead=460)], out, lse)
    assert out[:20].isfinite().all()
    assert lse[:20].isfinite().all()
    assert out[20:].isnan().all()
    assert lse[20:].isnan().all()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("group_size", "num_queries", "num_threads"),
    [(16, 1, 1), (16, 2, 3), (16, 3, 8), pytest.param(128, 1, 3, marks=pytest.mark.slow), (5, 40, 1), (5, 40, 3)],
)
def test_values_that_are_the_first_elements_of_their_keys_and_keys_that_are_shared_by_threads(
    group_size, num_queries, dtype, num_threads
):
    """Latent attention: one head of 576 elements, 512 of them the value; few rows leave the other threads keys."""
    generator = torch.Generator().manual_seed(group_size)
    k = torch.full((1, 5000, 576), torch.nan, dtype=dtype)
    seen = [kernels.SeenKeys(3, 2500), kernels.SeenKeys(2600, 1, lead=0), kernels.SeenKeys(2700, 2100, lead=2070)]
    for run in seen:
        k[:, run.row : run.row + run.num_keys] = torch.randn(1, run.num_keys, 576, generator=generator)
    q = torch.randn(num_queries, group_size, 576, generator=generator).to(dtype)
    v = k[:, :, :512]
    out, lse = run_kernel(q, k, v, 576**-0.5, seen, num_threads)
    want_out, want_lse = expected(q, k, v, 576**-0.5, seen)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=5e-6)
    torch.testing.assert_close(out.double(), want_out, rtol=0, atol=2e-5)


@needs_kernel
def test_a_row_that_sees_nothing_stays_empty_when_threads_share_its_keys():
    q, k = torch.randn(2, 16, 576), torch.randn(1, 1500, 576)
    out, lse = run_kernel(q, k, k[:, :, :512], 0.1, [kernels.SeenKeys(0, 1500, lead=-1)], 2)
    assert lse[0].isneginf().all()
    assert not out[0].any()
    want_out, want_lse = expected(q, k, k[:, :, :512], 0.1, [kernels.SeenKeys(0, 1500, lead=-1)])
    torch.testing.assert_close(out[1].double(), want_out[1], rtol=0, atol=2e-5)
    torch.testing.assert_close(lse[1].double(), want_lse[1], rtol=0, atol=2e-5)


# -- linear layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "v_width", "dtype"), [(40, 64, "float32"), (64, 8, "float32"), (64, 64, "float64")])
def test_other_sizes_and_dtypes_are_not_for_the_kernel(width, v_width, dtype):
    assert not kernels.can_prefill(width, v_width, *[getattr(torch, dtype)] * 2)
