"""Every backend against a dense float64 softmax at true positions, and the edges that backends get wrong.

Must not know kernels' insides, but for the sizes at which the cpu backend changes its path.
"""

import math
from itertools import pairwise

import pytest
import torch
from attention_cases import assert_close, cases, hide_unread, oracle, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from native_stand_ins import NativeStandIns
from torch.utils._python_dispatch import TorchDispatchMode  # torch documents it under this name

from longspan.attention import folding, pieces, softcap_cpu
from longspan.attention.base import RowSegment
from longspan.attention.cpu import CPUBackend
from longspan.attention.partial import PartialAttention, merge_partials, merge_sinks_
from longspan.attention.reference import ReferenceBackend, visible_pairs
from longspan.attention.select import make_backend
from longspan.errors import ConfigError
from longspan.sharding.visibility import Visibility, visibility
from longspan.types import AttentionParams

NAN, INF = float("nan"), float("inf")
NONE, FULL, CAUSAL, BAND = Visibility.NONE, Visibility.FULL, Visibility.CAUSAL, Visibility.BAND

BACKENDS = [ReferenceBackend(), CPUBackend(), NativeStandIns()]
backends = pytest.mark.parametrize("backend", BACKENDS, ids=["reference", "cpu", "native_stand_ins"])


def check(backend, q, k, v, segments, params, atol=1e-12) -> PartialAttention:
    got = backend.partial_attention(q, k, v, segments, params)
    assert got.out.shape == (q.shape[0], q.shape[1], v.shape[2])
    assert got.lse.shape == q.shape[:2]
    assert_close(got, oracle(q, k, v, segments, params), atol)
    return got


PARAMS = AttentionParams(scale=0.3)


@backends
@settings(max_examples=60, deadline=None)
@given(case=cases(), heads=st.sampled_from([(1, 1), (4, 1), (2, 2), (7, 1), (8, 1)]), seed=st.integers(0, 9))
def test_any_segments_match_float64_and_rows_outside_them_are_not_read(backend, case, heads, seed):
    num_rows, num_keys, segments, params = case
    q, k, v = tensors(num_rows, num_keys, heads, width=4, seed=seed)
    hide_unread(q, k, v, segments)
    check(backend, q, k, v, segments, params)


@backends
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (7, 1), (8, 1), (14, 2), (8, 2), (6, 3)])
def test_head_groups_and_a_layout_with_as_many_heads_as_rows(backend, heads):
    q, k, v = tensors(heads[0], 21, heads)  # H == T: a swapped layout has the right shape and the wrong numbers
    for num_keys, key_position, seen in ((21, None, FULL), (21, 5, CAUSAL)):
        segment = RowSegment(0, heads[0], 20, 0, num_keys, key_position, seen)
        check(backend, q, k, v, [segment], PARAMS)


@backends
@pytest.mark.parametrize(("width", "v_width"), [(1, 1), (3, 3), (8, 5), (5, 8), (80, 80), (128, 128), (1, 4)])
@pytest.mark.parametrize("seen", [FULL, CAUSAL, BAND])
def test_any_head_size_and_unequal_widths_of_keys_and_values(backend, width, v_width, seen):
    q, k, v = tensors(6, 9, width=width, v_width=v_width)
    params = AttentionParams(scale=width**-0.5, window=3)
    check(backend, q, k, v, [RowSegment(0, 6, 4, 0, 9, None if seen is FULL else 1, seen)], params)


@backends
@pytest.mark.parametrize("num_rows", [0, 1, 3])
@pytest.mark.parametrize("num_keys", [0, 1, 3])
def test_zero_sizes_are_empty_partials(backend, num_rows, num_keys):
    q, k, v = tensors(num_rows, num_keys)
    for segments in ([], [RowSegment(0, num_rows, 5, 0, 0, 0, CAUSAL)], [RowSegment(0, 0, 5, 0, num_keys, None, FULL)]):
        got = check(backend, q, k, v, segments, PARAMS)
        assert torch.equal(got.out, torch.zeros_like(got.out))
        assert torch.isneginf(got.lse).all()
    check(backend, q, k, v, [RowSegment(0, num_rows, 5, 0, num_keys, None, FULL)], PARAMS)


