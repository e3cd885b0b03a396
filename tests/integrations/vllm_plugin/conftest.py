"""Tests of the plugin inside vLLM: `make test-vllm` runs them in an environment of their own.

The models are tiny and random, with weights scaled so that a wrong block, position or merge changes tokens.
"""

import importlib.util
import os

import pytest
import torch
from forking import forking
from kinds import IN_TRANSFORMERS, KINDS
from v2 import V2Server

HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]

os.environ.update(
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # more processes than cores
    OMP_NUM_THREADS="1",
)
torch.set_num_threads(1)  # torch is loaded already; a fork of a process whose OpenMP threads have run waits for them

VOCAB_SIZE = 512
SPECIAL_TOKENS = {"bos_token_id": 256, "eos_token_id": 257, "tie_word_embeddings": False}
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    **SPECIAL_TOKENS,
}
"""Fields of all models."""
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MULTIMODAL = {
    "gemma3": (
        {"model_type": "gemma3_text", **KINDS["gemma3_text"]},
        {"vision_config": {**VISION, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 1},
    ),
    "mistral3": ({"model_type": "mistral"}, {"vision_config": {**VISION, "head_dim": 16, "model_type": "pixtral"}}),
}
"""Fields of models of several modalities: of the text part, and beside it."""


def save_model(kind: str, directory, **more) -> str:
    """A random model and a byte tokenizer. Args: `kind` is llama or one like it; `more` of its configuration, or other
    values than these."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**SIZES, **more})
    return _save_random(AutoModelForCausalLM, config, directory)


def save_multimodal(kind: str, directory) -> str:
    """A random model of several modalities whose text part is of the sizes above."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text, other = MULTIMODAL[kind]
    parts = {"text_config": {**SIZES, **text}, "tie_word_embeddings": False, "image_token_index": 511}
    config = AutoConfig.for_model(kind, **parts, **other)
    return _save_random(AutoModelForImageTextToText, config, directory)


def _save_random(loader, config, directory) -> str:
    from longspan.models.recall_tokenizer import build_tokenizer

    torch.manual_seed(3)
    model = loader.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(0, 0.2 if "lm_head" in name else 2.5 * weight.shape[-1] ** -0.5)
                if config.model_type == "gemma2" and "embed_tokens" in name:
                    weight *= 0.05  # they are multiplied, and are the head's too: every token would follow itself
            elif "sinks" in name:
                weight.normal_(0, 2)
            elif "q_norm" in name or "k_norm" in name:
                weight += 1  # attention is sharp, so that tokens depend on what is far away
    model.save_pretrained(directory)
    build_tokenizer(4096).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session", autouse=True)
def forked():
    """Engines start in seconds. See `forking.py`."""
    with forking():
        yield


@pytest.fixture(scope="session")
def v2():
    """An engine server with Triton's interpreter."""
    with V2Server() as server:
        yield server


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Directory of each kind of model."""
    return {kind: save_model(kind, tmp_path_factory.mktemp(kind)) for kind in ("llama", "qwen3")}


@pytest.fixture(scope="session")
def model_of_kind(tmp_path_factory):
    """Function of a kind in `kinds`: its directory, and what Transformers answers to `engines.prompts`."""
    from engines import prompts, reference

    known = {}

    def make(kind):
        if kind not in known:
            model = save_model(kind, tmp_path_factory.mktemp(kind), **KINDS[kind])
            known[kind] = (model, reference(model, prompts(), **IN_TRANSFORMERS.get(kind, {})))
        return known[kind]

    return make
