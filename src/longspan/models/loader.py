"""Loaders of a model's config, tokenizer and weights, by its name.

Holds the calls of Transformers' loaders, and turns their errors into ours. Must not know ranks or plans.
Read next: `longspan.models.inspect`, `longspan.models.recall`; `longspan.models.speedups`, applied after loading.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
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
from longspan.models.generation import EOS
from longspan.models.gguf_files import gguf_path
from longspan.models.hook import ATTENTION_NAME
from longspan.models.leftovers import leftovers
from longspan.models.lora import ADAPTER_CONFIG, merge_lora
from longspan.models.names import LEGAL_MODELS, OWN_NAMES, is_gguf, local_directory
from longspan.models.overrides import check_overrides, merge_overrides
from longspan.models.packed_experts import round_experts_
from longspan.models.packed_linear import Bits, linear_names, replace_, round_linears_
from longspan.models.quantization import QuantizedCheckpoint, check_quantization, dense_config, quantization_of
from longspan.models.recall import recall_path
from longspan.models.smollm2 import smollm2_path
from longspan.models.text_part import KEY_MAPPING, text_overrides, text_part, text_tensors
from longspan.native.packed import PackedMatrix

CPU = torch.device("cpu")

ROUNDED_BITS: Mapping[str, Bits] = {"int8": 8, "int4": 4}
"""Bits to which linear layers are rounded, by the option `quantization`."""

OWN_MODELS: Mapping[str, Callable[[], Path]] = dict(zip(OWN_NAMES, (recall_path, smollm2_path), strict=True))
"""Directory of the models that have a name here, wherever a user names a model."""


def quiet_transformers() -> None:
    """Keep Transformers' own messages off standard error, in our own processes (workers, the command line)."""
    transformers_logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()


def resolve_model(model: str) -> str:
    """Return the directory or Hub id that Transformers can load.

    Raises:
        ConfigError: the name looks like a path, and there is no model there, or none that can be converted.
    """
    if model in OWN_MODELS:
        return str(OWN_MODELS[model]())
    if is_gguf(model):
        return str(gguf_path(Path(model).expanduser()))
    path = local_directory(model)
    return model if path is None else str(path)


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
        f"model: got {model!r}, legal is {LEGAL_MODELS} that can be reached or is in the cache; its {what} cannot be "
        f"loaded: {reason[:300]}"
    )


def load_config(
    model: str, overrides: Mapping[str, Any] | None = None
) -> tuple[PreTrainedConfig, GenerationConfig | None]:
    """Load the config of a model, of a multimodal one that of its text part, and its generation config.

    Args:
        model: model as the user named it.
        overrides: fields of the config that the user gives in place of the file's.

    Raises:
        ConfigError: there is no such model, its files are broken, or an override is illegal.
    """
    name, is_offline = _source(model)
    config = text_part(_read_config(model, name, overrides, is_offline=is_offline), overrides)
    if Path(name).is_dir() and not (Path(name) / GENERATION_CONFIG_NAME).is_file():
        return config, None
    try:
        generation_config = GenerationConfig.from_pretrained(name, local_files_only=is_offline)
    except OSError as error:
        if Path(name).is_dir():  # it is there, and broken
            raise _loading(model, "generation config", error) from error
        return config, None  # the Hub has none, or cannot be asked
    except Exception as error:  # as above: it was found, and is broken
        raise _loading(model, "generation config", error) from error
    told, _ = PreTrainedConfig.get_config_dict(name, local_files_only=is_offline)
    given = (overrides or {}, text_overrides(overrides))
    if not any(EOS in fields for fields in (told, told.get("text_config") or {}, *given)):
        config.eos_token_id = None  # see Note [End tokens]
    return config, generation_config


