"""The path for GPUs, as far as a CPU can tell: what is called, with what, and what is made of the answers."""

import ast
import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from longspan.attention.base import RowSegment
from longspan.attention.check import check_against_reference
from longspan.attention.dense import DenseBackend
from longspan.attention.reference import ReferenceBackend
from longspan.comm.threads import thread_group
from longspan.errors import LongspanError, UnsupportedModelError
from longspan.integrations.vllm.backend import StepAttentionImpl, install_backend
from longspan.integrations.vllm.flash import (
    FlashStepBackend,
    VLLMFlash,
    make_flash_backend,
)
from longspan.integrations.vllm.memory import local_kv_bytes
from longspan.integrations.vllm.staging import StagingCommunicator
from longspan.kv.layout import KVGroup, KVSpec
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams

CALLED_WITH = {
    "q",
    "k",
    "v",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "softmax_scale",
    "causal",
    "softcap",
    "return_softmax_lse",
    "fa_version",
}


def flash_attn_varlen_func(
    *,
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale,
    causal,
    softcap,
    return_softmax_lse,
    fa_version,
):
    """What FlashAttention 2 says it does, for one sequence: [T, H, D] x [S, Hkv, D] to [T, H, D] and [H, T]."""
    assert (cu_seqlens_q.dtype, cu_seqlens_q.tolist()) == (torch.int32, [0, len(q)])
    assert (cu_seqlens_k.dtype, cu_seqlens_k.tolist()) == (torch.int32, [0, len(k)])
    assert (max_seqlen_q, max_seqlen_k, return_softmax_lse, fa_version) == (len(q), len(k), True, 2)
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))
    assert len(q), "no call without a query"
    assert len(k), "no call without a key"
    group = q.shape[1] // k.shape[1]
    q, k, v = q.float(), k.float(), v.float()
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(group, 1)) * softmax_scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        scores = scores.masked_fill(~torch.ones(len(q), len(k)).tril(len(k) - len(q)).bool(), -torch.inf)
    lse = scores.logsumexp(-1)
    out = torch.einsum("hts,shd->thd", scores.softmax(-1).nan_to_num(), v.repeat_interleave(group, 1))
    return out, lse.masked_fill(lse.isneginf(), torch.inf)  # an empty row has +inf


def flash_backend(function):
    return DenseBackend(VLLMFlash(function, 2), None)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(
    "segments",
    [
        [],
        [(0, 5, 100, 3, 7, None, "full")],
        [(0, 5, 100, 0, 5, 100, "causal")],
        [(2, 1, 140, 0, 9, 132, "causal")],  # decode
        [(0, 6, 100, 2, 4, 100, "causal")],  # queries past the last key
        [(0, 6, 100, 2, 9, 95, "causal")],  # keys before
        [(0, 6, 100, 2, 9, 103, "causal")],  # the first queries see none, and the last keys are seen by none
        [(0, 6, 100, 2, 3, 90, "causal")],  # all are seen
        [(0, 6, 100, 2, 3, 200, "causal")],  # none is
        [(0, 4, 8, 0, 4, 8, "causal"), (0, 4, 8, 9, 8, None, "full"), (4, 2, 30, 17, 3, 29, "causal")],
        [(0, 0, 8, 0, 4, 8, "causal"), (0, 3, 8, 0, 0, None, "full"), (0, 3, 8, 0, 2, None, "none")],
    ],
)
def test_calls_add_up_to_the_reference(segments, softcap):
    g = torch.Generator().manual_seed(2)
    q = torch.randn(7, 4, 16, generator=g)
    k, v = (torch.randn(2, 20, 16, generator=g) for _ in range(2))  # a pool's rows
    rows = [RowSegment(*numbers, Visibility(visibility)) for *numbers, visibility in segments]
    params = AttentionParams(0.25, softcap)
    found = flash_backend(flash_attn_varlen_func).partial_attention(q, k, v, rows, params)
    expected = ReferenceBackend().partial_attention(q, k, v, rows, params)
    torch.testing.assert_close(found.out, expected.out)
    torch.testing.assert_close(found.lse, expected.lse)


