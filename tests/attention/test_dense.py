"""Segments as dense calls of a library's kernel, and the edges of the two libraries, with stand-ins that have them."""

import math
import sys
import types

import pytest
import torch
from attention_cases import BAND, CAUSAL, FULL, NONE, assert_close, cases, hide_unread, oracle, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import greedy, run_requests, tiny_model

from longspan.attention import cudnn, dense, torch_flash
from longspan.attention.base import RowSegment, RowSegments
from longspan.attention.check import check_against_reference
from longspan.attention.cudnn import CudnnPrefill
from longspan.attention.dense import DenseBackend
from longspan.attention.reference import ReferenceBackend
from longspan.attention.torch_flash import TorchFlash
from longspan.errors import LongspanError
from longspan.kv.layout import KVGroup, KVSpec
from longspan.types import AttentionParams
from longspan.worker import device

PARAMS = AttentionParams(scale=0.3)


def bottom_right(q, k, v, is_causal, scale, softcap):
    """[T, H, D] x [Hkv, S, D] in float64: out, and lse in natural log, -inf for an empty row."""
    group = q.shape[1] // k.shape[0]
    k, v = k.double().repeat_interleave(group, 0), v.double().repeat_interleave(group, 0)
    scores = torch.einsum("thd,hsd->ths", q.double(), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        seen = torch.ones(q.shape[0], k.shape[1]).tril(k.shape[1] - q.shape[0]).bool()
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return torch.einsum("ths,hsd->thd", scores.softmax(-1), v), scores.logsumexp(-1)


class Kernel:
    """A kernel without edges, which notes its calls."""

    name = "kernel"

    def __init__(self):
        self.calls = []

    def unsupported(self, spec, params):
        return None

    def dense_attention(self, q, k, v, *, is_causal, scale, softcap):
        assert q.shape[0], "no call without a query"
        assert k.shape[1], "no call without a key"
        assert not is_causal or k.shape[1] >= q.shape[0], "no row without a key"
        self.calls.append((q.shape[0], k.shape[1], is_causal))
        return bottom_right(q, k, v, is_causal, scale, softcap)


@settings(max_examples=100, deadline=None)
@given(case=cases(), has_others=st.booleans())
def test_calls_add_up_to_the_oracle(case, has_others):
    num_rows, num_keys, segments, params = case
    if not has_others:
        segments = [s for s in segments if s.visibility is not BAND]
        params = AttentionParams(params.scale, params.softcap)
    q, k, v = tensors(num_rows, num_keys, (4, 2))
    hide_unread(q, k, v, segments)
    before, dense.MIN_QUERIES = dense.MIN_QUERIES, 4
    try:
        found = DenseBackend(Kernel(), ReferenceBackend() if has_others else None).partial_attention(
            q, k, v, RowSegments(segments), params
        )
    finally:
        dense.MIN_QUERIES = before
    assert_close(found, oracle(q, k, v, segments, params), 1e-12)


def test_past_and_diagonal_of_a_chunk_are_one_call_over_gathered_keys():
    kernel = Kernel()
    q, k, v = tensors(8, 40, (4, 2))
    segments = RowSegments(
        [
            RowSegment(0, 8, 20, 30, 6, None, FULL),
            RowSegment(0, 8, 20, 3, 5, 20, CAUSAL),  # the chunk's own keys lie in two places
            RowSegment(0, 8, 20, 12, 3, 25, CAUSAL),
        ]
    )
    for _ in range(2):
        found = DenseBackend(kernel, None).partial_attention(q, k, v, segments, PARAMS)
        assert_close(found, oracle(q, k, v, segments, PARAMS), 1e-12)
    assert kernel.calls == [(8, 14, True)] * 2


def test_short_runs_and_bands_go_to_the_other_backend():
    kernel = Kernel()
    q, k, v = tensors(dense.MIN_QUERIES + 1, 40, (4, 2))
    segments = [
        RowSegment(0, 1, 90, 0, 9, None, FULL),
        RowSegment(1, dense.MIN_QUERIES, 100, 9, 20, None, FULL),
        RowSegment(1, dense.MIN_QUERIES, 100, 29, 9, 95, BAND),
        RowSegment(1, dense.MIN_QUERIES, 100, 38, 2, None, NONE),
    ]
    params = AttentionParams(0.3, window=7)
    found = DenseBackend(kernel, ReferenceBackend()).partial_attention(q, k, v, segments, params)
    assert_close(found, oracle(q, k, v, segments, params), 1e-12)
    assert kernel.calls == [(dense.MIN_QUERIES, 20, False)]


def aten_flash(q, k, v, cum_q, cum_k, max_q, max_k, dropout, is_causal, return_debug_mask, *, scale):
    """`torch.ops.aten._flash_attention_forward`, as Note [Edges of PyTorch's flash kernel] has it."""
    assert (cum_q, cum_k, dropout, return_debug_mask) == (None, None, 0.0, False)
    assert (q.shape[:2], k.shape[:2]) == ((1, max_q), (1, max_k))
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))
    out, lse = bottom_right(q[0], k[0].transpose(0, 1), v[0].transpose(0, 1), is_causal, scale, None)
    return out.to(q.dtype)[None], lse.float().transpose(0, 1)[None], None, None, None


