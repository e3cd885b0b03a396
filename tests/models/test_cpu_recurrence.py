"""Kernels for recurrent layers compute what Transformers' torch forms do, as exactly, in pieces of any length."""

import pytest
import torch
from hybrid_models import HYBRIDS
from proven_models import make_config, randomize_
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.kimi_linear import modeling_kimi_linear as by_channel
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next as by_head

from longspan.models.cpu_recurrence import replace_recurrences_
from longspan.models.recurrent import recurrent_modules
from longspan.models.speedups import RECURRENCE, speed_up_, speedups_of
from longspan.native import kernels, recurrence

pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="the kernels were not compiled")

DELTA_RULES = {3: by_head.torch_chunk_gated_delta_rule, 4: by_channel.chunk_kimi_delta_attention}
"""Transformers' forms by the dimensions of their gates."""


def delta_inputs(batch, num_tokens, heads, v_heads, width, v_width, gate_ndim):
    """q, k, v, gate, rate, state."""
    gate = (batch, num_tokens, v_heads) if gate_ndim == 3 else (batch, num_tokens, v_heads, width)
    return (
        torch.randn(batch, num_tokens, heads, width),
        torch.randn(batch, num_tokens, heads, width),
        torch.randn(batch, num_tokens, v_heads, v_width),
        -torch.randn(gate).abs(),
        torch.rand(batch, num_tokens, v_heads),
        torch.randn(batch, v_heads, width, v_width),
    )


def exact_delta_rule(q, k, v, gate, rate, state):
    """Token by token in float64: outputs and the last state."""
    q, k, v, gate, rate, state = (tensor.double() for tensor in (q, k, v, gate, rate, state))
    repeats, scale = v.shape[2] // q.shape[2], q.shape[-1] ** -0.5
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = (x.repeat_interleave(repeats, dim=2) for x in (q * scale, k))
    decay = (gate if gate.ndim == 4 else gate[..., None]).exp()
    outs = []
    for i in range(q.shape[1]):
        state = state * decay[:, i, :, :, None]
        error = v[:, i] - torch.einsum("bhd,bhdv->bhv", k[:, i], state)
        state = state + k[:, i, :, :, None] * (error * rate[:, i, :, None])[:, :, None]
        outs.append(torch.einsum("bhd,bhdv->bhv", q[:, i], state))
    return torch.stack(outs, dim=1), state


SHAPES = [
    # batch, tokens, heads, heads of values, width, width of values
    (1, 1, 2, 4, 16, 16),
    (3, 1, 2, 2, 128, 128),
    (1, 31, 2, 6, 16, 48),
    (2, 97, 1, 3, 64, 32),
    (1, 33, 2, 2, 256, 16),
]


