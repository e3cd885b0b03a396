"""Refusals, at start and by the option's name, of what no worker of the plugin supports.

Holds checks of versions, arguments and configurations. Must not change anything, or know how the workers differ: what
only one of them refuses is in `longspan.integrations.vllm.start` and `longspan.integrations.vllm.runner.checks`.
Read next: `longspan.integrations.vllm.plain_attention`, which refuses models by their layers.
"""

from collections.abc import Collection
from typing import Any, NoReturn

import vllm
from vllm.config import CompilationMode

from longspan.errors import ConfigError, UnsupportedModelError
from longspan.integrations.vllm.options import KEY

SUPPORTED_MINORS = ((0, 32), (0, 33))
"""Versions of vLLM that the tests ran with. Others are refused, as vLLM may change all that the plugin uses."""


def check_version(version: str | None = None) -> None:
    """Refuse a version of vLLM that was not tested; None is the installed one.

    Raises:
        ConfigError: names the tested versions.
    """
    version = version or vllm.__version__
    found = tuple(int(part) if part.isdigit() else -1 for part in version.split(".")[:2])
    if found not in SUPPORTED_MINORS:
        legal = ", ".join(f"{major}.{minor}" for major, minor in SUPPORTED_MINORS)
        raise ConfigError(f"vllm: got version {version}, legal with {KEY} in additional_config is {legal}")


def check_arguments(arguments: Any) -> None:
    """Refuse arguments that the plugin would have to overrule, or for which vLLM's own checks name other reasons first.

    Args:
        arguments: vLLM's arguments, as the user gave them.

    Raises:
        ConfigError: names the argument.
    """
    if arguments.worker_cls != "auto":
        refuse("worker_cls", arguments.worker_cls, "auto")
    if arguments.distributed_executor_backend not in (None, "mp"):
        refuse("distributed_executor_backend", arguments.distributed_executor_backend, "mp")
    for name, wrong in (
        ("return_sampling_mask", arguments.return_sampling_mask),
        ("enable_trace_replay", arguments.enable_trace_replay),
        ("enable_return_routed_experts", arguments.aux_output_config.enable_return_routed_experts),
    ):
        if wrong:
            refuse(name, True, "false")
    if arguments.watermark_config is not None:
        refuse("watermark_config", "a value", "none (watermarks)")


def check_config(
    config: Any, stored_dtypes: Collection[str] = (), *, has_lora: bool = False, has_text_parts: bool = False
) -> None:
    """Refuse what does not work, or was never compared with one device, when ranks share a request.

    Args:
        config: vLLM's configuration.
        stored_dtypes: names of KV dtypes that the worker takes beside the model's own.
        has_lora: whether the worker has LoRA adapters.
        has_text_parts: whether the worker runs the language model of a model with several modalities.

    Raises:
        ConfigError: names the option.
        UnsupportedModelError: names the model.
    """
    parallel, model, cache = config.parallel_config, config.model_config, config.cache_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "data_parallel_size", "nnodes"):
        if getattr(parallel, name) != 1:
            refuse(name, getattr(parallel, name), "1")
    for owner, name in (
        (parallel, "enable_expert_parallel"),
        (parallel, "enable_eplb"),
        (parallel, "enable_dbo"),
        (parallel, "enable_batch_sharded_sampling"),
        (parallel, "enable_fault_tolerance"),
        (model, "enable_sleep_mode"),
        (model, "enable_prompt_embeds"),
        (cache, "kv_sharing_fast_prefill"),
    ):
        if getattr(owner, name):
            refuse(name, True, "false")
    if parallel.ubatch_size > 1:
        refuse("ubatch_size", parallel.ubatch_size, "0 or 1")
    for name, what, is_supported in (
        ("speculative_config", "speculative decoding", False),
        ("lora_config", "LoRA", has_lora),
        ("kv_transfer_config", "KV connectors", False),
        ("ec_transfer_config", "encoder connectors", False),
    ):
        if getattr(config, name) is not None and not is_supported:
            refuse(name, "a value", f"none ({what})")
    if config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE:
        refuse("compilation_config.mode", "STOCK_TORCH_COMPILE", "NONE, DYNAMO_TRACE_ONCE or VLLM_COMPILE")
    legal = ("auto", *stored_dtypes)
    if cache.cache_dtype not in (*legal, str(model.dtype).removeprefix("torch.")):
        refuse("kv_cache_dtype", cache.cache_dtype, " or ".join(legal))
    if cache.kv_cache_dtype_skip_layers:
        refuse("kv_cache_dtype_skip_layers", cache.kv_cache_dtype_skip_layers, "none")
    is_text = model.is_multimodal_model and model.multimodal_config.language_model_only
    remedy = " without language_model_only" if has_text_parts else ""
    if model.runner_type != "generate":
        refuse("runner", model.runner_type, "generate")
    for wrong, what in (
        (model.is_multimodal_model and not (has_text_parts and is_text), f"several modalities{remedy}"),
        (model.uses_mrope, "multimodal positions"),
        (model.is_encoder_decoder, "an encoder and a decoder"),
        (model.use_mla, "multi-head latent attention"),
        (model.is_hybrid or model.has_inner_state, "layers with a recurrent state"),
        (getattr(model, "supports_kv_cache_grouping", False), "groups of KV caches of its own"),  # new in 0.33
    ):
        if wrong:
            raise UnsupportedModelError(f"model: {model.model} has {what}, which {KEY} does not support in vLLM")


def refuse(name: str, got: object, legal: str) -> NoReturn:
    """Refuse a value.

    Args:
        name: the option's.
        got: the value.
        legal: what is legal instead.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(f"{name}: got {got}, legal with {KEY} in additional_config is {legal}")
