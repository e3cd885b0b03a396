"""Files of a LoRA adapter whose products are added per request: what is read of them, and which are refused.

Holds the reading of peft's files, without peft, and the choice of modules that may be adapted. Must not know ranks,
requests, or how products are added.
Read next: `longspan.models.adapters`, which adds them; `longspan.models.lora`, adapters that peft merges.

Note [What an adapter may change]
    Linear layers of attention and of dense MLPs, which are called once per step, with a row per token. Not those of a
    mixture of experts (an expert sees some rows, in another order), of recurrent layers (they are called piece by
    piece), the projection of latents (its parts are taken as plain matrices), embeddings and logits. And nothing but
    the product: no bias, no whole modules, no DoRA, no start that has changed the base's weights.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from longspan.errors import ConfigError
from longspan.models.latent import projections_of_latents
from longspan.models.lora import ADAPTER_CONFIG, WEIGHTS_NAME
from longspan.models.packed_linear import PackedLinear
from longspan.models.recurrent import recurrent_modules
from longspan.types import Adapter

_HARMLESS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out", "inference_mode"),
        *("loftq_config", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size"),
        *("eva_config", "revision", "runtime_config", "task_type"),
    }
)
"""Fields of an adapter's config that do not change what is added, where those of `_READ` are legal."""

_READ = frozenset(
    {
        *("alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform"),
        *("lora_alpha", "r", "rank_pattern", "target_modules", "use_rslora"),
    }
)

_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base's weights as they are."""

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


class Shape(NamedTuple):
    """Widths of a linear layer."""

    num_out: int
    width: int


class AdaptableModules(NamedTuple):
    """Modules of a model, as far as adapters are concerned."""

    shapes: Mapping[str, Shape]
    """Linear layers that an adapter may change, by name."""
    refused: Mapping[str, str]
    """What all other modules are, in words, by name."""

    def why_refused(self, name: str) -> str:
        """What a module is that an adapter may not change; files may have other names for what is inside of a part."""
        found = self.refused.get(name, "not in this model")
        while name := name.rpartition(".")[0]:
            if self.refused.get(name, "").startswith("part of"):
                return self.refused[name]
        return found


def adaptable_modules(model: Any) -> AdaptableModules:
    """Sort the modules of a model, which may be on the meta device. See Note [What an adapter may change]."""
    latents = {id(module) for module in projections_of_latents(model)}
    mixtures = [f"{name}." for name in _mixtures(model)]
    recurrent = {id(module) for module in recurrent_modules(model)}
    states = [f"{name}." for name, module in model.named_modules() if id(module) in recurrent]
    ends = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    shapes: dict[str, Shape] = {}
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        if id(module) in ends:
            refused[name] = "an embedding, or makes the logits"
        elif any(f"{name}.".startswith(prefix) for prefix in mixtures):
            refused[name] = "part of a mixture of experts"
        elif any(f"{name}.".startswith(prefix) for prefix in states):
            refused[name] = "part of a recurrent layer"
        elif id(module) in latents:
            refused[name] = "the projection of latents"
        elif not isinstance(module, nn.Linear | PackedLinear) or not re.search(r"\.\d+\.", name):
            refused[name] = f"a {type(module).__name__}, and no linear layer inside of a decoder layer"
        else:
            shapes[name] = Shape(module.out_features, module.in_features)
    return AdaptableModules(shapes, refused)


def _mixtures(model: Any) -> set[str]:
    """Names of mixtures of experts: what has experts, or a part whose matrices are those of several."""
    found = {name for name, module in model.named_modules() if hasattr(module, "experts")}
    for name, weight in model.named_parameters():
        if weight.ndim == 3:  # [E, out, in]; a convolution's too, in layers with a state
            found.add(name.rpartition(".")[0].rpartition(".")[0])
    return found


@dataclass(frozen=True, slots=True)
class LowRank:
    """Product that is added to one linear layer's: rows [n, width] times `a`, times `b`."""

    a: Tensor
    """[width, r], of which rows are multiplied."""
    b: Tensor
    """[r, num_out], with the adapter's scale."""


