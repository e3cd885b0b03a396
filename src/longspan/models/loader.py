"""From a model's name to its config, tokenizer and weights.

Holds the calls into Transformers' loaders, and turns their errors into ours. Must not know ranks or plans.
Read next: `longspan.models.inspect`, `longspan.models.recall`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from longspan.errors import ConfigError
from longspan.models.hook import ATTENTION_NAME
from longspan.models.recall import recall_path

RECALL = "recall"
"""Name of the bundled model, everywhere a model is named."""


def quiet_transformers() -> None:
    """Keep Transformers' own remarks from standard error, for processes that are ours (workers, the command line)."""
    transformers_logging.set_verbosity_error()


def resolve_model(model: str) -> str:
    """Directory or Hub id that Transformers can load.

    Raises:
        ConfigError: it looks like a path, and there is no model directory there.
    """
    if model == RECALL:
        return str(recall_path())
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model: got {model!r}, a directory without config.json")
        return str(path)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip():
        raise ConfigError(f"model: got {model!r}, legal is a model directory, 'recall' or a Hub id such as 'org/name'")
    return model


def _loading(model: str, what: str, error: Exception) -> ConfigError:
    """One line that says what could not be loaded."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(f"model: got {model!r}, its {what} cannot be loaded: {reason[:300]}")


def load_config(model: str) -> tuple[PreTrainedConfig, GenerationConfig | None]:
    """Config and generation config.

    Raises:
        ConfigError: there is no such model, or its files are broken.
    """
    name = resolve_model(model)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _loading(model, "config", error) from error
    try:
        return config, GenerationConfig.from_pretrained(name)
    except (OSError, json.JSONDecodeError):
        return config, None


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ConfigError: the model has none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve_model(model))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _loading(model, "tokenizer", error) from error
    return tokenizer


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a name; auto is float32 on a CPU, where bfloat16 matmuls are slower, else bfloat16."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def load_model(model: str, dtype: torch.dtype, *, show_progress: bool) -> nn.Module:
    """Load weights from safetensors, memory-mapped where file and model agree on the dtype.

    Args:
        model: as the user named it.
        dtype: of weights and activations.
        show_progress: whether to draw a bar on standard error.

    Raises:
        ConfigError: the weights are missing or broken; pickled weights are never loaded.
    """
    if show_progress:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()
    try:
        loaded: Any
        info: dict[str, Any]
        loaded, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            resolve_model(model),
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors raises a bare Exception subclass for a truncated file
        raise _loading(model, "weights", error) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ConfigError(
            f"model: got {model!r}, whose weights lack {len(info['missing_keys'])} tensors and have "
            f"{len(info['mismatched_keys'])} of a wrong shape, such as "
            f"{sorted(map(str, [*info['missing_keys'], *info['mismatched_keys']]))[0]}"
        )
    module: nn.Module = loaded
    return module.eval().requires_grad_(False)
