"""The kernels of GPUs over stand-ins that behave as vLLM documents, edges included, equal those in plain torch."""

import pytest
import torch

from longspan.attention.partial import PartialAttention, merge_partials
from longspan.integrations.vllm.runner.flash import FlashKernels
from longspan.integrations.vllm.runner.kernels import DeviceCall, TorchKernels
from longspan.types import AttentionParams

BLOCKS, PAGE, HEADS, KV_HEADS, WIDTH = 12, 16, 4, 2, 8
VERSION = 3


class StandIns:
    """vLLM's functions, with what they were asked."""

    def __init__(self, lse_of_nothing):
        self.lse_of_nothing = lse_of_nothing
        self.calls = []

    def flash_attn_varlen_func(
        self, *, q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, block_table, softmax_scale,
        softcap, causal, return_softmax_lse, fa_version,
    ):  # fmt: skip
        assert return_softmax_lse
        assert fa_version == VERSION
        for numbers in (cu_seqlens_q, seqused_k, block_table):
            assert numbers.dtype == torch.int32
            assert numbers.stride(-1) == 1
        assert k.shape == v.shape == (BLOCKS, PAGE, KV_HEADS, WIDTH)
        assert k.stride(-1) == v.stride(-1) == q.stride(-1) == 1
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert max_seqlen_k == int(seqused_k.max())
        lse = torch.full((HEADS, len(q)), self.lse_of_nothing)
        for i, num_keys in enumerate(seqused_k.tolist()):
            rows = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
            if num_keys == 0:
                out[rows] = torch.nan
                continue
            blocks = block_table[i].long()
            keys, values = (
                x[blocks].flatten(0, 1)[:num_keys].repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v)
            )
            scores = torch.einsum("thd,shd->hts", q[rows], keys) * softmax_scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if causal:
                hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(num_keys - scores.shape[1] + 1)
                scores = scores.masked_fill(hidden, -torch.inf)
            out[rows] = torch.einsum("hts,shd->thd", scores.softmax(-1), values)
            lse[:, rows] = scores.logsumexp(-1)
        return out, lse

    def reshape_and_cache_flash(self, k, v, keys, values, slots, kv_cache_dtype, k_scale, v_scale):
        assert kv_cache_dtype == "auto"
        assert k_scale.item() == v_scale.item() == 1.0
        assert slots.dtype == torch.int64
        keys[slots // PAGE, slots % PAGE] = k
        values[slots // PAGE, slots % PAGE] = v

    def tidy(self, view):
        self.calls.append("tidy")
        return view

    def merge(self, parts, lses, out, lse):
        assert parts.is_contiguous()
        assert lse.shape == lses.shape[1:]
        out.copy_(merge_partials(*map(PartialAttention, parts, lses)).out)


@pytest.fixture(params=[torch.inf, -torch.inf], ids=["fa2", "fa3"])
def kernels(request):
    stand = StandIns(request.param)
    return FlashKernels(
        stand.flash_attn_varlen_func, stand.reshape_and_cache_flash, stand.merge, stand.tidy, VERSION, torch.ones(1)
    )


def stored(kernels, g):
    """KV memory in which some slots are written."""
    cache = torch.zeros(BLOCKS, KV_HEADS, PAGE, 2 * WIDTH)
    slots = torch.randperm(BLOCKS * PAGE, generator=g)
    k, v = torch.randn(2, len(slots), KV_HEADS, WIDTH, generator=g)
    kernels.store(k, v, cache, slots)
    return cache


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_equals_plain_torch(kernels, is_causal, softcap):
    g = torch.Generator().manual_seed(1)
    seed = g.get_state()
    cache = stored(kernels, g)
    g.set_state(seed)
    assert torch.equal(cache, stored(TorchKernels(), g))
    call = DeviceCall(
        block_table=torch.tensor([[3, 1], [7, 0], [2, 5], [0, 0]], dtype=torch.int32),
        query_starts=torch.tensor([0, 5, 6, 9, 11], dtype=torch.int32),
        key_lens=torch.tensor([20, 1, 32, 0], dtype=torch.int32),
        max_query_len=5,
        max_key_len=32,
        is_causal=is_causal,
    )
    q = torch.randn(11, HEADS, WIDTH, generator=g)
    params = AttentionParams(WIDTH**-0.5, softcap)
    found, expected = (torch.empty_like(q) for _ in range(2))
    lse = kernels.attend(q, cache, call, params, found)
    expected_lse = TorchKernels().attend(q, cache, call, params, expected)
    assert lse.shape == expected_lse.shape == (11, HEADS)
    torch.testing.assert_close(found[:9], expected[:9], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse[:9], expected_lse[:9], atol=1e-6, rtol=1e-5)


def test_merges_as_plain_torch(kernels):
    g = torch.Generator().manual_seed(2)
    parts, lses = torch.randn(3, 4, HEADS, WIDTH, generator=g), torch.randn(3, 4, HEADS, generator=g)
    lses[1, 2], parts[1, 2] = -torch.inf, torch.nan
    found, expected = torch.empty(4, HEADS, WIDTH), torch.empty(4, HEADS, WIDTH)
    kernels.merge(parts, lses, found)
    TorchKernels().merge(parts, lses, expected)
    assert torch.equal(found, expected)
    assert found.isfinite().all()
