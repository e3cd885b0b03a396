"""Other models and number formats than a float32 Llama, on two ranks."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from engines import engine, generate, prompts, random_prompts, reference, tokens_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import save_model, save_multimodal

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTISED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
        }
    },
}
"""8-bit weights per output channel, activations per token."""


def quantise(directory):
    """Rewrite a model's files with `QUANTISED`. Returns what its weights are now, as float32."""
    file, config = Path(directory) / "model.safetensors", Path(directory) / "config.json"
    stored, meant = {}, {}
    for name, weight in load_file(file).items():
        stored[name] = meant[name] = weight
        if name.endswith("_proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            stored[name], stored[f"{name}_scale"] = (weight / scale).round().to(torch.int8), scale
            meant[name] = stored[name] * scale
    save_file(stored, file, {"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": QUANTISED}))
    return meant


def test_a_model_of_transformers(models):
    with engine(models["llama"], 2, model_impl="transformers") as llm:
        assert tokens_of(generate(llm, prompts())) == reference(models["llama"], prompts())


TORCHVISION = ("", ".io", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional")


@pytest.fixture
def importable_torchvision(monkeypatch):
    """What vLLM's files of multimodal models import, and text does not need: it is removed where vLLM is for CPUs."""
    for name in (f"torchvision{part}" for part in TORCHVISION):
        module = MagicMock(__spec__=ModuleSpec(name, None), __path__=[], __version__="0.0")
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_the_text_part_of_a_model_of_several_modalities(tmp_path, importable_torchvision, kind):
    model = save_multimodal(kind, tmp_path)
    expected = reference(model, prompts(), loader="AutoModelForImageTextToText")
    with engine(model, 2, {"placement": "striped"}, language_model_only=True) as llm:
        assert tokens_of(generate(llm, prompts())) == expected


def logprobs_of_prompts(output):
    """[n - 1] of a request's own prompt tokens."""
    own = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return torch.tensor([scores[token_id].logprob for token_id, scores in own])


@pytest.mark.parametrize("what", ["bfloat16", "quantised"])
def test_rounding_costs_no_more_than_in_stock_vllm(tmp_path, what):
    """Beside a model of the same weights in float32. One wrong token in a prompt costs five times as much or more."""
    model = save_model("llama", tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if what == "quantised":
        exact.load_state_dict(quantise(tmp_path))
    else:
        exact = exact.bfloat16().float()
    asked, errors = random_prompts((97, 900, 1500), seed=7), []
    for cp_size in (2, None):
        with engine(model, cp_size, dtype="bfloat16" if what == "bfloat16" else "float32") as llm:
            answers = generate(llm, asked, max_tokens=2, prompt_logprobs=0)
        for prompt, answer in zip(asked, answers, strict=True):
            with torch.no_grad():
                expected = exact(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
            expected = expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
            errors.append((logprobs_of_prompts(answer) - expected).abs().mean().item())
    for ours, stock in zip(errors[:3], errors[3:], strict=True):
        assert 0 < ours < 1.2 * stock
