"""What a GGUF file says of its model, and what of it is not proven.

Holds the proven architectures, and the rule that nothing that a file says of its architecture may get lost:
Transformers reads some of the keys and passes over the others. Must not know files, parts or tokenizers.
Read next: `longspan.models.gguf_files`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from longspan.errors import UnsupportedModelError
from longspan.models.families import check_family

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

ARCHITECTURE = "general.architecture"

PROVEN_ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
}
"""Per architecture the `model_type` that it becomes. Tests compare converted files with what they were made of."""

_FIELDS: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Field of the config per key below the architecture's name."""

_HEAD_DIM = ("attention.key_length", "attention.value_length", "rope.dimension_count")
"""Keys that must be the width of a head in these architectures."""

_NEUTRAL: Mapping[str, object] = {
    "rope.scaling.type": "none",
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_shared_feed_forward_length": 0,
}
"""Values that ask for nothing."""

_ROPE_FACTORS = "rope_freqs.weight"
"""Tensor with one divisor per RoPE frequency, which Transformers passes over."""

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Constants of all Llama 3.1, 3.2 and 3.3 models; their factors differ."""


class Metadata:
    """Metadata of one GGUF file."""

    def __init__(self, reader: "GGUFReader") -> None:
        """Take in a file that was opened.

        Raises:
            UnsupportedModelError: it names no architecture.
        """
        self._reader = reader
        name = self.get(ARCHITECTURE)
        if not isinstance(name, str):
            raise UnsupportedModelError(f"{ARCHITECTURE}: got {name!r}, proven is {', '.join(PROVEN_ARCHITECTURES)}")
        self.architecture = name

    def get(self, key: str, default: Any = None) -> Any:
        """Return a key's value."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def weights(self) -> "Iterator[ReaderTensor]":
        """Yield the tensors that are weights of the model."""
        return (tensor for tensor in self._reader.tensors if tensor.name != _ROPE_FACTORS)

    def check_architecture(self) -> None:
        """Refuse an architecture that is not proven.

        Raises:
            UnsupportedModelError: names it.
        """
        if self.architecture not in PROVEN_ARCHITECTURES:
            raise UnsupportedModelError(
                f"{ARCHITECTURE}: got {self.architecture!r}, proven in GGUF files is {', '.join(PROVEN_ARCHITECTURES)}"
            )

    def check_types(self) -> None:
        """Refuse a quantisation that cannot be read, before anything is read.

        Raises:
            UnsupportedModelError: names it.
        """
        from gguf import dequantize

        for kind, tensor in {tensor.tensor_type: tensor for tensor in self._reader.tensors}.items():
            try:
                dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
            except NotImplementedError:
                raise UnsupportedModelError(
                    f"quantisation: got {kind.name} in {tensor.name}, legal is what the package gguf dequantises"
                ) from None

    def complete(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return the config that Transformers made of the file, with everything that the file says.

        Raises:
            UnsupportedModelError: the file says something that the config has no place for, or no value that is proven.
        """
        check_family(config.model_type)
        if config.model_type != PROVEN_ARCHITECTURES[self.architecture]:  # Transformers looks at the file's name, too
            raise UnsupportedModelError(
                f"general.name: got {self.get('general.name')!r}, for which Transformers makes {self.architecture} a "
                f"{config.model_type}; proven is {PROVEN_ARCHITECTURES[self.architecture]}"
            )
        known: Any = config
        prefix = f"{self.architecture}."
        told = {key.removeprefix(prefix): self.get(key) for key in self._reader.fields if key.startswith(prefix)}
        for key, value in told.items():
            field = _FIELDS.get(key)
            if key in _NEUTRAL and _NEUTRAL[key] == value:
                continue
            if key == "rope.freq_base":
                known.rope_parameters = {**known.rope_parameters, "rope_theta": float(value)}
            elif field is not None and hasattr(known, field):
                setattr(known, field, value)
            elif key not in _HEAD_DIM:
                raise UnsupportedModelError(f"{prefix}{key}: got {value!r}, proven is a GGUF file without it")
        head_dim = getattr(known, "head_dim", None) or known.hidden_size // known.num_attention_heads
        for key in _HEAD_DIM:
            if told.get(key, head_dim) != head_dim:
                raise UnsupportedModelError(f"{prefix}{key}: got {told[key]!r}, proven is {head_dim}, a head's width")
        self._take_rope_factors(known, head_dim)
        known.bos_token_id = self.get("tokenizer.ggml.bos_token_id")
        known.pad_token_id = self.get("tokenizer.ggml.padding_token_id")
        known.eos_token_id = self._end_ids()
        return config

    def _end_ids(self) -> list[int] | None:
        """Tokens that end a text, a turn or a message."""
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        found = {self.get(f"tokenizer.ggml.{key}") for key in keys} - {None}
        return sorted(int(token_id) for token_id in found) or None

    def _take_rope_factors(self, config: Any, head_dim: int) -> None:
        """Turn divisors of RoPE's frequencies into the RoPE type that they came from, if it is Llama 3's."""
        tensor = next((tensor for tensor in self._reader.tensors if tensor.name == _ROPE_FACTORS), None)
        if tensor is None:
            return
        given = [float(value) for value in tensor.data.flatten()]
        theta = float(config.rope_parameters["rope_theta"])
        factor = max(given)
        expected = llama3_factors(head_dim, theta, factor)
        close = (math.isclose(a, b, rel_tol=1e-5) for a, b in zip(given, expected, strict=False))
        if len(given) != len(expected) or not all(close):
            raise UnsupportedModelError(f"{_ROPE_FACTORS}: got other factors than those of Llama 3, the proven ones")
        config.rope_parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3_ROPE}


def llama3_factors(head_dim: int, theta: float, factor: float) -> list[float]:
    """Divisors of RoPE's frequencies in Llama 3: 1 for short waves, `factor` for long ones, smooth between."""
    low, high, length = (LLAMA3_ROPE[key] for key in LLAMA3_ROPE)
    factors: list[float] = []
    for i in range(0, head_dim, 2):
        wave_len = 2 * math.pi * theta ** (i / head_dim)
        smooth = min(1.0, max(0.0, (length / wave_len - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
