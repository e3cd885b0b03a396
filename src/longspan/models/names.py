"""Names of models as users write them, and what can be said of one before anything large is imported.

Holds the rule for names, and a look at a directory's config. Must not import torch or Transformers, which take seconds:
a mistyped path is refused at once.
Read next: `longspan.models.loader`, which loads what a name means; `longspan.models.families`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.errors import ConfigError
from longspan.models.families import PROVEN_FAMILIES, TEXT_PARTS, check_family

GGUF_SUFFIX = ".gguf"

OWN_NAMES = ("recall", "smollm2")
"""Models that have a name here, wherever a user names a model."""

LEGAL_MODELS = f"a model directory, a {GGUF_SUFFIX} file, {', '.join(map(repr, OWN_NAMES))} or a Hub id"
"""What a user may name, in words."""


def is_gguf(model: str) -> bool:
    """Whether a model, as the user named it, is a GGUF file."""
    path = Path(model).expanduser()
    return path.suffix == GGUF_SUFFIX and path.is_file()


def local_directory(model: str) -> Path | None:
    """Return the directory that a user named; None where the name is one of ours, a GGUF file or a Hub id.

    Raises:
        ConfigError: the name looks like a path, and there is no model there.
    """
    path = Path(model).expanduser()
    if model in OWN_NAMES or is_gguf(model):
        return None
    if path.is_dir() and (path / "config.json").is_file() and model:
        return path
    is_path = path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1 or path.suffix == GGUF_SUFFIX
    if is_path or not model.strip():
        raise ConfigError(
            f"model: got {model!r}, legal is {LEGAL_MODELS} such as 'org/name'"
            + "; this directory has no config.json" * (path.is_dir() and bool(model))
        )
    return None


def check_early(model: str, overrides: Mapping[str, Any] | None) -> None:
    """Refuse a path without a model, and a directory whose config says that it is of a family that is not proven.

    What this lets through may still be refused when the config is loaded.

    Args:
        model: model as the user named it.
        overrides: fields of the config that the user gives in place of the file's.

    Raises:
        ConfigError: there is no model at the path.
        UnsupportedModelError: the family is not proven.
    """
    path = local_directory(model)
    if path is None:
        return
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # the loader says what is wrong with it
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or "model_type" in (overrides or {}) or "text_config" in config:
        return  # a multimodal repository: what counts is its text part
    if kind not in TEXT_PARTS and kind not in PROVEN_FAMILIES:
        check_family(kind)


def check_draft_early(draft: str | None) -> None:
    """Refuse of a draft model what `check_early` refuses of a model.

    Args:
        draft: model that makes drafts, as the user named it; None for none.

    Raises:
        ConfigError: there is no model at the path, or one of a family that is not proven.
    """
    if draft is None:
        return
    try:
        check_early(draft, None)
    except ConfigError as error:
        raise draft_refusal(draft, error) from error


def draft_refusal(draft: str, error: ConfigError) -> ConfigError:
    """The error of a draft model that cannot be loaded."""
    return ConfigError(
        f"speculative_config: got the draft model {draft!r}, legal is one that can be loaded and has the model's "
        f"tokenizer: {error}"
    )
