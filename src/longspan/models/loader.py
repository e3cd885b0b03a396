"""Loaders of a model's config, tokenizer and weights, by its name.

Holds the calls of Transformers' loaders, and turns their errors into ours. Must not know ranks or plans.
Read next: `longspan.models.inspect`, `longspan.models.recall`; `longspan.models.speedups`, applied after loading.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
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
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from longspan.config import QuantizationName
from longspan.errors import ConfigError
from longspan.models.adaptations import adapt_
from longspan.models.checkpoint import find_checkpoint
from longspan.models.hook import ATTENTION_NAME
from longspan.models.leftovers import leftovers
from longspan.models.lora import ADAPTER_CONFIG, merge_lora
from longspan.models.packed_linear import Bits, linear_names, replace_, round_linears_
from longspan.models.quantization import QuantizedCheckpoint, check_quantization, dense_config, quantization_of
from longspan.models.recall import recall_path
from longspan.native.packed import PackedMatrix

CPU = torch.device("cpu")

ROUNDED_BITS: Mapping[str, Bits] = {"int8": 8, "int4": 4}
"""Bits to which linear layers are rounded, by the option `quantization`."""

RECALL = "recall"
"""Name of the bundled model wherever a user names a model."""


def quiet_transformers() -> None:
    """Keep Transformers' own messages off standard error, in our own processes (workers, the command line)."""
    transformers_logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()


def resolve_model(model: str) -> str:
    """Return the directory or Hub id that Transformers can load.

    Raises:
        ConfigError: the name looks like a path, and there is no model directory there.
    """
    if model == RECALL:
        return str(recall_path())
    path = Path(model).expanduser()
    if path.is_dir() and (path / "config.json").is_file() and model:
        return str(path)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip():
        raise ConfigError(
            f"model: got {model!r}, legal is a model directory, 'recall' or a Hub id such as 'org/name'"
            + "; this directory has no config.json" * (path.is_dir() and bool(model))
        )
    return model


@functools.cache
def _hub_answers() -> bool:
    """Whether the Hub can be reached, tried once per process: Transformers would try six times for every file."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:  # any error of the HTTP library; cached files can still be used
        return False
    return True


def _source(model: str) -> tuple[str, bool]:
    """Return the directory or Hub id, and whether `from_pretrained` must not ask the Hub."""
    name = resolve_model(model)
    return name, Path(name).is_dir() or not _hub_answers()


def _loading(model: str, what: str, error: Exception) -> ConfigError:
    """Make an error of one line that says what could not be loaded."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(
        f"model: got {model!r}, legal is a model directory, 'recall' or a Hub id that can be reached or is in the "
        f"cache; its {what} cannot be loaded: {reason[:300]}"
    )


def load_config(model: str) -> tuple[PreTrainedConfig, GenerationConfig | None]:
    """Load a model's config and generation config.

    Raises:
        ConfigError: there is no such model, or its files are broken.
    """
    name, is_offline = _source(model)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, local_files_only=is_offline)
    except Exception as error:  # Hugging Face's own errors for a field of a wrong type derive from Exception alone
        raise _loading(model, "config", error) from error
    if Path(name).is_dir() and not (Path(name) / GENERATION_CONFIG_NAME).is_file():
        return config, None
    try:
        return config, GenerationConfig.from_pretrained(name, local_files_only=is_offline)
    except OSError as error:
        if Path(name).is_dir():  # it is there, and broken
            raise _loading(model, "generation config", error) from error
        return config, None  # the Hub has none, or cannot be asked
    except Exception as error:  # as above: it was found, and is broken
        raise _loading(model, "generation config", error) from error