@pytest.mark.parametrize("gate_ndim", [3, 4], ids=["by_head", "by_channel"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_delta_rule_is_as_exact_as_transformers(shape, gate_ndim):
    if gate_ndim == 4:
        shape = (*shape[:2], shape[3], *shape[3:])
    *inputs, state = delta_inputs(*shape, gate_ndim)
    exact, exact_state = exact_delta_rule(*inputs, state)
    eager, eager_state = DELTA_RULES[gate_ndim](
        *inputs[:3],
        g=inputs[3],
        beta=inputs[4],
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        try:
            final = state.clone()
            found = recurrence.delta_rule(*inputs, final, is_normed=True)
        finally:
            torch.set_num_threads(1)
        for own, theirs, true in ((found, eager, exact), (final, eager_state, exact_state)):
            limit = max(2 * float((theirs - true).abs().max()), 5e-7 * float(true.abs().max()))
            assert float((own - true).abs().max()) <= limit


def test_pieces_and_batches_give_what_single_requests_in_one_piece_give():
    *inputs, state = delta_inputs(3, 37, 2, 4, 32, 48, 3)
    whole_state = state.clone()
    whole = recurrence.delta_rule(*inputs, whole_state, is_normed=True)
    for request in range(3):
        own = state[request : request + 1].clone()
        parts = [
            recurrence.delta_rule(*(one[request : request + 1, start:end] for one in inputs), own, is_normed=True)
            for start, end in ((0, 20), (20, 22), (22, 36), (36, 37))
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1)[0], whole[request], rtol=0, atol=2e-6)
        torch.testing.assert_close(own[0], whole_state[request], rtol=0, atol=2e-5)


@pytest.mark.parametrize("num_threads", [1, 3, 16])
@pytest.mark.parametrize("gate_ndim", [3, 4], ids=["by_head", "by_channel"])
def test_heads_one_after_the_other_are_all_heads_at_once(num_threads, gate_ndim):
    """To the bit, in parts of any number, and where threads share the columns of one head."""
    *inputs, state = delta_inputs(2, 37, 6 if gate_ndim == 4 else 2, 6, 32, 80, gate_ndim)
    states = [state.clone(), torch.full_like(state, torch.nan)]
    wanted = recurrence.delta_rule(*inputs, states[0], is_normed=True)

    def arriving():
        for heads in (range(1), range(1, 4), range(4, 6)):
            some = slice(heads.start, heads.stop)
            states[1][:, some] = state[:, some]
            yield heads
            assert torch.equal(states[1][:, some], states[0][:, some])

    torch.set_num_threads(num_threads)
    try:
        found = recurrence.delta_rule(*inputs, states[1], is_normed=True, heads=arriving())
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found, wanted)
    assert torch.equal(*states)


def test_the_delta_rule_takes_views_of_wider_rows():
    q, k, v, gate, rate, state = delta_inputs(2, 9, 2, 4, 16, 32, 3)
    rows = torch.cat((q.flatten(2), k.flatten(2), v.flatten(2)), dim=-1)
    views = [
        part.unflatten(-1, (-1, width)) for part, width in zip(rows.split([32, 32, 128], -1), (16, 16, 32), strict=True)
    ]
    states = [state.clone(), state.clone()]
    wanted = recurrence.delta_rule(q, k, v, gate, rate, states[0], is_normed=True)
    found = recurrence.delta_rule(*views, gate, rate, states[1], is_normed=True)
    assert torch.equal(found, wanted)
    assert torch.equal(*states)


@pytest.mark.parametrize("is_silu", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_convolutions_are_those_of_torch(has_bias, is_silu):
    x, weight = torch.randn(2, 133, 48), torch.randn(48, 4)
    bias = torch.randn(48) if has_bias else None
    exact = F.conv1d(
        x.double().transpose(1, 2),
        weight.double()[:, None],
        None if bias is None else bias.double(),
        padding=3,
        groups=48,
    )[..., :-3].transpose(1, 2)
    exact = F.silu(exact) if is_silu else exact
    found = recurrence.convolve(x, weight, bias, is_silu=is_silu)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
    state = torch.full((2, 48, 4), torch.nan)
    state[..., 1:] = x[:, 97:100].transpose(1, 2)
    for i in range(100, 103):  # goes on behind token 99
        step = recurrence.convolve_step(x[:, i].contiguous(), state, weight, bias, is_silu=is_silu)
        torch.testing.assert_close(step.double(), exact[:, i], rtol=0, atol=1e-5)
    assert torch.equal(state, x[:, 99:103].transpose(1, 2))


def tiny(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name), dtype=torch.float32).eval()
    randomize_(model)
    return model


@torch.inference_mode()
def logits(model, tokens):
    """Of a prompt, and of tokens one by one behind it, with Transformers' own cache."""
    first = model(input_ids=tokens[:, :-3], use_cache=True)
    outs, cache = [first.logits], first.cache
    for i in range(3, 0, -1):
        step = model(input_ids=tokens[:, [-i]], cache=cache, use_cache=True)
        outs.append(step.logits)
    return torch.cat(outs, dim=1)


@pytest.mark.cover(cases=11)
@pytest.mark.parametrize("name", HYBRIDS)
def test_every_family_computes_the_same_with_the_kernels(monkeypatch, name):
    calls = []
    for kernel in ("convolve", "convolve_step"):
        honest = getattr(recurrence, kernel)
        monkeypatch.setattr(recurrence, kernel, lambda *a, honest=honest, **o: calls.append(1) or honest(*a, **o))
    model = tiny(name)
    tokens = torch.randint(3, 200, (2, 40))
    wanted = logits(model, tokens)
    own = {type(module): type(module).forward for module in recurrent_modules(model)}
    num_modules = len(recurrent_modules(model))
    assert replace_recurrences_(model) == num_modules
    del calls[:]
    found = logits(model, tokens)
    assert len(calls) == 4 * num_modules
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))
    assert all(cls.forward is forward for cls, forward in own.items())


@pytest.mark.parametrize("broken", ["delta_rule", "convolve", "convolve_step"])
def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch, broken):
    honest = getattr(recurrence, broken)
    monkeypatch.setattr(recurrence, broken, lambda *args, **options: 1.001 * honest(*args, **options))
    model = tiny("qwen3_5_text")
    replace_recurrences_(model)
    used = type(model.model.layers[0].linear_attn).forward.__globals__
    of_kernel = {"delta_rule": "delta_rule", "convolve": "conv1d_fn", "convolve_step": "conv1d_update"}
    names = {
        "torch_chunk_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
        "causal_conv1d_fn",
        "causal_conv1d_update",
    }
    replaced = {name for name in names if used[name] is not getattr(qwen3_5, name)}
    assert replaced
    assert not any(of_kernel[broken] in name for name in replaced)


def test_a_delta_rule_that_forgets_its_state_is_not_used(monkeypatch):
    honest = recurrence.delta_rule

    def forgetful(*args, **options):
        *inputs, state = args
        return honest(*inputs, torch.zeros_like(state), **options)

    monkeypatch.setattr(recurrence, "delta_rule", forgetful)
    model = tiny("kimi_linear")
    replace_recurrences_(model)
    used = type(recurrent_modules_of(model)[0]).forward.__globals__
    assert used["chunk_kimi_delta_attention"] is by_channel.chunk_kimi_delta_attention


def recurrent_modules_of(model):
    """Also those whose class was replaced, which has no source."""
    return [module for module in model.modules() if type(module).__name__ == "KimiLinearDeltaAttention"]


def test_weights_of_half_precision_keep_transformers_convolutions_and_the_rule_computes_in_float32():
    model = tiny("qwen3_5_text").bfloat16()
    tokens = torch.randint(3, 200, (1, 40))
    wanted = logits(model, tokens)
    speed_up_(model, [RECURRENCE])
    assert speedups_of(model) == (RECURRENCE,)
    torch.testing.assert_close(logits(model, tokens), wanted, rtol=0, atol=0.1 * float(wanted.abs().max()))


def test_models_without_states_are_left_alone():
    assert replace_recurrences_(torch.nn.Linear(4, 4)) == 0
