"""The Triton kernels, in Triton's interpreter, against a dense float64 softmax at true positions."""

import functools
import math

import attention_cases
import pytest
import torch
from attention_cases import BAND, CAUSAL, DEVICE, FULL, NAN, assert_close, cases, hide_unread, oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.attention import triton
from longspan.attention.base import RowSegment, RowSegments
from longspan.attention.check import check_against_reference
from longspan.attention.partial import PartialAttention, merge_partials, merge_sinks_
from longspan.attention.select import make_backend
from longspan.attention.tiles import tile_tables
from longspan.attention.triton import TritonBackend
from longspan.kv.layout import KVGroup, KVSpec
from longspan.kv.stored import exact_rows, round_rows
from longspan.triton_kernels import merge as merge_module
from longspan.triton_kernels.attention import attention
from longspan.triton_kernels.merge import accumulate_, merge
from longspan.triton_kernels.store import store
from longspan.types import AttentionParams

PARAMS = AttentionParams(scale=0.3)
FLOAT32_ATOL = 4e-6 if DEVICE == "cpu" else 3e-5
"""Of outputs and log-sum-exps in float32. A GPU multiplies by three products of tf32: emulated, they err by up to 6e-6
in log-sum-exps and 1.4e-5 in outputs."""

tensors = functools.partial(attention_cases.tensors, device=DEVICE)


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.device(DEVICE):
        yield


def moved(part):
    return PartialAttention(part.out.cpu(), part.lse.cpu())


def check(q, k, v, segments, params, atol=4e-6):
    atol = max(atol, FLOAT32_ATOL)
    got = TritonBackend().partial_attention(q, k, v, segments, params)
    assert got.out.dtype == got.lse.dtype == torch.float32
    assert_close(got, oracle(q, k, v, segments, params), atol)
    return got


@settings(max_examples=25, deadline=None)
@given(case=cases(), heads=st.sampled_from([(1, 1), (4, 2), (7, 1), (8, 1)]), seed=st.integers(0, 9))
def test_any_segments_match_float64_and_rows_outside_them_are_not_read(case, heads, seed):
    num_rows, num_keys, segments, params = case
    q, k, v = tensors(num_rows, num_keys, heads, width=16, dtype=torch.float32, seed=seed)
    hide_unread(q, k, v, segments)
    check(q, k, v, segments, params)


@pytest.mark.cover
@pytest.mark.parametrize("heads", [(4, 4), (7, 1), (16, 2), (6, 3)])
@pytest.mark.parametrize("width", [64, 96])
def test_a_chunk_with_its_past_crosses_tiles_with_and_without_masks(heads, width):
    q, k, v = tensors(40, 340, heads, width=width, dtype=torch.float32)
    past, own = RowSegment(0, 40, 300, 0, 290, None, FULL), RowSegment(0, 40, 300, 290, 50, 290, CAUSAL)
    scale = width**-0.5
    check(q, k, v, [past, own], AttentionParams(scale))
    check(q, k, v, [RowSegment(0, 40, 300, 0, 340, 0, CAUSAL)], AttentionParams(scale))
    check(q, k, v, [RowSegment(0, 40, 300, 0, 340, 0, BAND)], AttentionParams(scale, window=150))


