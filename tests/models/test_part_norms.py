"""A norm over a width that is cut: with the squares of all parts it is the whole norm, and others are refused."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from longspan.models.part_norms import cut_norm_, norm_form

WIDTH = 48


def norm_of(kind, seed=0):
    norm = kind(WIDTH, eps=1e-5).requires_grad_(False)
    norm.weight.copy_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)))
    return norm


def rows():
    return torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))


def cut(kind, spans, x):
    """Outputs of all parts, each of which adds its squares to those of the others."""
    means = [x[:, span].pow(2).mean(-1, keepdim=True) for span in spans]
    parts = []
    for index, span in enumerate(spans):
        norm = norm_of(kind)

        def add(mean, index=index):
            assert torch.equal(mean, means[index]), "each process adds its own"
            return sum(means)

        cut_norm_(norm, span, add, len(spans))
        parts.append(norm(x[:, span]))
    return parts


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Olmo2RMSNorm, Gemma2RMSNorm])
def test_parts_are_those_of_the_whole_norm(kind):
    x = rows()
    spans = [slice(0, 16), slice(16, 32), slice(32, 48)]
    torch.testing.assert_close(torch.cat(cut(kind, spans, x), dim=-1), norm_of(kind)(x))


def test_heads_that_two_processes_have_count_once():
    x = rows()
    spans = [slice(0, 24), slice(0, 24), slice(24, 48), slice(24, 48)]
    parts = cut(Olmo2RMSNorm, spans, x)
    torch.testing.assert_close(torch.cat(parts[::2], dim=-1), norm_of(Olmo2RMSNorm)(x))
    assert torch.equal(parts[0], parts[1])


def test_forms_of_families_are_told_apart():
    forms = [norm_form(norm_of(kind)) for kind in (LlamaRMSNorm, Olmo2RMSNorm, Gemma2RMSNorm)]
    assert [(form.adds_one, form.rounds_first) for form in forms] == [(False, True), (False, False), (True, False)]
    with torch.device("meta"):
        assert norm_form(Olmo2RMSNorm(WIDTH, eps=1e-5)) == forms[1], "weights are not needed"


def test_rejects_norms_that_are_no_rms_norm():
    with pytest.raises(ValueError, match=r"^LayerNorm, which is no RMS norm"):
        norm_form(nn.LayerNorm(WIDTH, bias=False))
    with pytest.raises(ValueError, match=r"^LayerNorm, which is no RMS norm"):
        norm_form(nn.LayerNorm(WIDTH))