@backends
def test_a_lone_query_that_is_also_a_row_of_a_longer_run_keeps_both_its_parts(backend, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    q, k, v = tensors(11, 9, (4, 1))
    check(backend, q, k, v, [RowSegment(10, 1, 30, 0, 3, None, FULL), RowSegment(0, 11, 20, 4, 5, None, FULL)], PARAMS)
    check(backend, q, k, v, [RowSegment(0, 1, 5, 0, 3, None, FULL), RowSegment(0, 1, 5, 4, 2, 4, CAUSAL)], PARAMS)


@backends
def test_queries_before_the_first_key_or_past_the_window_are_empty_rows_with_lse_minus_infinity(backend):
    q, k, v = tensors(10, 4)
    got = check(backend, q, k, v, [RowSegment(0, 10, 0, 0, 4, 6, CAUSAL)], PARAMS)
    assert torch.isneginf(got.lse[:6]).all()
    assert torch.isfinite(got.lse[6:]).all()
    params = AttentionParams(0.3, window=2)
    got = check(backend, q, k, v, [RowSegment(0, 10, 0, 0, 4, 2, BAND)], params)
    assert torch.isneginf(got.lse[[0, 1, 7, 8, 9]]).all()
    for seen in (CAUSAL, BAND):  # nothing at all is visible
        got = check(backend, q, k, v, [RowSegment(0, 10, 0, 0, 4, 10, seen)], params)
        assert torch.isneginf(got.lse).all()


@backends
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [1, 5, 63, 64, 65, 120, 165, 220, 2500])
def test_windows_smaller_than_the_run_larger_and_across_runs(monkeypatch, backend, window, softcap):
    monkeypatch.setattr(pieces, "BAND_MIDDLE", 50)  # the same three-part path as a real wide window, on fewer keys
    monkeypatch.setattr(pieces, "WIDE_BAND_BLOCK", 60)
    monkeypatch.setattr(softcap_cpu, "BLOCK_KEYS", 32)
    monkeypatch.setattr(softcap_cpu, "MAX_SCORES", 2000)
    num_keys, num_queries, position = 330, 150, 180
    q, k, v = tensors(num_queries, num_keys, (2, 1), width=4)
    params = AttentionParams(0.4, softcap, window)
    cuts = [0, 17, 64, 180, 190, 330]  # key runs of one request: page edges, a mid-page start, its own tokens
    segments = []
    for start, end in pairwise(cuts):
        seen = visibility(position, position + num_queries, start, end, window)
        segments.append(RowSegment(0, num_queries, position, start, end - start, start, seen))
    whole = [RowSegment(0, num_queries, position, 0, num_keys, 0, BAND)]
    want = ReferenceBackend().partial_attention(q, k, v, whole, params)
    assert_close(backend.partial_attention(q, k, v, segments, params), want, 1e-12)
    assert_close(backend.partial_attention(q, k, v, whole, params), want, 1e-12)


