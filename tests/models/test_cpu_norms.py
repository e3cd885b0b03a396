"""The kernel for norms computes what Transformers' modules do, and modules that do something else keep theirs."""

import pytest
import torch
from torch import nn
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridRMSNormGated
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm, Qwen3_5RMSNormGated

from longspan.models.cpu_norms import replace_norms_
from longspan.native import kernels, norm

pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="the kernels were not compiled")

PLAIN, GATED = (LlamaRMSNorm, Qwen3_5RMSNorm), (Qwen3_5RMSNormGated, KimiLinearRMSNormGated, OlmoHybridRMSNormGated)


def with_weights(cls, width, **options):
    made = cls(width, **options).eval()
    made.weight.data = torch.randn(width)
    return made


@pytest.mark.parametrize("cls", [*PLAIN, *GATED])
@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 7, 3, 16), (1, 401, 128)])
@torch.inference_mode()
def test_the_kernel_is_as_exact_as_the_module(cls, shape):
    module = with_weights(cls, shape[-1], eps=1e-5)
    inputs = [torch.randn(shape) for _ in range(1 + (cls in GATED))]
    exact = with_weights(cls, shape[-1], eps=1e-5).double()
    exact.weight.data = module.weight.data.double()
    wanted, own = exact(*(one.double() for one in inputs)), module(*inputs)
    assert replace_norms_(module) == 1
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        found = module(*inputs)
        torch.set_num_threads(1)
        limit = 2 * float((own - wanted).abs().max()) + 1e-6 * float(wanted.abs().max())
        assert found.shape == own.shape
        assert float((found - wanted).abs().max()) <= limit


@torch.inference_mode()
def test_views_and_other_dtypes_get_what_the_module_gives():
    module = with_weights(Qwen3_5RMSNorm, 32)
    plain = with_weights(Qwen3_5RMSNorm, 32)
    plain.weight.data = module.weight.data.clone()
    replace_norms_(module)
    x = torch.randn(4, 9, 32)
    torch.testing.assert_close(module(x.transpose(0, 1)), plain(x.transpose(0, 1)), rtol=0, atol=1e-5)
    torch.testing.assert_close(module(x[:, ::2]), plain(x[:, ::2]), rtol=0, atol=1e-5)
    assert torch.equal(module(x.bfloat16()), plain(x.bfloat16()))
    assert module(x[:0]).shape == (0, 9, 32)


class Centred(nn.Module):
    """Looks like a norm of the kernel's kind, and subtracts the mean."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize(
    "module",
    [Centred(), nn.LayerNorm(32), nn.LayerNorm(32, bias=False), LlamaRMSNorm(20), LlamaRMSNorm(32).bfloat16()],
    ids=["centred", "layer_norm", "without_bias", "odd_width", "bfloat16"],
)
def test_modules_that_compute_something_else_are_left_alone(module):
    assert replace_norms_(module) == 0
    assert "forward" not in module.__dict__


def test_a_wrong_kernel_is_not_used(monkeypatch):
    honest = norm.rms_norm
    monkeypatch.setattr("longspan.models.cpu_norms.rms_norm", lambda *args: 1.001 * honest(*args))
    assert replace_norms_(with_weights(LlamaRMSNorm, 32)) == 0
