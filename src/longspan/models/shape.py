"""Shape of a model for the planner, from its config alone, without weights.

Holds the refusal of models for which the planner's numbers would be wrong. Must not know clusters or costs.
Read next: `longspan.costmodel.model_time`; `longspan.models.inspect`, which reads the facts off a model on the meta
device.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from msgspec import structs
from transformers import PreTrainedConfig

from longspan.costmodel.shapes import ModelShape, PlannedDType
from longspan.errors import ConfigError, UnsupportedModelError
from longspan.kv.layout import stored_as
from longspan.models.inspect import check_proven, trace_model
from longspan.models.loader import load_config, load_config_file
from longspan.models.names import is_gguf
from longspan.types import ExpertWeights

_WRONG_FIELDS = {
    "index_topk": "sparse attention reads an index, and not all keys",
    "num_kv_shared_layers": "layers that share keys and values take less memory",
}
"""Config fields that, where they are set, mean that dense arithmetic does not hold."""


def load_shape(
    model: str, dtype: PlannedDType, overrides: Mapping[str, Any] | None = None, kv_cache_dtype: str = "auto"
) -> ModelShape:
    """Read a model's shape.

    Args:
        model: a directory, a `.gguf` file, a config file, `recall`, `smollm2` or a Hub id.
        dtype: dtype of weights.
        overrides: fields of the config that the user gives in place of the file's.
        kv_cache_dtype: how keys and values are stored, as the engine's option says it.

    Raises:
        ConfigError: there is no such model, or dense arithmetic does not hold for it.
    """
    path = Path(model).expanduser()
    is_config = path.is_file() and not is_gguf(model)
    config = load_config_file(path, overrides) if is_config else load_config(model, overrides)[0]
    shape = model_shape(config, dtype)
    stored = stored_as(shape.spec.kv_groups, kv_cache_dtype)
    return structs.replace(shape, spec=structs.replace(shape.spec, kv_groups=stored))


def model_shape(config: PreTrainedConfig, dtype: PlannedDType) -> ModelShape:
    """Return the shape of the model that a config describes.

    Raises:
        UnsupportedModelError: the planner's numbers would be wrong for the model.
    """
    for field, reason in _WRONG_FIELDS.items():
        value = getattr(config, field, None)
        if value is not None and value not in (0, 1, False):
            shown = value if isinstance(value, (int, float)) else "a value"
            raise UnsupportedModelError(f"{field}: got {shown}, plannable is a model without it: {reason}")
    not_run = None
    try:
        check_proven(config)
    except UnsupportedModelError as error:
        not_run = str(error)
    try:
        spec, model = trace_model(config, None, getattr(torch, dtype))
    except ConfigError as error:
        raise UnsupportedModelError(f"this model cannot be planned: {error}") from error
    except Exception as error:
        if not_run is None:
            raise
        # Untested families fail in their own ways.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnsupportedModelError(
            f"model_type: got {config.model_type!r}, plannable is a decoder that Transformers builds and that "
            f"calls attention once per layer: {reason}"
        ) from error
    rank = getattr(config, "kv_lora_rank", None)
    if rank and any(group.spec.latent is None for group in spec.kv_groups):
        raise UnsupportedModelError(
            f"kv_lora_rank: got {rank}, plannable is a model without it, or one whose layers hand over their latents: "
            "those of this one cache something else than keys and values"
        )
    network: Any = model
    logits = network.get_output_embeddings()
    hidden_size = int(config.hidden_size)
    return ModelShape(
        spec=spec,
        dtype=dtype,
        hidden_size=hidden_size,
        intermediate_size=_intermediate_size(config, spec.experts),
        num_weights=sum(weight.numel() for weight in network.parameters()),
        num_logit_weights=hidden_size * spec.vocab_size if logits is None else logits.weight.numel(),
        not_run=not_run,
    )


def _intermediate_size(config: PreTrainedConfig, experts: ExpertWeights | None) -> float:
    """Width of the feed-forward part that a token meets; four times the model's width where the config says none."""
    value = getattr(config, "intermediate_size", None)
    if experts is not None:
        return float(experts.num_chosen * (getattr(config, "moe_intermediate_size", None) or value or 0))
    if isinstance(value, (list, tuple)):
        return sum(value) / len(value)
    return float(value) if value else 4.0 * config.hidden_size