def load_config_file(path: Path) -> PreTrainedConfig:
    """Load a config from a JSON file of any name.

    Raises:
        ConfigError: the file is broken.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # as in `load_config`
        raise _loading(str(path), "config", error) from error
    return config


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Raises:
        ConfigError: the model has no tokenizer.
    """
    name, is_offline = _source(model)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, local_files_only=is_offline)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _loading(model, "tokenizer", error) from error
    return tokenizer


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype of a name; auto is float32 on a CPU, where bfloat16 matmuls are slower, else bfloat16."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def load_model(
    model: str,
    dtype: torch.dtype,
    *,
    show_progress: bool,
    device: torch.device = CPU,
    quantization: QuantizationName = "none",
    lora: str | None = None,
    tell: Callable[[str], None] = lambda _line: None,
) -> nn.Module:
    """Load weights from safetensors, memory-mapped where file and model agree on the dtype.

    Quantised weights are dequantised, unless `quantization` keeps them.

    Args:
        model: model as the user named it.
        dtype: dtype of weights and activations.
        show_progress: whether to draw a progress bar on standard error.
        device: device of the weights.
        quantization: which linear layers stay or become small.
        lora: directory of an adapter that is merged into the weights, or None.
        tell: takes a line for the user, about tensors that are left out.

    Raises:
        ConfigError: the weights are missing or broken; pickled weights are never loaded.
    """
    if show_progress:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()
    config = load_config(model)[0]
    loaded, kept, info = _build(model, config, dtype, quantization)
    _check_tensors(model, config, info, tell)
    if lora is not None:
        loaded = merge_lora(loaded, lora)
    for module_name, matrix in kept.items():
        replace_(loaded, module_name, matrix)
    if (bits := ROUNDED_BITS.get(quantization)) is not None:
        round_linears_(loaded, bits)
    module: nn.Module = loaded.eval().requires_grad_(False).to(device)
    adapt_(module)
    return module


def _build(
    model: str, config: PreTrainedConfig, dtype: torch.dtype, quantization: QuantizationName
) -> tuple[Any, dict[str, PackedMatrix], dict[str, Any]]:
    """Build a model with its weights, from dense or quantised files.

    Returns:
        The model; matrices that are to replace linear layers, which are zeros in it, by name; which tensors were
        missing, unexpected or of another shape.
    """
    name, is_offline = _source(model)
    _check_no_adapter(model, name)
    stored = open_quantized(model, config)
    kept: dict[str, PackedMatrix] = {}
    options = {
        "dtype": dtype,
        "attn_implementation": ATTENTION_NAME,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported by the caller: its own error does not name the tensor
    }
    try:
        if stored is None:
            loaded, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                name, local_files_only=is_offline, use_safetensors=True, **options
            )
        else:
            empty: Any = model_on_meta(config, dtype)
            if quantization == "keep":
                kept = stored.packed(linear_names(empty))
            tensors = stored.state_dict(kept, dtype)
            loaded, info = type(empty).from_pretrained(None, config=empty.config, state_dict=tensors, **options)
    except Exception as error:  # safetensors raises a bare Exception subclass for a truncated file
        raise _loading(model, "weights", error) from error
    return loaded, kept, info


def open_quantized(model: str, config: PreTrainedConfig) -> QuantizedCheckpoint | None:
    """Open the files of quantised weights, or return None if a model's weights are dense.

    Raises:
        ConfigError: the weights are missing or broken, or their method is not read.
    """
    options = quantization_of(config)
    if options is None:
        return None
    check_quantization(config)
    name, is_offline = _source(model)
    try:
        return QuantizedCheckpoint(find_checkpoint(name, is_offline=is_offline), options)
    except Exception as error:  # as in `load_model`
        raise _loading(model, "weights", error) from error


def model_on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """Build the model that a config describes, without weights."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(dense_config(config), dtype=dtype)
    return model


def _check_no_adapter(model: str, name: str) -> None:
    """Refuse an adapter beside the weights, which Transformers would apply if it finds peft, and else ignore."""
    if (Path(name) / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"model: got {model!r}, which has {ADAPTER_CONFIG} beside the weights; legal is an adapter in a directory "
            "of its own, named by the option lora"
        )


def _check_tensors(model: str, config: PreTrainedConfig, info: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Refuse weights that are not the config's, and tell which tensors are left out.

    Raises:
        ConfigError: a tensor is missing, of a wrong shape, or has no place.
    """
    missing = sorted(info["missing_keys"])
    mismatched = sorted(key for key, *_ in info["mismatched_keys"])
    left = leftovers(sorted(info["unexpected_keys"]), config)
    unexpected = left.unknown  # say, a bias that the config switches off: the output would be wrong
    if missing or mismatched or unexpected:
        raise ConfigError(
            f"model: got {model!r}, whose weights lack {len(missing)} tensors, have {len(mismatched)} of a wrong shape "
            f"and {len(unexpected)} that the config has no place for, such as "
            f"{[*missing, *mismatched, *unexpected][0]}{left.prefixes()}"
        )
    if left.ignored:
        tell(f"{model}: {len(left.ignored)} tensors are left out: {left.reasons()}")