@pytest.mark.parametrize("width", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_at_most_twice_those_of_eager_attention_in_the_same_dtype(width, dtype):
    q, k, v = tensors(3, 150, (4, 2), width=width, dtype=dtype)
    q = q / width**0.25
    segments, params = [RowSegment(0, 3, 149, 0, 150, 2, CAUSAL)], AttentionParams(width**-0.5)
    want = oracle(q, k, v, segments, params)
    got = TritonBackend().partial_attention(q, k, v, segments, params)
    visible = torch.arange(150)[None, :] + 2 <= torch.arange(149, 152)[:, None]
    keys, values = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    scores = torch.einsum("thd,hsd->hts", q, keys) * params.scale
    weights = torch.softmax(scores.float().masked_fill(~visible, -torch.inf), dim=-1).to(dtype)
    eager = torch.einsum("hts,hsd->thd", weights, values)
    rounding = FLOAT32_ATOL if dtype is torch.float32 else 1e-6  # products of 16 bits are exact
    assert (got.out.cpu() - want.out).norm() <= 2 * (eager.double().cpu() - want.out).norm() + rounding
    torch.testing.assert_close(got.lse.double().cpu(), want.lse, atol=max(1e-5, rounding), rtol=0)


@pytest.mark.parametrize("num_heads", [1, 16, 128])
@pytest.mark.parametrize(("width", "v_width"), [(576, 512), (40, 32), (96, 64)])
def test_values_that_are_the_first_elements_of_their_keys(num_heads, width, v_width):
    """Latent attention: one KV head, whose query heads may need several programs."""
    q, k, _ = tensors(5, 90, (num_heads, 1), width=width, dtype=torch.float32)
    v = k[:, :, :v_width]
    past, own = RowSegment(0, 5, 80, 3, 50, None, FULL), RowSegment(0, 5, 80, 60, 20, 70, CAUSAL)
    hide_unread(q, k, v, [past, own])
    got = check(q, k, v, [past, own], AttentionParams(width**-0.5), atol=1e-5)
    copied = (
        TritonBackend().partial_attention(q, k, v.clone(), [past, own], AttentionParams(width**-0.5))
        if width < 256
        else got
    )
    torch.testing.assert_close(got.out, copied.out, atol=max(1e-5, FLOAT32_ATOL), rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_in_16_bits_have_at_most_twice_the_error_of_eager_attention(dtype):
    q, k, _ = tensors(3, 70, (16, 1), width=576, dtype=dtype)
    q, v = q / 576**0.25, k[:, :, :512]
    segments, params = [RowSegment(0, 3, 69, 0, 70, 2, CAUSAL)], AttentionParams(576**-0.5)
    want = oracle(q, k, v, segments, params)
    got = TritonBackend().partial_attention(q, k, v, segments, params)
    visible = torch.arange(70)[None, :] + 2 <= torch.arange(69, 72)[:, None]
    scores = torch.einsum("thd,sd->hts", q, k[0]) * params.scale
    weights = torch.softmax(scores.float().masked_fill(~visible, -torch.inf), dim=-1).to(dtype)
    eager = torch.einsum("hts,sd->thd", weights, v[0])
    assert (got.out.cpu() - want.out).norm() <= 2 * (eager.double().cpu() - want.out).norm() + 1e-6
    torch.testing.assert_close(got.lse.double().cpu(), want.lse, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("width", "v_width", "is_taken"),
    [(576, 512, True), (40, 32, True), (640, 576, False), (584, 512, False), (24, 8, False)],
)
def test_latents_of_other_sizes_are_refused(width, v_width, is_taken):
    spec = KVSpec.latents(v_width, width - v_width, 192, 128, "bfloat16")
    reason = TritonBackend().unsupported(spec, PARAMS)
    assert (reason is None) == is_taken
    assert is_taken or f"got latents of {v_width} and {width - v_width} beside them, the triton backend takes" in reason


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_long_decode_is_split_over_its_keys(softcap, monkeypatch):
    splits = []
    monkeypatch.setattr("longspan.attention.triton.merge", lambda *args: (splits.append(len(args[0])), merge(*args)))
    q, k, v = tensors(2, 1900, (4, 2), width=16, dtype=torch.float32)
    segments = [RowSegment(0, 1, 1800, 0, 1700, None, FULL), RowSegment(1, 1, 100, 1700, 101, None, FULL)]
    check(q, k, v, segments, AttentionParams(0.3, softcap))
    assert splits == [2]  # 4 processors, twice, for 2 rows of 2 KV heads


def test_striped_pages_of_16_in_any_order_beside_foreign_tokens():
    q, k, v = tensors(1, 320, (4, 2), width=16, dtype=torch.float32)
    pages = [(11, 0), (3, 2), (17, 4), (0, 6)]  # (slot, page of the sequence): the other ones are another rank's
    segments = [RowSegment(0, 1, 105, 16 * slot, 16, 16 * page, CAUSAL) for slot, page in pages]
    hide_unread(q, k, v, segments)
    k[:, 16 * 0 + 10 : 16], v[:, 16 * 0 + 10 : 16] = NAN, NAN  # not written yet: positions from 106
    segments[-1] = RowSegment(0, 1, 105, 0, 10, 96, CAUSAL)
    check(q, k, v, segments, PARAMS)


def test_three_ranks_partials_and_sinks_merge_to_the_whole():
    q, k, v = tensors(5, 90, (4, 2), width=16, dtype=torch.float32)
    sinks = torch.tensor([0.5, -1.0, 3.0, -math.inf])
    parts = [
        TritonBackend().partial_attention(q, k, v, [RowSegment(0, 5, 85, first, 30, first, CAUSAL)], PARAMS)
        for first in (0, 30, 60)
    ]
    out, lse = torch.empty(5, 4, 16), torch.empty(5, 4)
    merge(torch.stack([p.out for p in parts]), torch.stack([p.lse for p in parts]), out, lse, sinks)
    want = oracle(q, k, v, [RowSegment(0, 5, 85, 0, 90, 0, CAUSAL)], PARAMS)
    merge_sinks_(want, sinks.cpu())
    assert_close(PartialAttention(out, lse), want, FLOAT32_ATOL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_parts", "heads", "width"), [(1, 1, 16), (2, 3, 96), (8, 4, 128), (45, 1, 128)])
@pytest.mark.parametrize("programs", [1, 8])
def test_merge_agrees_with_the_core_and_drops_empty_rows_whatever_they_hold(
    dtype, num_parts, heads, width, programs, monkeypatch
):
    monkeypatch.setitem(merge_module.MIN_PROGRAMS, DEVICE, programs)
    generator = torch.Generator().manual_seed(1)
    outs = torch.randn(num_parts, 11, heads, width, generator=generator, device="cpu").to(DEVICE, dtype)
    lses = 30 * torch.randn(num_parts, 11, heads, generator=generator, device="cpu").to(DEVICE)
    lses[0, 3], lses[:, 7] = -math.inf, -math.inf
    outs[0, 3], outs[:, 7] = NAN, NAN
    out, lse = torch.empty(11, heads, width), torch.empty(11, heads)
    merge(outs, lses, out, lse)
    want = merge_partials(*(PartialAttention(o, x) for o, x in zip(outs, lses, strict=True)))
    assert_close(PartialAttention(out, lse), moved(want), 2e-6)
    assert (out[7] == 0).all()
    assert (lse[7] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (3, 96), (4, 128)])
def test_a_partial_merges_into_another_in_place(dtype, heads, width):
    outs, lses = torch.randn(2, 11, heads, width), 30 * torch.randn(2, 11, heads)
    lses[0, 3], lses[1, 5], lses[:, 7] = -math.inf, -math.inf, -math.inf
    outs[0, 3], outs[1, 5], outs[:, 7] = NAN, NAN, NAN
    part = outs[1].to(dtype)
    want = merge_partials(PartialAttention(outs[0].clone(), lses[0].clone()), PartialAttention(part, lses[1]))
    accumulate_(outs[0], lses[0], part, lses[1])
    assert_close(PartialAttention(outs[0], lses[0]), moved(want), 2e-6)


def test_merge_writes_groups_of_rows_that_lie_apart():
    outs, lses = torch.randn(3, 6, 2, 16), torch.randn(3, 6, 2)
    messages = torch.full((2, 3 * 2 * (16 + 1) + 5), NAN)  # a message per peer: lse, out, and something else
    lse, out = messages[:, :6].view(2, 3, 2), messages[:, 6 : 6 + 96].view(2, 3, 2, 16)
    merge(outs, lses, out, lse)
    want = merge_partials(*(PartialAttention(o, x) for o, x in zip(outs, lses, strict=True)))
    assert_close(PartialAttention(out.reshape(6, 2, 16), lse.reshape(6, 2)), moved(want), 2e-6)
    assert messages[:, 102:].isnan().all()


def test_merge_rejects_groups_of_one_output_alone():
    """Log-sum-exps of groups that lie apart would be written as if they were one group's, over what lies between."""
    outs, lses = torch.randn(3, 6, 2, 16), torch.randn(3, 6, 2)
    with pytest.raises(AssertionError, match="groups"):
        merge(outs, lses, torch.empty(6, 2, 16), torch.empty(2, 3, 2))


@pytest.mark.parametrize(("k_width", "v_width"), [(16, 16), (96, 64)])
def test_store_writes_every_token_into_its_row_and_tokens_without_one_nowhere(k_width, v_width):
    pool_k, pool_v = torch.zeros(2, 20, k_width), torch.zeros(2, 20, v_width)
    k, v = torch.randn(4, 2, k_width).transpose(0, 1), torch.randn(4, 2, v_width).transpose(0, 1)  # as models give them
    store(pool_k, pool_v, k, v, torch.tensor([7, -1, 0, 19]))
    for pool, new in ((pool_k, k), (pool_v, v)):
        want = torch.zeros_like(pool)
        want[:, [7, 0, 19]] = new[:, [0, 2, 3]]
        assert torch.equal(pool, want)


def test_store_writes_values_inside_of_keys_once():
    pool_k, k = torch.zeros(1, 9, 40), torch.randn(1, 3, 40)
    store(pool_k, pool_k[:, :, :32], k, torch.full_like(k[:, :, :32], NAN), torch.tensor([7, -1, 2], dtype=torch.int32))
    assert torch.equal(pool_k[0, [7, 2]], k[0, [0, 2]])
    assert not pool_k[0, [0, 1, 3, 4, 5, 6, 8]].any()


SMALL = pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])


