"""The models that engines are compared on: real proportions, random weights, float32.

Holds sizes and how to make them. Must not know engines.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common import make_model, shape


@dataclass(frozen=True)
class BenchmarkModel:
    """A model by name."""

    name: str
    model_type: str
    fields: Mapping[str, Any]
    """Of its config."""
    max_length: int
    """Longest prompt that ends in reasonable time."""
    single_rank_from: int | None
    """Shortest prompt with which one rank on one thread is measured too; None: never."""
    one_setting_per_peer: bool = False
    """Leave out second settings of a peer: so many copies of the weights would not fit into memory."""

    @property
    def has_gguf(self) -> bool:
        """Whether `drivers/gguf_file.py` writes it for llama.cpp."""
        return self.model_type in ("llama", "qwen3_moe")


_FAMILY = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 256,
    "max_position_embeddings": 2**18,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def _family(name: str, model_type: str, **fields: Any) -> BenchmarkModel:
    """A model of which a token meets about 100 M weights."""
    return BenchmarkModel(name, model_type, {**_FAMILY, **fields}, 32768, 16384, one_setting_per_peer=True)


_500M = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2**20,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""The shape of the usual 0.5 B models: 494 M parameters."""

SIZES = {
    model.name: model
    for model in (
        BenchmarkModel("20m", "llama", {}, 2**20, 16384),
        BenchmarkModel("500m", "llama", _500M, 16384, None),
        _family("dense", "llama", intermediate_size=3072),
        _family(
            "moe",
            "qwen3_moe",
            num_experts=64,
            num_experts_per_tok=8,
            moe_intermediate_size=384,
            intermediate_size=3072,
        ),
        _family(
            "gpt_oss",
            "gpt_oss",
            num_local_experts=32,
            num_experts_per_tok=4,
            intermediate_size=768,
            sliding_window=128,
        ),
        _family(
            "llama4",
            "llama4_text",
            num_local_experts=16,
            num_experts_per_tok=1,
            intermediate_size=1536,
            intermediate_size_mlp=3072,
            attention_chunk_size=4096,
        ),
        _family(
            "latent",
            "deepseek_v2",
            num_key_value_heads=12,
            head_dim=64,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=32,
            n_shared_experts=1,
            num_experts_per_tok=4,
            moe_intermediate_size=384,
            intermediate_size=3072,
            topk_method="greedy",
        ),
    )
}


def make(model: BenchmarkModel, directory: Path) -> Path:
    """Write the files of a model with random weights; `20m` is the model of the other benchmarks."""
    if model.name == "20m":
        return make_model(directory)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model.model_type, **model.fields)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model on disk and in memory."""

    weights_bytes: int
    kv_bytes_per_token: int
    vocab_size: int


def sizes(model: Path) -> Sizes:
    """From the files: weights as stored, keys and values in float32."""
    known = shape(model)
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return Sizes(stored, known.kv_token_bytes, known.spec.vocab_size)
