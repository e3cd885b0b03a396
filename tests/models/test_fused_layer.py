"""Fused decoder layers compute what the model's own layers do, and a layer that is built differently is left alone."""

import pytest
import torch
from tiny_models import FAMILIES, load_reference, tiny_model
from torch import nn

from longspan.models import fused_layer_gemm
from longspan.models.fused_layer import fuse_layers_
from longspan.models.hook import AttentionCall
from longspan.models.same_result import KNOWN_ACTIVATIONS
from longspan.native import kernels, onednn
from longspan.native import layer as native_layer

needs_kernel = pytest.mark.skipif(not kernels.is_available(), reason="no C compiler when longspan was installed")

OWN_LAYERS = ("llama4", "youtu")
"""Families that keep Transformers' layers."""


def attend(call: AttentionCall) -> torch.Tensor:
    """Causal attention of one packed request, by plain operators."""
    group_size = call.q.shape[1] // call.k.shape[0]
    k, v = (tensor.double().repeat_interleave(group_size, dim=0) for tensor in (call.k, call.v))
    scores = call.q.double().transpose(0, 1) @ k.transpose(1, 2) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    hidden = torch.ones(scores.shape[1:]).triu(1).bool()
    return (torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1) @ v).transpose(0, 1).float()


@torch.inference_mode()
def logits(model: nn.Module, num_tokens: int, first: int = 0) -> torch.Tensor:
    tokens = torch.arange(5, 5 + num_tokens)
    output = model(
        input_ids=tokens[None],
        position_ids=torch.arange(first, first + num_tokens)[None],
        use_cache=False,
        longspan_attend=attend,
    )
    return output.logits[0]


@pytest.mark.cover
@needs_kernel
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in OWN_LAYERS])
def test_every_family_is_fused_and_computes_the_same(family, monkeypatch):
    model = tiny_model(family).load()
    monkeypatch.setattr(fused_layer_gemm, "BLOCK_ROWS", 16)
    most = kernels.MAX_LINEAR_ROWS
    few, many = (1, 2, 3, kernels.MAX_ROWS, kernels.MAX_ROWS + 1, 50, most), (most + 1, 144, 161)
    sizes = (*few, *many)
    wanted = [logits(model, size, first=1000) for size in sizes]
    assert fuse_layers_(model) == len(model.model.layers)
    rows = {"few": [], "many": []}

    def count(owner, part, name):
        own = getattr(owner, part)
        monkeypatch.setattr(owner, part, lambda fused, a, x: rows[name].append(len(x)) or own(fused, a, x))

    for part in ("behind_attention", "project_attention"):  # of dense layers, of mixtures
        count(native_layer.FusedLayer, part, "few")
        count(fused_layer_gemm, part, "many")
    for size, own in zip(sizes, wanted, strict=True):
        found = logits(model, size, first=1000)
        torch.testing.assert_close(found, own, rtol=0, atol=1e-4 * own.abs().max().item())
    num_layers = len(model.model.layers)
    assert rows == {
        name: [size for size in those for _ in range(num_layers)] for name, those in (("few", few), ("many", many))
    }, "who computed the rows?"


class _ReLU(nn.Module):
    def forward(self, x):
        return torch.relu(x)


class _LayerNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)) * self.weight


def _other_activation(layer):
    layer.mlp.act_fn = _ReLU()


def _other_norm(layer):
    layer.input_layernorm = _LayerNorm(layer.input_layernorm)


def _other_epsilon(layer):
    layer.input_layernorm.variance_epsilon = 0.1


def _extra_part(layer):
    layer.extra = nn.Linear(4, 4)


def _extra_part_in_attention(layer):
    layer.self_attn.gate = nn.Linear(4, 4)


def _mlp_bias(layer):
    layer.mlp.down_proj.bias = nn.Parameter(torch.ones(64), requires_grad=False)


def _residual_scale(layer):
    own = layer.mlp.forward
    layer.mlp.forward = lambda x: own(x) * 0.9


def _factor_of_far_positions(layer):
    own = layer.self_attn.forward

    def forward(hidden_states, position_embeddings, *args, position_ids, **kwargs):
        cos, sin = position_embeddings
        factor = 1 + 0.1 * torch.log(1 + torch.floor(position_ids / 16384))[..., None]
        return own(hidden_states, (cos * factor, sin * factor), *args, position_ids=position_ids, **kwargs)

    layer.self_attn.forward = forward


