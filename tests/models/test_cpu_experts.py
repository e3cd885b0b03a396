"""Mixtures use the kernel exactly where it computes what Transformers does."""

import pytest
import torch
from proven_models import PROVEN_MODELS, make_config
from torch import nn
from transformers import AutoModelForCausalLM

from longspan.models.cpu_experts import replace_experts_
from longspan.models.families import PROVEN_FAMILIES, Need
from longspan.native import kernels
from longspan.native.experts import NativeExperts

pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="needs the compiled kernels")


@pytest.fixture
def calls(monkeypatch):
    """Numbers of tokens of the kernel's calls."""
    seen = []
    honest = NativeExperts.__call__
    monkeypatch.setattr(NativeExperts, "__call__", lambda self, x, *rest: seen.append(len(x)) or honest(self, x, *rest))
    return seen


def build(name, **changes):
    torch.manual_seed(0)
    config = make_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 3:
                weight.normal_(std=0.3)
    return model


def mixtures(model):
    return [module for module in model.modules() if hasattr(module, "gate_up_proj")]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "glm4_moe", "olmoe"])
@torch.inference_mode()
def test_few_tokens_take_the_kernel_and_many_do_not(name, calls):
    model = build(name)
    wanted = [[module.forward(*inputs(module, count)) for count in (1, 5, 129)] for module in mixtures(model)]
    assert replace_experts_(model) == len(wanted) > 0
    calls.clear()
    for module, results in zip(mixtures(model), wanted, strict=True):
        for count, result in zip((1, 5, 129), results, strict=True):
            torch.testing.assert_close(
                module(*inputs(module, count)), result, rtol=0, atol=1e-5 * result.abs().max().item()
            )
    assert calls == [1, 5] * len(wanted)


def inputs(module, num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    scores = torch.rand(num_tokens, module.down_proj.shape[0], generator=generator)
    weights, chosen = scores.topk(2)
    width = module.down_proj.shape[1 + module.is_transposed]
    return torch.randn(num_tokens, width, generator=generator), chosen, weights


MIXTURES = [name for name, (family, _) in PROVEN_MODELS.items() if Need.EXPERTS in PROVEN_FAMILIES[family].needs]


@pytest.mark.parametrize("name", MIXTURES)
@torch.inference_mode()
def test_every_mixture_computes_the_same_expert_by_expert(name):
    model = build(name)
    found = [module for module in model.modules() if hasattr(module, "has_gate")]
    wanted = [module(*inputs(module, 40)) for module in found]
    assert replace_experts_(model) == len(found)
    for module, result in zip(found, wanted, strict=True):
        torch.testing.assert_close(module(*inputs(module, 40)), result, rtol=0, atol=1e-5 * result.abs().max().item())


@torch.inference_mode()
def test_a_gate_that_differs_only_for_large_values_takes_no_kernel(calls):
    model = build("qwen3_moe")
    for module in mixtures(model):
        module.__class__ = type("Bounded", (type(module),), {"_apply_gate": bounded_gate})
    wanted = [module(*inputs(module, 3)) for module in mixtures(model)]
    assert replace_experts_(model) == len(wanted)
    for module, result in zip(mixtures(model), wanted, strict=True):
        torch.testing.assert_close(module(*inputs(module, 3)), result, rtol=0, atol=1e-5 * result.abs().max().item())
    assert not calls


def bounded_gate(self, gate_up):
    gate, up = gate_up.clamp(max=1.0).chunk(2, dim=-1)
    return self.act_fn(gate) * up


@torch.inference_mode()
def test_another_activation_takes_no_kernel(calls):
    model = build("qwen3_moe")
    for module in mixtures(model):
        module.act_fn = nn.ReLU()
    replace_experts_(model)
    mixtures(model)[0](*inputs(mixtures(model)[0], 3))
    assert not calls


def test_experts_that_compute_something_else_keep_their_forward():
    model = build("qwen3_moe")
    for module in mixtures(model):
        module.forward = lambda hidden, chosen, scores: hidden * scores.sum()
    assert replace_experts_(model) == 0