def aten_cudnn(q, k, v, bias, needs_lse, dropout, is_causal, return_debug_mask, *, scale):
    """`torch.ops.aten._scaled_dot_product_cudnn_attention`, as Note [Edges of cuDNN's kernel] has it."""
    assert (bias, needs_lse, dropout, return_debug_mask) == (None, True, 0.0, False)
    assert q.shape[0] == k.shape[0] == 1
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))
    assert not is_causal or q.shape[2] == k.shape[2], "the mask is aligned top left"
    out, lse = bottom_right(q[0].transpose(0, 1), k[0], v[0], is_causal, scale, None)
    return out.to(q.dtype).transpose(0, 1)[None], lse.float().transpose(0, 1)[None, ..., None], None


def single_prefill_with_kv_cache(q, k, v, *, causal, kv_layout, sm_scale, logits_soft_cap, return_lse):
    """FlashInfer's function, as Note [Edges of FlashInfer's prefill kernel] has it."""
    assert (kv_layout, return_lse) == ("HND", True)
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))
    out, lse = bottom_right(q, k, v, causal, sm_scale, logits_soft_cap)
    return out.to(q.dtype), lse.float() / math.log(2)


@pytest.fixture
def flashinfer(monkeypatch):
    """The kernel of `longspan.attention.flashinfer`, on a stand-in for the library."""
    library = types.ModuleType("flashinfer")
    library.single_prefill_with_kv_cache = single_prefill_with_kv_cache
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    monkeypatch.delitem(sys.modules, "longspan.attention.flashinfer", raising=False)
    from longspan.attention.flashinfer import FlashInferPrefill

    yield FlashInferPrefill()
    sys.modules.pop("longspan.attention.flashinfer", None)


@pytest.fixture
def torch_kernel(monkeypatch):
    monkeypatch.setattr(torch_flash, "flash_attention_forward", aten_flash)
    return TorchFlash()


@pytest.fixture
def cudnn_kernel(monkeypatch):
    monkeypatch.setattr(cudnn, "cudnn_attention", aten_cudnn)
    return CudnnPrefill()


@pytest.mark.parametrize("library", ["torch_kernel", "flashinfer", "cudnn_kernel"])
def test_the_edges_of_libraries_are_corrected(library, request):
    kernel = request.getfixturevalue(library)
    group = KVGroup((0,), KVSpec.uniform(2, 64, 64, "bfloat16"), 4)
    check_against_reference(DenseBackend(kernel, None), group, AttentionParams(0.125), "cpu")
    q, k, v = tensors(9, 60, (4, 2), width=64, dtype=torch.bfloat16)
    segments = [RowSegment(0, 9, 30, 20, 30, None, FULL), RowSegment(0, 9, 30, 3, 9, 30, CAUSAL)]
    found = DenseBackend(kernel, None).partial_attention(q, k, v, segments, AttentionParams(0.02))
    assert_close(found, oracle(q, k, v, segments, AttentionParams(0.02)), 0.02)