def _no_rope(layer):
    layer.self_attn.use_rope = False  # says so, and rotates all the same


def _half_precision(layer):
    layer.self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight.data.half()


def _strided_weight(layer):
    weight = layer.mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()


@needs_kernel
@pytest.mark.parametrize(
    "change",
    [
        _other_activation,
        _other_norm,
        _other_epsilon,
        _extra_part,
        _extra_part_in_attention,
        _mlp_bias,
        _residual_scale,
        _factor_of_far_positions,
        _no_rope,
        _half_precision,
        _strided_weight,
    ],
)
def test_a_layer_that_is_built_differently_keeps_its_forward(change):
    model = tiny_model("llama").load()
    change(model.model.layers[1])
    assert not fuse_layers_(model)
    assert not any("forward" in layer.__dict__ for layer in model.model.layers), "all layers or none"


def test_without_kernels_nothing_is_fused(monkeypatch):
    model = tiny_model("llama").load()
    monkeypatch.setattr(native_layer, "library", lambda: None)
    assert not fuse_layers_(model)


def test_a_model_without_such_layers_is_left_alone():
    assert not fuse_layers_(nn.Sequential(nn.Linear(4, 4)))


@needs_kernel
def test_two_threads_compute_what_one_does():
    model = tiny_model("gemma2").load()
    assert fuse_layers_(model)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, many_alone = (logits(model, 3), logits(model, 30)), logits(model, 150)
        torch.set_num_threads(3)
        shared, many_shared = (logits(model, 3), logits(model, 30)), logits(model, 150)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(shared, alone, rtol=0, atol=0)
    # Products of many rows are a library's, which may sum in another order.
    torch.testing.assert_close(many_shared, many_alone, rtol=0, atol=1e-5 * many_alone.abs().max().item())


@needs_kernel
def test_the_reference_agrees():
    model, reference = tiny_model("qwen2").load(), load_reference(tiny_model("qwen2").path)
    assert fuse_layers_(model)
    for num_tokens in (6, 60, 150):
        tokens = torch.arange(5, 5 + num_tokens)[None]
        with torch.inference_mode():
            torch.testing.assert_close(logits(model, num_tokens), reference(tokens).logits[0], rtol=0, atol=1e-4)


@needs_kernel
def test_many_rows_without_onednn(monkeypatch):
    model = tiny_model("qwen2").load()
    wanted = logits(model, 150)
    assert fuse_layers_(model)
    monkeypatch.setattr(onednn, "is_available", lambda: False)
    torch.testing.assert_close(logits(model, 150), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


@needs_kernel
@pytest.mark.parametrize("size", [-90.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 90.0])
@pytest.mark.parametrize(("name", "activation"), KNOWN_ACTIVATIONS.items())
def test_activations_neither_overflow_nor_lose_their_small_values(name, activation, size):
    hidden, inner, width = 16, 32, 16
    eye = torch.eye(hidden)
    weights = native_layer.LayerWeights(
        before_attention=torch.ones(hidden),
        q=eye,
        k=eye,
        v=eye,
        q_bias=None,
        k_bias=None,
        v_bias=None,
        q_norm=None,
        k_norm=None,
        o=torch.zeros(hidden, hidden),
        o_bias=None,
        behind_attention=None,
        before_mlp=torch.ones(hidden),
        gate=torch.full((inner, hidden), size / hidden),
        up=torch.full((inner, hidden), 1 / hidden),
        down=torch.eye(inner)[:hidden].contiguous(),
        behind_mlp=None,
    )
    layer = native_layer.FusedLayer(
        weights, width=width, has_rope=False, activation=name, epsilon=0.0, head_epsilon=0.0
    )
    x = torch.ones(1, hidden)
    wanted = activation(torch.tensor(size, dtype=torch.float64)).item()
    found = layer.behind_attention(torch.zeros(1, 1, width), x) - x
    assert found.isfinite().all()
    torch.testing.assert_close(found, torch.full_like(found, wanted), rtol=2e-6, atol=2e-7)