def load_config_file(path: Path, overrides: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Load a config, or the text part's, from a JSON file of any name.

    Args:
        path: the file.
        overrides: as for `load_config`.

    Raises:
        ConfigError: the file is broken, or an override is illegal.
    """
    return text_part(_read_config(str(path), str(path), overrides, is_offline=True), overrides)


def _read_config(model: str, name: str, overrides: Mapping[str, Any] | None, *, is_offline: bool) -> PreTrainedConfig:
    """Read the whole config of a file, a directory or a Hub id."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, local_files_only=is_offline)
        if overrides:
            fields, _ = PreTrainedConfig.get_config_dict(name, local_files_only=is_offline)
            given = copy.deepcopy(dict(overrides))  # some configs change lists that they are given
            config = type(config).from_dict(merge_overrides(fields, given, config.to_dict()))
            check_overrides(overrides, config.to_dict())
    except ConfigError:
        raise
    except Exception as error:  # Hugging Face's own errors for a field of a wrong type derive from Exception alone
        raise _loading(model, "config", error) from error
    return config


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Raises:
        ConfigError: the model has no tokenizer, or one that knows no text.
    """
    name, is_offline = _source(model)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, local_files_only=is_offline)
    except Exception as error:  # the tokenizers library raises a bare Exception for a file that it does not know
        raise _loading(model, "tokenizer", error) from error
    if {*tokenizer.get_vocab().values()} <= {*tokenizer.all_special_ids}:
        # Without a tokenizer's files Transformers makes an empty one for some families: every text would be no text.
        raise _loading(model, "tokenizer", ValueError("its files are missing, or have no tokens but special ones"))
    return tokenizer


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype of a name; auto is float32 on a CPU, where bfloat16 matmuls are slower, else bfloat16."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def _foreign_prefix(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Say which prefix would make unexpected tensors the missing ones, if there is one."""
    for name in missing:
        prefix = next((key.removesuffix(name) for key in unexpected if key.endswith(f".{name}")), None)
        if prefix is not None:
            return f"; its tensors begin with {prefix!r}, which this model's do not"
    return ""


def load_model(
    model: str,
    dtype: torch.dtype,
    *,
    show_progress: bool,
    device: torch.device = CPU,
    overrides: Mapping[str, Any] | None = None,
    quantization: QuantizationName = "none",
    lora: str | None = None,
    tell: Callable[[str], None] = lambda _line: None,
    cut_: Callable[[nn.Module], None] = lambda _model: None,
) -> nn.Module:
    """Load weights from safetensors, memory-mapped where file and model agree on the dtype.

    Of a multimodal repository the text model is loaded, and tensors of images and sound are left out. Quantised weights
    are dequantised, unless `quantization` keeps them.

    Args:
        model: model as the user named it.
        dtype: dtype of weights and activations.
        show_progress: whether to draw a progress bar on standard error.
        device: device of the weights.
        overrides: as for `load_config`.
        quantization: which linear layers stay or become small.
        lora: directory of an adapter that is merged into the weights, or None.
        tell: takes a line for the user, about tensors that are left out.
        cut_: leaves a part of the model, before it goes to its device.

    Raises:
        ConfigError: the weights are missing or broken; pickled weights are never loaded.
    """
    if show_progress:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()
    name, is_offline = _source(model)
    whole = _read_config(model, name, overrides, is_offline=is_offline)
    config = text_part(whole, overrides)
    _check_no_adapter(model, name)
    loaded, kept, info = _build(model, config, dtype, quantization, is_part=config is not whole)
    if config is not whole:
        info["unexpected_keys"] = text_tensors(info["unexpected_keys"])
    _check_tensors(model, config, info, tell)
    _check_tied(loaded, overrides)
    if lora is not None:
        loaded = merge_lora(loaded, lora)
    for module_name, matrix in kept.items():
        replace_(loaded, module_name, matrix)
    if (bits := ROUNDED_BITS.get(quantization)) is not None:
        round_linears_(loaded, bits)
        round_experts_(loaded, bits)
    cut_(loaded.eval().requires_grad_(False))
    module: nn.Module = loaded.to(device)
    adapt_(module)
    return module


def _build(
    model: str, config: PreTrainedConfig, dtype: torch.dtype, quantization: QuantizationName, *, is_part: bool
) -> tuple[Any, dict[str, PackedMatrix], dict[str, Any]]:
    """Build a model with its weights, from dense or quantised files.

    Args:
        model: model as the user named it.
        config: config of the model, or of the text part.
        dtype: dtype of dense weights.
        quantization: as for `load_model`.
        is_part: whether it is the text part of a multimodal repository.

    Returns:
        The model; matrices that are to replace linear layers, which are zeros in it, by name; which tensors were
        missing, unexpected or of another shape.
    """
    name, is_offline = _source(model)
    stored = open_quantized(model, config)
    kept: dict[str, PackedMatrix] = {}
    options = {
        "key_mapping": dict(KEY_MAPPING) if is_part else None,
        "dtype": dtype,
        "attn_implementation": ATTENTION_NAME,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported by the caller: its own error does not name the tensor
    }
    try:
        if stored is None:
            loaded, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                name, config=config, local_files_only=is_offline, use_safetensors=True, **options
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
    check_quantization(config)
    options = quantization_of(config)
    if options is None:
        return None
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
            f"{[*missing, *mismatched, *unexpected][0]}" + (_foreign_prefix(missing, unexpected) or left.prefixes())
        )
    if left.ignored:
        tell(f"{model}: {len(left.ignored)} tensors are left out: {left.reasons()}")


def _check_tied(loaded: Any, overrides: Mapping[str, Any] | None) -> None:
    """Refuse to tie embeddings whose weights differ: Transformers takes both from the file, whatever the config says.

    Raises:
        ConfigError: the user asked for it.
    """
    is_asked = {**(overrides or {}), **text_overrides(overrides)}.get("tie_word_embeddings")
    output = loaded.get_output_embeddings()
    if is_asked and (output is None or output.weight is not loaded.get_input_embeddings().weight):
        raise ConfigError(
            "hf_overrides: got tie_word_embeddings True for a model whose files have output embeddings of their own, "
            "legal is false"
        )