def rounding_rows(width):
    """[2, 50, width] with a row of zeros, numbers of all sizes, and ties between two roundings."""
    rows = torch.randn(2, 50, width, device="cpu") * torch.rand(2, 50, 1, device="cpu") * 10
    rows[0, 3], rows[1, 4, 5], rows[1, 6] = 0.0, -1e-9, torch.arange(width, device="cpu") / 2.0
    rows[1, 6, -1] = 127.0
    return rows.to(DEVICE)


@SMALL
def test_store_rounds_as_the_core_does_bit_by_bit(dtype):
    layout = KVSpec.uniform(2, 32, 16, "float32").stored_as(dtype).layout
    k, v = rounding_rows(32), rounding_rows(16)
    want = [round_rows(rows, component) for rows, component in zip((k, v), layout.components, strict=True)]
    pools = [torch.zeros_like(rows) for rows in want]
    store(*pools, k, v, torch.tensor([-1, *range(49)]))
    for pool, rows in zip(pools, want, strict=True):
        assert torch.equal(pool[:, :49], rows[:, 1:])
        assert not pool[:, 49].any()


@SMALL
@pytest.mark.parametrize("in_keys", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_stored_rows_are_read_as_they_are_rounded(dtype, in_keys, softcap):
    spec = (KVSpec.latents(32, 16, 24, 32, "float32") if in_keys else KVSpec.uniform(2, 48, 32, "float32")).stored_as(
        dtype
    )
    q, k, v = tensors(5, 90, (4, spec.layout.num_kv_heads), width=48, v_width=32, dtype=torch.float32)
    past, own = RowSegment(0, 5, 80, 3, 50, None, FULL), RowSegment(0, 5, 80, 60, 20, 70, CAUSAL)
    hide_unread(q, k, v, [past, own])
    stored = [round_rows(rows, part) for rows, part in zip((k, v), spec.layout.components, strict=False)]
    exact = [exact_rows(rows, width, torch.float32) for rows, width in zip(stored, (48, 32), strict=False)]
    if in_keys:
        stored, exact = [stored[0], stored[0][:, :, :32]], [exact[0], exact[0][:, :, :32]]
    params = AttentionParams(48**-0.5, softcap)
    got = TritonBackend().partial_attention(q, *stored, [past, own], params)
    assert_close(got, oracle(q, *exact, [past, own], params), 2 * FLOAT32_ATOL)


def test_tables_are_made_once_for_all_layers(monkeypatch):
    calls = []
    monkeypatch.setattr(triton, "tile_tables", lambda *a, **k: (calls.append(1), tile_tables(*a, **k))[1])
    q, k, v = tensors(2, 9, (2, 1), width=16, dtype=torch.float32)
    segments = RowSegments([RowSegment(0, 2, 8, 0, 9, None, FULL)])
    for _ in range(3):
        check(q, k, v, segments, PARAMS)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.double(), k.double(), v.double()), "dtype: got float64"),
        (lambda q, k, v: (q[..., :8], k[..., :8], v), "head size: got 8"),
        (lambda q, k, v: (q, k[..., ::2], v), "do not fit|contiguous"),
    ],
)
def test_rejects_what_the_kernel_does_not_take(change, message):
    with pytest.raises(ValueError, match=message):
        TritonBackend().partial_attention(
            *change(*tensors(2, 9, (2, 1), width=16, dtype=torch.float32)),
            [RowSegment(0, 2, 8, 0, 9, None, FULL)],
            PARAMS,
        )


