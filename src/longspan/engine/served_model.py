"""Facts of the model that an engine serves: those of its files, with what options and tokenizer add.

Holds refusals of options that the model has no use for, and what a user is told of it at the start. Must not know
weights, ranks or requests.
Read next: `longspan.models.inspect`, the facts of the files; `longspan.engine.engine`, which asks.
"""

import sys
from collections.abc import Sequence

from msgspec import structs

from longspan.config import EngineConfig
from longspan.errors import ConfigError
from longspan.kv.layout import stored_as
from longspan.models.names import is_gguf
from longspan.types import ModelSpec


def complete(spec: ModelSpec, config: EngineConfig, end_token_ids: Sequence[int]) -> ModelSpec:
    """Return a model's facts with what options and tokenizer add, and say on standard error what a user should know.

    Args:
        spec: facts that follow from the model's files.
        config: of the engine; its device is chosen.
        end_token_ids: tokens that end a request beside those of the model's configs.

    Raises:
        ConfigError: an option is for models of another kind.
    """
    _check_state_options(spec, config)
    groups = [structs.replace(g, float32_partials=config.partial_dtype == "float32") for g in spec.kv_groups]
    ends = {*spec.eos_token_ids, *end_token_ids}
    ends = {token_id for token_id in ends if token_id < spec.vocab_size}  # others can never come
    if is_gguf(config.model):
        memory_gb, dtype = spec.weight_bytes / 1e9, spec.kv_groups[0].spec.compute_dtype
        print(f"longspan: {config.model}: dequantised weights take {memory_gb:.2f} GB of {dtype}", file=sys.stderr)
    if config.speculation is not None and config.draft_model is None and spec.state_groups:
        print(
            "longspan: speculative_config: no drafts for a model with recurrent layers, whose state cannot be taken "
            "back behind a wrong one",
            file=sys.stderr,
        )
    if not ends:
        print("longspan: the model names no end token: answers end by max_tokens or a stop text", file=sys.stderr)
    if spec.state_groups and config.device == "cuda" and config.cuda_graphs != "never":
        print(
            "longspan: the model has recurrent layers: decode steps are launched without CUDA graphs", file=sys.stderr
        )
    stored = stored_as(groups, config.kv_cache_dtype)
    return structs.replace(spec, kv_groups=stored, eos_token_ids=tuple(sorted(ends)))


def _check_state_options(spec: ModelSpec, config: EngineConfig) -> None:
    """Refuse options of recurrent layers that the model has no use for."""
    for name in ("state_snapshot_tokens", "state_parts"):
        if getattr(config, name) is not None and not spec.state_groups:
            raise ConfigError(
                f"{name}: got {getattr(config, name)} for a model without recurrent layers, legal is none"
            )
    most = max((group.num_heads for group in spec.state_groups), default=1)
    if (config.state_parts or 1) > most:
        heads = f"{most}, the heads of its states" if most > 1 else "1: states of this model go whole"
        raise ConfigError(f"state_parts: got {config.state_parts}, legal is at most {heads}")