def test_an_edge_that_is_not_corrected_is_found_when_a_rank_starts(torch_kernel, monkeypatch):
    def base_2(*args, **kwargs):
        out, lse, *rest = aten_flash(*args, **kwargs)
        return out, lse / math.log(2), *rest

    monkeypatch.setattr(torch_flash, "flash_attention_forward", base_2)
    group = KVGroup((0,), KVSpec.uniform(2, 64, 64, "bfloat16"), 4)
    with pytest.raises(LongspanError, match="log-sum-exps of the torch backend on cpu"):
        check_against_reference(DenseBackend(torch_kernel, None), group, AttentionParams(0.125), "cpu")


def test_the_check_at_start_reaches_a_kernel_for_long_runs_only():
    class Wrong(Kernel):
        def dense_attention(self, *args, **kwargs):
            out, lse = super().dense_attention(*args, **kwargs)
            return out + 1, lse

    group, params = KVGroup((0,), KVSpec.uniform(2, 64, 64, "bfloat16"), 4), AttentionParams(0.125)
    check_against_reference(DenseBackend(Kernel(), ReferenceBackend()), group, params, "cpu")
    with pytest.raises(LongspanError, match="outputs of the kernel backend on cpu"):
        check_against_reference(DenseBackend(Wrong(), ReferenceBackend()), group, params, "cpu")


@pytest.mark.parametrize("library", ["torch_kernel", "flashinfer"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "dtype: got float32"),
        ({"k_width": 36, "v_width": 36}, "head size: got 36"),
        ({"v_width": 32}, "head size: got 64 of keys and 32 of values"),
        ({"k_width": 512, "v_width": 512}, "head size: got 512"),
    ],
)
def test_rejects_models_that_the_library_has_no_kernel_for(library, change, message, request):
    backend = DenseBackend(request.getfixturevalue(library), None)
    spec = KVSpec.uniform(**({"num_kv_heads": 2, "k_width": 64, "v_width": 64, "dtype": "bfloat16"} | change))
    assert message in (backend.unsupported(spec, PARAMS) or "")


def test_the_torch_backend_rejects_softcaps_and_windows(torch_kernel):
    backend, spec = DenseBackend(torch_kernel, None), KVSpec.uniform(2, 64, 64, "bfloat16")
    assert backend.unsupported(spec, PARAMS) is None
    assert "softcap: got 5.0" in (backend.unsupported(spec, AttentionParams(1.0, softcap=5.0)) or "")
    assert "window: got 8" in (backend.unsupported(spec, AttentionParams(1.0, window=8)) or "")


def test_flashinfer_leaves_windows_to_the_other_backend(flashinfer):
    backend, spec = DenseBackend(flashinfer, ReferenceBackend()), KVSpec.uniform(2, 64, 64, "bfloat16")
    assert backend.unsupported(spec, AttentionParams(1.0, softcap=5.0, window=8)) is None


@pytest.mark.cover
@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("llama", "pass_kv"),
        pytest.param("qwen2", "gather_kv", marks=pytest.mark.slow),
        ("qwen3", "pass_q"),
        ("gemma2", "pass_kv"),
        ("mistral-window-24", "auto"),
    ],
)
def test_dense_calls_give_the_tokens_of_transformers(family, strategy, monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(dense, "MIN_QUERIES", 8)
    monkeypatch.setattr(device, "make_backend", lambda name, on: DenseBackend(kernel, ReferenceBackend()))
    model = tiny_model(family)
    references = model.references[:3]
    requests = run_requests(
        model,
        [(reference.prompt, greedy(12)) for reference in references],
        context_parallel_size=3,
        placement="striped",
        page_size=4,
        stripe_size=16,
        strategy=strategy,
        max_num_batched_tokens=50,
    )
    assert [r.output_token_ids for r in requests] == [reference.token_ids[:12] for reference in references]
    assert any(is_causal for _, _, is_causal in kernel.calls)
