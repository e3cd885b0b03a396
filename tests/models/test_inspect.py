"""Proves that a model whose attention breaks the one proven rule is refused, however Transformers says so."""

import pytest
import torch
from proven_models import make_config
from transformers import AttentionInterface, AttentionMaskInterface, MistralConfig

from longspan.errors import UnsupportedModelError
from longspan.models import hook, inspect

CONFIG = MistralConfig(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=50,
    sliding_window=8,
    bos_token_id=None,
    eos_token_id=None,
)


def test_the_window_is_read_off_the_attention_calls():
    spec = inspect.inspect_model(CONFIG, None, torch.float32)
    (group,) = spec.kv_groups
    assert (group.layers, group.spec.window, group.num_query_heads) == ((0, 1), 8, 2)
    assert [params.window for params in spec.layer_params] == [8, 8]


def test_rejects_a_model_whose_mask_nobody_saw():
    registered = AttentionMaskInterface()[hook.ATTENTION_NAME]
    AttentionMaskInterface.register(hook.ATTENTION_NAME, lambda **_: None)
    try:
        with pytest.raises(UnsupportedModelError, match="attention mask of layer 0: got NoneType"):
            inspect.inspect_model(CONFIG, None, torch.float32)
    finally:
        AttentionMaskInterface.register(hook.ATTENTION_NAME, registered)


@pytest.mark.parametrize(("window", "rule"), [(7, "window 7"), (9, "window 9"), (None, "chunks of 8")])
def test_rejects_a_mask_that_is_not_the_window_that_the_layer_was_given(monkeypatch, window, rule):
    honest = hook.AttentionCall

    def other_window(**fields):
        return honest(**{**fields, "window": window})

    monkeypatch.setattr(hook, "AttentionCall", other_window)
    with pytest.raises(UnsupportedModelError, match=f"causal, {rule}'"):
        inspect.inspect_model(CONFIG, None, torch.float32)


def test_rejects_attention_that_sees_the_future(monkeypatch):
    honest = hook.AttentionCall
    monkeypatch.setattr(hook, "AttentionCall", lambda **fields: honest(**{**fields, "is_causal": False}))
    with pytest.raises(UnsupportedModelError, match="is_causal: got False"):
        inspect.inspect_model(CONFIG, None, torch.float32)


@pytest.mark.parametrize("size", [-1, -28, 0])
def test_rejects_chunks_without_tokens(size):
    config = make_config("llama4_text")
    config.attention_chunk_size = size
    with pytest.raises(UnsupportedModelError, match=f"attention_chunk_size: got {size}, legal is an integer from 1"):
        inspect.inspect_model(config, None, torch.float32)


@pytest.mark.parametrize("family", ["llama4_text", "qwen3_moe"])
def test_rejects_experts_that_no_token_meets(family):
    config = make_config(family)
    config.num_experts_per_tok = 0
    with pytest.raises(UnsupportedModelError, match="experts per token: got 0 of "):
        inspect.inspect_model(config, None, torch.float32)


def test_an_is_causal_argument_wins_over_the_modules_attribute():
    class Module(torch.nn.Module):
        layer_idx, is_causal = 0, True

    seen = []

    def attend(call):
        seen.append(call.is_causal)
        return call.q

    q = torch.zeros(1, 2, 3, 4)
    for argument in (None, True, False):
        AttentionInterface()[hook.ATTENTION_NAME](Module(), q, q, q, None, longspan_attend=attend, is_causal=argument)
    assert seen == [True, True, False]
