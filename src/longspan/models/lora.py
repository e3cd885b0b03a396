"""LoRA adapters, merged into the weights while a model is loaded.

Holds the merge, and the refusal of adapters that do not fit. Must not know ranks, or how weights are stored.
Read next: `longspan.models.loader`, which calls it; `docs/decisions/0035-merged-adapters.md`.
"""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open

from longspan.errors import ConfigError

ADAPTER_CONFIG, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def check_lora(lora: str) -> Path:
    """Check that a directory holds an adapter that can be merged, and return it.

    Raises:
        ConfigError: it does not, or the package that merges is missing.
    """
    path = Path(lora).expanduser()
    if not (path / ADAPTER_CONFIG).is_file() or not (path / WEIGHTS_NAME).is_file():
        raise _refusal(lora, f"a directory with {ADAPTER_CONFIG} and {WEIGHTS_NAME}")
    try:
        kind = json.loads((path / ADAPTER_CONFIG).read_bytes()).get("peft_type")
    except (ValueError, AttributeError) as error:
        raise _refusal(lora, f"a directory whose {ADAPTER_CONFIG} is JSON of an object") from error
    if kind != "LORA":
        raise _refusal(lora, f"an adapter of peft_type LORA; this one is {kind!r}")
    if importlib.util.find_spec("peft") is None:
        raise _refusal(lora, "none without the package peft: pip install 'longspan[lora]'")
    return path


def _refusal(lora: str, legal: str) -> ConfigError:
    return ConfigError(f"lora: got {lora!r}, legal is {legal}")


def merge_lora(model: Any, lora: str) -> Any:
    """Merge an adapter into a model's weights, as peft does it.

    Args:
        model: a Transformers model that was just loaded.
        lora: the adapter's directory.

    Returns:
        The model, with other weights.

    Raises:
        ConfigError: the adapter was not made for a model of these layers and shapes, or cannot be merged into it.
    """
    path = check_lora(lora)
    from peft import PeftModel, get_peft_model_state_dict  # an optional package, and slow to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing tensors, which are refused below
        try:
            adapted = PeftModel.from_pretrained(model, str(path))
        except Exception as error:  # peft has no error of its own
            reason = " ".join(str(error).split())[:200]
            raise _refusal(lora, f"an adapter of this model; it does not fit: {reason}") from error
    with safe_open(path / WEIGHTS_NAME, framework="pt") as file:
        stored: set[str] = set(file.keys())
    # With or without embeddings of its own; peft's default is to ask the Hub about the base's.
    wanted = [set(get_peft_model_state_dict(adapted, save_embedding_layers=is_whole)) for is_whole in (False, True)]
    strays = min((sorted(stored ^ names) for names in wanted), key=len)
    if strays:
        raise _refusal(lora, f"an adapter of this model; {len(strays)} tensors do not fit, such as {strays[0]}")
    _check_not_shared(adapted, lora)
    try:
        return adapted.merge_and_unload()
    except Exception as error:  # as above
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise _refusal(lora, f"an adapter that peft can merge; it says: {reason}") from error


def _check_not_shared(adapted: Any, lora: str) -> None:
    """Refuse changes of weights that another module shares: peft merges in place, so both modules would change."""
    from peft.tuners.lora import LoraLayer

    changed: dict[int, str] = {}  # name of the module that changes a weight, by the weight's id
    users: dict[int, list[str]] = {}
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            changed |= {id(weight): name for weight in module.get_base_layer().parameters(recurse=False)}
        for weight in module.parameters(recurse=False):
            users.setdefault(id(weight), []).append(name.removesuffix(".base_layer"))
    for weight, name in changed.items():
        if others := [user for user in users[weight] if user != name]:
            raise _refusal(lora, f"an adapter that leaves {name} alone, whose weights are also those of {others[0]}")