def test_the_reference_is_the_definition_for_a_band_too():
    q, k, v = tensors(40, 50, (2, 1))
    check(ReferenceBackend(), q, k, v, [RowSegment(0, 40, 10, 0, 50, 0, BAND)], AttentionParams(0.4, None, 7))


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
@pytest.mark.parametrize("num_keys", [1, 3, 1029, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_decode_cut_into_runs_for_threads_is_the_same_attention(monkeypatch, num_threads, num_keys, dtype):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setattr(folding, "MIN_RUN_KEYS", 2)
    q, k, v = tensors(1, num_keys, (3, 1), dtype=dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    got = check(CPUBackend(), q, k, v, [RowSegment(0, 1, 9, 0, num_keys, None, FULL)], PARAMS, tolerance)
    assert got.out.dtype == got.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    ("num_kv_heads", "num_rows", "num_keys", "num_threads", "num_runs"),
    [
        (1, 4, 16384, 1, 1),
        (1, 4, 16384, 2, 2),
        (2, 4, 16384, 2, 1),
        (3, 4, 16384, 2, 2),
        (2, 4, 16384, 8, 4),
        (1, 4, 700, 8, 1),
        (1, 4, 100, 8, 1),
        (2, 4096, 16384, 8, 1),
        (1, 4, 2048, 16, 4),
    ],
)
def test_keys_are_cut_until_every_thread_works_but_not_too_short(
    num_kv_heads, num_rows, num_keys, num_threads, num_runs
):
    assert folding.count_key_runs(num_kv_heads, num_rows, num_keys, num_threads) == num_runs


class LargestNewTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that an operator made, views left out."""

    def __init__(self, *existing: torch.Tensor):
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.storages:
                self.num_bytes = max(self.num_bytes, tensor.nbytes)
        return result


@pytest.mark.parametrize("num_threads", [1, 8])
def test_a_decode_does_not_copy_the_keys(monkeypatch, num_threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    q, k, v = tensors(1, 4099, (2, 1), width=64, dtype=torch.float32)
    with LargestNewTensor(q, k, v) as largest:
        CPUBackend().partial_attention(q, k, v, [RowSegment(0, 1, 5000, 0, 4099, None, FULL)], PARAMS)
    assert 0 < largest.num_bytes <= 10 * q.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("seen", [FULL, CAUSAL, BAND])
def test_the_error_is_at_most_twice_that_of_eager_attention_in_the_same_dtype(dtype, softcap, seen):
    q, k, v = tensors(96, 700, (8, 2), width=32, dtype=dtype)
    params = AttentionParams(32**-0.5, softcap, 90)
    segment = RowSegment(0, 96, 600, 0, 700, None if seen is FULL else 0, seen)
    want = ReferenceBackend().partial_attention(q.double(), k.double(), v.double(), [segment], params)
    hidden = ~visible_pairs(96, 700, [segment], params.window, q.device)[:, None, :]  # [T, 1, S]
    keys, values = k.repeat_interleave(4, dim=0), v.repeat_interleave(4, dim=0)  # [H, S, D]
    scores = torch.einsum("thd,hsd->ths", q, keys) * params.scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    eager = torch.softmax(scores.float().masked_fill(hidden, -INF), dim=-1).to(dtype)
    eager_error = (torch.einsum("ths,hsd->thd", eager, values).double() - want.out).abs().max()
    got = CPUBackend().partial_attention(q, k, v, [segment], params)
    assert (got.out.double() - want.out).abs().max() <= 2 * eager_error
    assert (got.lse.double() - want.lse).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("num_runs", [1, 2, 3, 8, 16])
def test_the_error_of_bfloat16_does_not_grow_with_the_number_of_key_runs(num_runs):
    q, k, v = tensors(32, 512, (4, 2), width=32, dtype=torch.bfloat16)
    cuts = [512 * run // num_runs for run in range(num_runs + 1)]
    segments = [RowSegment(0, 32, 600, a, b - a, None, FULL) for a, b in pairwise(cuts)]
    params = AttentionParams(32**-0.5)
    whole = [RowSegment(0, 32, 600, 0, 512, None, FULL)]
    want = ReferenceBackend().partial_attention(q.double(), k.double(), v.double(), whole, params)
    got = CPUBackend().partial_attention(q, k, v, segments, params)
    assert (got.out.double() - want.out).abs().max() < 1.2e-2


@backends
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_scores_neither_overflow_nor_underflow(backend, scale):
    q, k, v = torch.ones(2, 1, 1), torch.tensor([[[1.0], [1.0], [0.5]]]), torch.tensor([[[1.0], [2.0], [9.0]]])
    got = backend.partial_attention(q, k, v, [RowSegment(0, 2, 3, 0, 3, None, FULL)], AttentionParams(scale))
    assert got.out.flatten().tolist() == ([1.5, 1.5] if scale > 0 else [9.0, 9.0])
    assert got.lse.flatten().tolist() == pytest.approx([scale + math.log(2)] * 2 if scale > 0 else [scale / 2] * 2)


@backends
def test_lse_is_a_natural_logarithm_of_scaled_scores(backend):
    q, k, v = torch.full((1, 1, 1), math.log(3)), torch.tensor([[[2.0], [0.0]]]), torch.tensor([[[1.0], [0.0]]])
    got = backend.partial_attention(q, k, v, [RowSegment(0, 1, 2, 0, 2, None, FULL)], AttentionParams(0.5))
    assert got.lse.item() == pytest.approx(math.log(4), rel=1e-6)  # base 2 would give 2.0
    assert got.out.item() == pytest.approx(0.75, rel=1e-6)


@backends
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 8])
def test_pages_with_any_owner_merge_to_the_whole_with_sinks_counted_once(backend, num_ranks):
    num_keys, position, num_queries, page_size = 45, 14, 31, 4  # 31 tokens, a mid-page start, the last page not full
    q, k, v = tensors(num_queries, num_keys, (8, 2), seed=num_ranks)
    sinks = torch.linspace(-1, 3, 8).double()
    generator = torch.Generator().manual_seed(num_ranks)
    segments = [[] for _ in range(num_ranks)]
    for start in range(0, num_keys, page_size):
        end = min(start + page_size, num_keys)
        seen = visibility(position, position + num_queries, start, end, None)
        owner = int(torch.randint(num_ranks, (), generator=generator))
        if num_ranks == 8 and owner == 3:
            owner = 4  # a rank that holds nothing
        segments[owner].append(RowSegment(0, num_queries, position, start, end - start, start, seen))
    merged = merge_partials(*(backend.partial_attention(q, k, v, mine, PARAMS) for mine in segments))
    merge_sinks_(merged, sinks)
    whole = oracle(q, k, v, [RowSegment(0, num_queries, position, 0, num_keys, 0, CAUSAL)], PARAMS)
    total = torch.logaddexp(whole.lse, sinks.expand_as(whole.lse))
    want = PartialAttention(whole.out * torch.exp(whole.lse - total)[..., None], total)
    assert_close(merged, want, 1e-12)


@backends
def test_queries_of_any_strides(backend):
    q, k, v = tensors(6, 9)
    segments = [RowSegment(0, 6, 3, 0, 9, 0, CAUSAL)]
    want = backend.partial_attention(q, k, v, segments, PARAMS)
    for strided in (q.transpose(0, 1).contiguous().transpose(0, 1), q.mT.contiguous().mT):
        assert_close(backend.partial_attention(strided, k, v, segments, PARAMS), want, 1e-14)


def test_scores_of_the_softcap_path_and_masks_are_bounded():
    q, k, v = tensors(512, 8192, (4, 1), width=8, dtype=torch.float32)
    full = [RowSegment(0, 512, 9000, 0, 8192, None, FULL)]
    with LargestNewTensor(q, k, v) as largest:
        CPUBackend().partial_attention(q, k, v, full, AttentionParams(0.3, softcap=5.0))
    assert largest.num_bytes == softcap_cpu.MAX_SCORES * 4
    band = [RowSegment(0, 512, 7680, 0, 8192, 0, BAND)]
    for window in (1500, 2500):
        with LargestNewTensor(q, k, v) as largest:
            CPUBackend().partial_attention(q, k, v, band, AttentionParams(0.3, window=window))
        assert largest.num_bytes <= 8 * pieces.WIDE_BAND_BLOCK * (2 * pieces.WIDE_BAND_BLOCK + pieces.BAND_MIDDLE)


def test_the_reference_rejects_a_key_that_is_seen_twice():
    q, k, v = tensors(2, 4)
    segments = [RowSegment(0, 2, 9, 0, 3, None, FULL), RowSegment(1, 1, 9, 2, 2, None, FULL)]
    with pytest.raises(ValueError, match="sees a key twice"):
        ReferenceBackend().partial_attention(q, k, v, segments, PARAMS)


@backends
def test_rejects_arguments_that_do_not_fit_together(backend):
    q, k, v = tensors(4, 6)
    full = RowSegment(0, 4, 9, 0, 6, None, FULL)
    for bad_q, bad_k, bad_v in (
        (q, k[..., :3], v),
        (q[:, :3], k, v),
        (q, k[:, :5], v),
        (q, k.float(), v),
        (q[0], k, v),
    ):
        with pytest.raises(ValueError, match=r"fit together|differ in dtype|3 dimensions"):
            backend.partial_attention(bad_q, bad_k, bad_v, [full], PARAMS)
    for outside in (RowSegment(1, 4, 9, 0, 6, None, FULL), RowSegment(0, 4, 9, 1, 6, None, FULL)):
        with pytest.raises(ValueError, match="outside"):
            backend.partial_attention(q, k, v, [outside], PARAMS)
    with pytest.raises(ValueError, match="window: None"):
        backend.partial_attention(q, k, v, [RowSegment(0, 4, 9, 0, 6, 0, BAND)], PARAMS)


def test_the_cpu_backend_rejects_strided_keys_and_unproven_dtypes():
    q, k, v = tensors(4, 6)
    full = [RowSegment(0, 4, 9, 0, 6, None, FULL)]
    with pytest.raises(ValueError, match="contiguous in the last dimension"):
        CPUBackend().partial_attention(q, k.mT.contiguous().mT, v, full, PARAMS)
    with pytest.raises(ValueError, match=r"float16.*takes"):
        CPUBackend().partial_attention(q.half(), k.half(), v.half(), full, PARAMS)


def test_rejects_segments_and_params_without_a_meaning():
    for seen in (CAUSAL, BAND):
        with pytest.raises(ValueError, match="key_position"):
            RowSegment(0, 1, 0, 0, 1, None, seen)
    with pytest.raises(ValueError, match="negative"):
        RowSegment(0, -1, 0, 0, 1, None, FULL)
    with pytest.raises(ValueError, match="softcap: got 0"):
        AttentionParams(1.0, softcap=0.0)
    with pytest.raises(ValueError, match="window: got 0"):
        AttentionParams(1.0, window=0)


def test_backends_are_made_by_name():
    assert make_backend("auto", "cpu").name == make_backend("cpu", torch.device("cpu")).name == "cpu"
    assert make_backend("reference", "cuda").name == "reference"


@pytest.mark.parametrize(
    ("name", "device"), [("flash", "cpu"), ("", "cpu"), ("cpu", "cuda"), ("auto", "mps"), ("torch", "cpu")]
)
def test_rejects_backends_that_do_not_exist_or_cannot_run_on_the_device(name, device):
    with pytest.raises(ConfigError, match=rf"attention_backend: got {name!r}.*legal.*reference"):
        make_backend(name, device)
