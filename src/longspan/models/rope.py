"""RoPE that a config asks for: which types are proven, what the built model applies of it, and the lengths it admits.

Holds facts of configs. Must not know tensors, rows or requests.
Read next: `longspan.models.row_rope`, for types whose frequencies depend on a request's length.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from longspan.errors import UnsupportedModelError
from longspan.types import RopeLengths

BY_LENGTH = ("dynamic", "longrope")
"""RoPE types whose frequencies depend on the length of a request."""

PROVEN_ROPE_TYPES = ("default", *BY_LENGTH, "linear", "llama3", "proportional", "yarn")

RECOMPUTED = ("phi3", "phi4_multimodal", "phimoe")
"""Families that Transformers computes again from the start when generation crosses the original length."""


def rope_types(config: PreTrainedConfig) -> set[str]:
    """Return all RoPE types that a config names, those per layer type included."""
    found: set[str] = set()

    def walk(value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key in ("rope_type", "type") and isinstance(inner, str):
                    found.add(inner)
                else:
                    walk(inner)

    walk(getattr(config, "rope_parameters", None))
    walk(getattr(config, "rope_scaling", None))
    return found


def check_rope(config: PreTrainedConfig) -> None:
    """Refuse RoPE that is not proven.

    Raises:
        UnsupportedModelError: names the type and the proven ones.
    """
    for rope_type in sorted(rope_types(config)):
        if rope_type not in PROVEN_ROPE_TYPES:
            raise UnsupportedModelError(f"rope_type: got {rope_type!r}, proven is {', '.join(PROVEN_ROPE_TYPES)}")
        if rope_type in BY_LENGTH and _flat(config) is None:
            raise UnsupportedModelError(
                f"rope_type: got {rope_type!r} in some layers, proven is one type for all layers"
            )


def check_applied(config: PreTrainedConfig, model: nn.Module) -> None:
    """Refuse a model that Transformers builds without the RoPE that its config names.

    Raises:
        UnsupportedModelError: names the type that nothing applies.
    """
    applied: set[str] = set()
    for module in model.modules():
        found = getattr(module, "rope_type", None)
        applied |= {found} if isinstance(found, str) else set(found.values()) if isinstance(found, dict) else set()
    for rope_type in sorted(rope_types(config) - applied - {"default"}):
        raise UnsupportedModelError(
            f"rope_type: got {rope_type!r}, which Transformers does not apply to {config.model_type} as this config "
            f"names it; its layers get {', '.join(sorted(applied)) or 'none'}"
        )


def longest_request(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest request that a config admits, or None if it does not say.

    Where RoPE stretches positions, `max_position_embeddings` may be the length before: requests may be `factor` times
    as long as the original length, as vLLM has it.
    """
    longest: int | None = getattr(config, "max_position_embeddings", None)
    rope = _flat(config)
    if longest is None or rope is None:
        return longest
    if rope["rope_type"] not in ("linear", "dynamic", "yarn"):
        return longest
    original = longest if rope["rope_type"] != "yarn" else rope.get("original_max_position_embeddings") or longest
    return max(longest, int(original * (rope.get("factor") or 1.0)))


def rope_lengths(config: PreTrainedConfig) -> RopeLengths | None:
    """How RoPE's frequencies depend on the length of a request; None where they are constant."""
    rope = _flat(config)
    if rope is None or rope["rope_type"] not in BY_LENGTH:
        return None
    if rope["rope_type"] == "dynamic":
        return RopeLengths(config.max_position_embeddings, is_each_different=True, is_recomputed=False)
    return RopeLengths(
        rope["original_max_position_embeddings"],
        is_each_different=False,
        is_recomputed=config.model_type in RECOMPUTED,
    )


def _flat(config: PreTrainedConfig) -> Mapping[str, Any] | None:
    """RoPE of all layers; None where layers differ in it, or there is none."""
    rope = getattr(config, "rope_parameters", None)
    return rope if isinstance(rope, dict) and isinstance(rope.get("rope_type"), str) else None
