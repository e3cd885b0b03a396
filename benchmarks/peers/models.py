"""The models that engines are compared on: real proportions, random weights, float32.

Holds sizes and how to make them. Must not know engines.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import make_model


@dataclass(frozen=True)
class ModelSize:
    """A model by name."""

    name: str
    max_length: int
    """Longest prompt that ends in reasonable time."""
    single_rank_from: int | None
    """Shortest prompt with which one rank on one thread is measured too; None: never."""


SIZES = {
    "20m": ModelSize("20m", 2**20, 16384),
    "500m": ModelSize("500m", 16384, None),
}


def make(size: ModelSize, directory: Path) -> Path:
    """Write the model's files.

    `20m` is the model of the other benchmarks. `500m` has the shape of the usual 0.5 B models: 24 layers, 14 query and
    2 KV heads of 64, a vocabulary of 151,936 with tied embeddings, 494 M parameters.
    """
    if size.name == "20m":
        return make_model(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=2**20,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).float().save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model on disk and in memory."""

    weights_bytes: int
    kv_bytes_per_token: int
    vocab_size: int


def sizes(model: Path) -> Sizes:
    """From the files: weights as stored, keys and values in float32."""
    c = LlamaConfig.from_pretrained(model)
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 4
    return Sizes(sum(file.stat().st_size for file in model.glob("*.safetensors")), kv, c.vocab_size)
