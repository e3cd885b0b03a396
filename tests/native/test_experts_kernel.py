"""The kernel of a mixture's experts agrees with float64, for any number of tokens, choices and threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from longspan.models.packed_linear import rounded
from longspan.native import kernels, packed
from longspan.native.experts import NativeExperts

pytestmark = pytest.mark.usefixtures("binary")
needs_kernel = pytest.mark.skipif(not kernels.is_available(), reason="needs the compiled kernels")


def make(num_experts, hidden, inner, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(num_experts, 2 * inner, hidden, generator=generator) / hidden**0.5
    return gate_up, torch.randn(num_experts, hidden, inner, generator=generator) / inner**0.5


def native(gate_up, down, activation="silu"):
    return NativeExperts(gate_up.flatten(0, 1), down.flatten(0, 1), len(down), activation)


def expected(gate_up, down, x, chosen, scores, activation=F.silu):
    """Sum over each token's choices, in float64."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for token, (experts, weights) in enumerate(zip(chosen, scores, strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            out[token] += weight.double() * (down[expert].double() @ (activation(gate) * up))
    return out


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.one_of(st.integers(1, 12), st.integers(13, kernels.MAX_LINEAR_ROWS)),
    num_experts=st.integers(1, 9),
    num_chosen=st.integers(1, 4),
    hidden=st.sampled_from([16, 48, 64]),
    inner=st.sampled_from([16, 32, 80]),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_the_kernel_agrees_with_float64(
    num_tokens, num_experts, num_chosen, hidden, inner, activation, num_threads, seed
):
    gate_up, down = make(num_experts, hidden, inner, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, hidden, generator=generator)
    scores = torch.rand(num_tokens, num_experts, generator=generator).topk(min(num_chosen, num_experts)).values
    chosen = torch.rand(num_tokens, num_experts, generator=generator).topk(scores.shape[1]).indices
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = native(gate_up, down, activation)(x, chosen, scores)
    finally:
        torch.set_num_threads(before)
    known = F.silu if activation == "silu" else lambda value: F.gelu(value, approximate="tanh")
    wanted = expected(gate_up, down, x, chosen, scores, known)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


@needs_kernel
def test_a_token_gets_the_same_bits_alone_and_among_others_that_chose_other_experts():
    gate_up, down = make(6, 64, 32)
    experts, x = native(gate_up, down), torch.randn(2, 64)
    chosen, scores = torch.tensor([[4, 1], [5, 0]]), torch.rand(2, 2)
    together = experts(x, chosen, scores)
    for token in range(2):
        one = slice(token, token + 1)
        assert torch.equal(experts(x[one], chosen[one], scores[one])[0], together[token])


@needs_kernel
@pytest.mark.parametrize("number", [-1, 3, 2**40])
def test_rejects_an_expert_that_does_not_exist(number):
    experts = native(*make(3, 16, 16))
    with pytest.raises(AssertionError, match="refused 1 tokens with 2 of 3 experts"):
        experts(torch.zeros(1, 16), torch.tensor([[0, number]]), torch.ones(1, 2))


@needs_kernel
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_tokens", [1, 7, packed.MAX_ROWS])
def test_packed_weights_compute_what_the_dense_ones_do_that_they_stand_for(bits, num_tokens):
    gate_up, down = make(5, 64, 96)
    small = [rounded(weight.flatten(0, 1), bits) for weight in (gate_up, down)]
    dense = [packed.unpack(matrix) for matrix in small]
    x, scores = torch.randn(num_tokens, 64), torch.rand(num_tokens, 5).topk(3)
    wanted = NativeExperts(*dense, 5, "silu")(x, scores.indices, scores.values)
    found = NativeExperts(*small, 5, "silu")(x, scores.indices, scores.values)
    if num_tokens <= kernels.MAX_ROWS:
        assert torch.equal(found, wanted)
    else:  # dense products of many rows are added up in another order
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize(
    ("gate_up", "down"),
    [
        (torch.zeros(2 * 32, 20), torch.zeros(2 * 20, 16)),
        (torch.zeros(2 * 24, 16), torch.zeros(2 * 16, 12)),
        (torch.zeros(2 * 16, 32), torch.zeros(2 * 16, 16)),
        (torch.zeros(2 * 32, 16, dtype=torch.bfloat16), torch.zeros(2 * 16, 16, dtype=torch.bfloat16)),
        (torch.zeros(16, 2 * 32).t(), torch.zeros(2 * 16, 16)),
    ],
    ids=["hidden", "inner", "transposed shape", "bfloat16", "strides"],
)
def test_rejects_weights_that_it_cannot_read(gate_up, down):
    with pytest.raises(ValueError, match=r"no kernel for|weights .* of 2 experts"):
        NativeExperts(gate_up, down, 2, "silu")
