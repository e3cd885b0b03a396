"""Parts of modules: added, or joined, they are the whole module's output."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from longspan.models.cpu_experts import compute_by_expert
from longspan.models.tensor_cuts import cut_columns_, cut_experts_, cut_gate_up_, cut_head_norms_, cut_qkv_, inner_width
from longspan.models.tensor_part import Part, PartPeers

E, HIDDEN, INNER = 4, 12, 18


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Experts(nn.Module):
    """Experts in one of the layouts of Transformers."""

    def __init__(self, is_transposed, is_concatenated, has_bias):
        super().__init__()
        self.is_transposed, self.is_concatenated, self.has_bias = is_transposed, is_concatenated, has_bias
        self.has_gate = True
        turned = (lambda weight: weight.mT.contiguous()) if is_transposed else (lambda weight: weight)
        self.gate_up_proj = nn.Parameter(turned(random(E, 2 * INNER, HIDDEN)), requires_grad=False)
        self.down_proj = nn.Parameter(turned(random(E, HIDDEN, INNER, seed=1)), requires_grad=False)
        if has_bias:
            self.gate_up_proj_bias = nn.Parameter(random(E, 2 * INNER, seed=2), requires_grad=False)
            self.down_proj_bias = nn.Parameter(random(E, HIDDEN, seed=3), requires_grad=False)

    def _apply_gate(self, both):
        gate, up = both.chunk(2, dim=-1) if self.is_concatenated else (both[..., ::2], both[..., 1::2])
        return torch.tanh(gate) * up

    def forward(self, hidden, chosen, scores):
        return compute_by_expert(self, hidden, chosen, scores)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("is_concatenated", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_parts_of_experts_add_up(size, is_transposed, is_concatenated, has_bias):
    layout = (is_transposed, is_concatenated, has_bias)
    hidden, chosen = random(5, HIDDEN), random(5, E).topk(2, dim=-1).indices
    scores = random(5, 2).softmax(-1)
    found = []
    for index in range(size):
        part = Experts(*layout)
        assert inner_width(part) == INNER
        cut_experts_(part, Part(index, size), PartPeers())
        assert inner_width(part) == INNER // size
        found.append(part(hidden, chosen, scores))
    torch.testing.assert_close(sum(found), Experts(*layout)(hidden, chosen, scores))


def test_a_matrix_of_gate_and_up_is_cut_in_both():
    found = []
    for index in range(3):
        gate_up = nn.Linear(HIDDEN, 2 * INNER, bias=False).requires_grad_(False)
        down = nn.Linear(INNER, HIDDEN).requires_grad_(False)
        gate_up.weight.copy_(random(2 * INNER, HIDDEN))
        down.weight.copy_(random(HIDDEN, INNER, seed=1))
        down.bias.copy_(random(HIDDEN, seed=2))
        x = random(2, HIDDEN, seed=4)
        gate, up = gate_up(x).chunk(2, dim=-1)
        wanted = down(gate.sigmoid() * up)
        part = Part(index, 3)
        cut_gate_up_(gate_up, part)
        cut_columns_(down, part.of(INNER), PartPeers())
        gate, up = gate_up(x).chunk(2, dim=-1)
        found.append(down(gate.sigmoid() * up) - random(HIDDEN, seed=2))  # a sum of one part adds the bias
    torch.testing.assert_close(sum(found) + random(HIDDEN, seed=2), wanted)


def test_queries_keys_and_values_of_one_matrix_keep_their_heads():
    whole = nn.Linear(HIDDEN, 8 * 4 + 2 * 2 * 4, bias=False).requires_grad_(False)
    rows = [slice(4 * first, 4 * first + 4) for first in range(12)]  # eight heads of q, two of k, two of v
    for index, (heads, kv_head) in enumerate([((0, 1), 0), ((2, 3), 0), ((4, 5), 1), ((6, 7), 1)]):
        cut = nn.Linear(HIDDEN, whole.out_features, bias=False).requires_grad_(False)
        cut.weight.copy_(whole.weight)
        config = SimpleNamespace(num_attention_heads=8, num_key_value_heads=2)
        attention = SimpleNamespace(num_key_value_heads=2, head_dim=4, config=config)
        cut_qkv_(attention, cut, Part(index, 4))
        wanted = [whole.weight[rows[head]] for head in (*heads, 8 + kv_head, 10 + kv_head)]
        assert torch.equal(cut.weight, torch.cat(wanted))
        assert (attention.config.num_attention_heads, attention.config.num_key_value_heads) == (2, 1)
        assert config.num_attention_heads == 8, "the rest of the model keeps its config"


def test_norms_of_one_head_each_go_with_their_heads():
    norms = nn.ModuleList([nn.LayerNorm(2) for _ in range(4)])
    holder = nn.Module()
    holder.norms = norms
    cut_head_norms_(holder, Part(1, 2))
    assert list(holder.norms) == list(norms)[2:]