def test_rejects_windows():
    q, k = torch.randn(4, 2, 16), torch.randn(1, 4, 16)
    with pytest.raises(ValueError, match="window: got 3"):
        flash_backend(flash_attn_varlen_func).partial_attention(
            q, k, k, [RowSegment(0, 4, 8, 0, 4, 8, Visibility.BAND)], AttentionParams(1.0, window=3)
        )


def test_vllms_function_has_the_parameters_that_we_name():
    source = (Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py").read_text()
    (function,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_varlen_func"
    )
    assert {argument.arg for argument in function.args.args} >= CALLED_WITH
    assert inspect.signature(flash_attn_varlen_func).parameters.keys() == CALLED_WITH
    assert {"head_size", "head_size_v", "requires_softcap"} <= inspect.signature(
        fa_utils.get_flash_attn_version
    ).parameters.keys()
    assert "flash_attn_varlen_func" in inspect.getsource(fa_utils)


@pytest.mark.parametrize(
    ("dtype", "v_width", "version"), [("float32", 64, 3), ("bfloat16", 32, 3), ("bfloat16", 64, None)]
)
def test_rejects_what_the_kernel_cannot_do(monkeypatch, dtype, v_width, version):
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **asked: version)
    with pytest.raises(UnsupportedModelError, match="model: "):
        make_flash_backend(KVSpec.uniform(2, 64, v_width, dtype), has_softcap=False)


def test_takes_the_version_that_vllm_would_take(monkeypatch):
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **asked: 2)
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", flash_attn_varlen_func, raising=False)
    backend = make_flash_backend(KVSpec.uniform(1, 16, 16, "bfloat16"), has_softcap=True)
    q = torch.randn(1, 2, 16)
    k = torch.randn(1, 3, 16)
    found = backend.partial_attention(q, k, k, [RowSegment(0, 1, 5, 0, 3, None, Visibility.FULL)], AttentionParams(1.0))
    assert found.lse.isfinite().all()


def base_2(**arguments):
    out, lse = flash_attn_varlen_func(**arguments)
    return out, lse / math.log(2)


def backwards(*, k, **arguments):
    return flash_attn_varlen_func(k=k.flip(0), **arguments)


@pytest.mark.parametrize("kernel", [base_2, backwards])
def test_a_kernel_that_does_otherwise_is_refused_at_start(kernel):
    group, params = KVGroup((0,), KVSpec.uniform(2, 16, 16, "bfloat16"), 4), AttentionParams(0.25)
    check_against_reference(flash_backend(flash_attn_varlen_func), group, params, "cpu")
    with pytest.raises(LongspanError, match="vllm_flash_attention backend on cpu"):
        check_against_reference(flash_backend(kernel), group, params, "cpu")


def test_vllms_models_ask_for_our_backend(monkeypatch):
    from vllm.v1.attention.backends import registry

    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    install_backend("cuda")
    assert AttentionBackendEnum.FLASH_ATTN.get_class() is FlashStepBackend
    assert FlashStepBackend.get_impl_cls() is StepAttentionImpl
    assert not FlashAttentionBackend.forward_includes_kv_cache_update, "which is why ours says so"


def test_messages_go_through_buffers_of_their_own():
    ours, peer = (StagingCommunicator(comm) for comm in thread_group(2))
    sent, received = torch.arange(6, dtype=torch.bfloat16).view(2, 3), torch.zeros(2, 3, dtype=torch.bfloat16)
    pending = ours.exchange([(1, sent)], [])
    sent.zero_()  # the copy is on its way
    arriving = peer.exchange([], [(0, received)])
    assert not received.any(), "written when waited for"
    arriving.wait()
    pending.wait()
    assert received.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_gpus_memory_is_what_vllm_may_use_of_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 1000))
    cache = SimpleNamespace(kv_cache_memory_bytes=None, gpu_memory_utilization=0.9)
    assert local_kv_bytes(cache, 2, None, torch.device("cuda:0")) == 500