class AdapterFiles:
    """Files of one adapter, read once: what is checked is what is used."""

    def __init__(self, directory: str, field: str = "lora", got: str | None = None) -> None:
        """Read the files.

        Args:
            directory: of the adapter.
            field: option or field of a request that names it, for errors.
            got: what that says; None for the directory.

        Raises:
            ConfigError: files are missing or broken, or ask for more than products that are added.
        """
        self._field, self._got = field, directory if got is None else got
        path = Path(directory).expanduser()
        try:
            config, self._weights = (path / ADAPTER_CONFIG).read_bytes(), (path / WEIGHTS_NAME).read_bytes()
        except OSError as error:
            legal = f"a directory with {ADAPTER_CONFIG} and {WEIGHTS_NAME}"
            raise self._refusal(f"{legal}: {error.strerror} ({path})") from error
        self.digest = hashlib.blake2b(len(config).to_bytes(8) + config + self._weights, digest_size=16).digest()
        """Hash of all that is read."""
        self._config = self._read_config(config)
        try:
            self._tensors = safetensors.torch.load(self._weights)
        except (SafetensorError, ValueError, KeyError) as error:
            raise self._refusal(f"a file {WEIGHTS_NAME} of whole safetensors: {error}") from error

    def products(self, modules: AdaptableModules, dtype: torch.dtype, device: torch.device) -> dict[str, LowRank]:
        """What is added to each module, by name.

        Args:
            modules: those of the model.
            dtype: of the model's activations.
            device: of the model.

        Raises:
            ConfigError: the adapter is not one of this model.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self._tensors.items():
            match = _TENSOR.fullmatch(name)
            if match is None:
                raise self._refusal(f"an adapter with products of linear layers alone; this one has {name}")
            parts.setdefault(match["module"], {})[match["part"]] = tensor
        if not parts:
            raise self._refusal("an adapter with tensors; this one has none")
        missing = [name for name in modules.shapes if name not in parts and self._is_target(name)]
        if missing:
            what = f"{len(missing)} of its modules have no tensors, such as {missing[0]}"
            raise self._refusal(f"an adapter of this model; {what}")
        return {name: self._product(name, of, modules, dtype, device) for name, of in sorted(parts.items())}

    def _product(
        self,
        name: str,
        parts: Mapping[str, Tensor],
        modules: AdaptableModules,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LowRank:
        shape = modules.shapes.get(name)
        if shape is None:
            what = modules.why_refused(name)
            raise self._refusal(f"an adapter of linear layers of attention and dense MLPs; {name} is {what}")
        if len(parts) < 2:
            raise self._refusal(f"an adapter with lora_A and lora_B of every module; {name} has one of them")
        a, b = parts["A"], parts["B"]
        rank = int(self._pattern("rank_pattern", name, self._config.get("r")))
        if tuple(a.shape) != (rank, shape.width) or tuple(b.shape) != (shape.num_out, rank):
            raise self._refusal(
                f"an adapter of this model; {name} has lora_A {[*a.shape]} and lora_B {[*b.shape]}, its config and the "
                f"model ask for {[rank, shape.width]} and {[shape.num_out, rank]}"
            )
        if not (a.is_floating_point() and b.is_floating_point() and a.isfinite().all() and b.isfinite().all()):
            raise self._refusal(f"an adapter of finite numbers; those of {name} are not")
        alpha = float(self._pattern("alpha_pattern", name, self._config.get("lora_alpha")))
        scale = alpha / rank**0.5 if self._config.get("use_rslora") else alpha / rank
        return LowRank(a.to(device, dtype).t().contiguous(), (b.float() * scale).to(device, dtype).t().contiguous())

    def _pattern(self, field: str, name: str, default: Any) -> Any:
        """A module's own value of a number, or the default, as peft finds it."""
        patterns = self._config.get(field) or {}
        value = next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self._refusal(f"an adapter whose r and lora_alpha are numbers above 0; {name} has {value!r}")
        return value

    def _is_target(self, name: str) -> bool:
        """Whether the config asks for an adapter of a module, as peft reads it."""
        config = self._config
        excluded, targets = config.get("exclude_modules"), config.get("target_modules")
        if excluded and _names(excluded, name):
            return False
        if not targets or not _names(targets, name):
            return False
        layers = config.get("layers_to_transform")
        if isinstance(targets, str) or layers is None or layers == []:
            return True
        patterns = config.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if (match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)) is not None:
                return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
        return False

    def _read_config(self, raw: bytes) -> dict[str, Any]:
        """Read the config, and refuse what is not computed.

        Raises:
            ConfigError: something in it is not.
        """
        try:
            config = json.loads(raw)
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise self._refusal(f"a directory whose {ADAPTER_CONFIG} is JSON of an object")
        if (kind := config.get("peft_type")) != "LORA":
            raise self._refusal(f"an adapter of peft_type LORA; this one is {kind!r}")
        if (start := config.get("init_lora_weights", True)) not in _PLAIN_STARTS:
            raise self._refusal(f"an adapter that leaves the base's weights alone; its init_lora_weights is {start!r}")
        if (bias := config.get("bias", "none")) != "none":
            raise self._refusal(f"an adapter without biases; its bias is {bias!r}")
        for field, value in config.items():
            if field not in _HARMLESS and field not in _READ and value:
                legal = f"an adapter without {field}, which is {value!r:.80}; merged (DIR without a name), peft decides"
                raise self._refusal(legal)
        return config

    def _refusal(self, legal: str) -> ConfigError:
        return ConfigError(f"{self._field}: got {self._got!r}, legal is {legal}")


def _names(targets: Any, name: str) -> bool:
    """Whether peft's names or pattern of modules name one."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def files_of(adapter: Adapter) -> AdapterFiles:
    """Read the files of an adapter that the driver has checked.

    Raises:
        ConfigError: they are not those that the driver has read, or cannot be read.
    """
    files = AdapterFiles(adapter.directory, got=f"{adapter.name}={adapter.directory}")
    if files.digest != adapter.digest:
        raise ConfigError(
            f"lora: got {adapter.name}={adapter.directory} with other files than the driver has read, legal is the "
            "same ones on all hosts, which do not change while they are in use"
        )
    return files