@pytest.mark.cover
@pytest.mark.parametrize("params", [AttentionParams(0.125), AttentionParams(0.125, softcap=5.0, window=30)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_check_at_start_passes_and_covers_tiles_splits_and_the_merge(params, dtype, monkeypatch):
    launches = []
    monkeypatch.setattr(triton, "attention", lambda *a, **k: (launches.append((a, k)), attention(*a, **k)))
    monkeypatch.setattr(triton, "num_processors", lambda device: 132)
    group = KVGroup((0,), KVSpec.uniform(2, 64, 64, dtype, params.window), 4)
    check_against_reference(TritonBackend(), group, params, DEVICE)
    ((args, options),) = launches
    assert args[5].shape[0] > 1, "splits"
    assert options["queries_per_tile"] * 2 >= 64, "tiles of prefill"


@pytest.mark.skipif(DEVICE == "cpu", reason="libraries' kernels need a GPU")
@pytest.mark.parametrize("name", ["torch", "flashinfer", "cudnn"])
def test_libraries_kernels_are_right_on_this_gpu(name):
    if name == "flashinfer":
        pytest.importorskip("flashinfer")
    group = KVGroup((0,), KVSpec.uniform(8, 128, 128, "bfloat16"), 32)
    check_against_reference(make_backend(name, DEVICE), group, AttentionParams(128**-0.5), DEVICE)
