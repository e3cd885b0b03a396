"""Text model of a multimodal repository: its config, and which of the repository's tensors are its weights.

Holds names of fields and tensors. Must not know how weights are read, nor ranks or plans.
Read next: `longspan.models.loader`, which loads text models; `longspan.models.families`, which lists such repositories.

A repository such as `gemma3` holds a text model of a family that also stands alone (`gemma3_text`), and towers for
images or sound that feed it. Without images it computes what its text model computes.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longspan.errors import ConfigError, UnsupportedModelError
from longspan.models.families import TEXT_PARTS, proven_text_parts

KEY_MAPPING: Mapping[str, str] = {
    r"^(model\.)?language_model\.model\.": "model.",
    r"^(model\.)?language_model\.lm_head": "lm_head",
    r"^model\.language_model\.": "model.",
}
"""Names of the text model's tensors in a multimodal repository, as patterns, and in a repository of its own."""

_OTHER_TENSORS = re.compile(
    r"(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|embed_vision|audio_tower|embed_audio)\."
)
"""Names of tensors that belong to images and sound."""

_OUTER_FIELDS = ("tie_word_embeddings", "eos_token_id", "quantization_config")
"""Fields of the whole config that count for the text model too, where they are set."""


def text_overrides(overrides: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Fields that the user gives for the text model inside a config."""
    return (overrides or {}).get("text_config") or {}


def text_part(config: PreTrainedConfig, overrides: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Config of a repository's text model: the config itself if it describes a text model alone.

    Args:
        config: config of the repository, overrides included.
        overrides: fields that the user gave, of which those of the text model count more than the whole config's.

    Raises:
        UnsupportedModelError: the repository is multimodal, and its text model cannot be loaded alone.
        ConfigError: the user gave one field of it two values.
    """
    text = getattr(config, "text_config", None)
    if not isinstance(text, PreTrainedConfig):
        return config
    if config.model_type not in TEXT_PARTS:
        reason = (
            "whose text model has no class of its own in Transformers"
            if text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            else f"a multimodal model, whose text part ({text.model_type}) was never loaded alone"
        )
        raise UnsupportedModelError(
            f"model_type: got {config.model_type!r}, {reason}; proven are the text parts of "
            f"{', '.join(proven_text_parts())}"
        )
    given = text_overrides(overrides)
    for field in _OUTER_FIELDS:
        value = getattr(config, field, None)
        if field in given and field in (overrides or {}):
            raise ConfigError(f"hf_overrides: got {field} inside of text_config and beside it, legal is one of them")
        if value is not None and field not in given:
            setattr(text, field, value)
    if getattr(text, "use_bidirectional_attention", None) == "vision":  # among the rows of an image, of which none come
        text.use_bidirectional_attention = None
    return text


def text_name(name: str) -> str:
    """Name in a repository of its own of a tensor in a multimodal one; other names stay."""
    for pattern, replacement in KEY_MAPPING.items():
        name = re.sub(pattern, replacement, name)
    return name


def text_tensors(names: Iterable[str]) -> list[str]:
    """Leave out the names of tensors that belong to images and sound."""
    return [name for name in names if not _OTHER_TENSORS.match(name)]
