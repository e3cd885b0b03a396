"""Refusals, at start and by the option's name, of what the plugin does not support.

Holds checks of versions, arguments and configurations. Must not change anything.
Read next: `longspan.integrations.vllm.backend`, which refuses models by their layers.
"""

from typing import Any

import vllm
import vllm.envs as envs
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


def check_platform(device_type: str) -> None:
    """Refuse devices other than CPUs.

    Args:
        device_type: vLLM's name of the platform's devices.

    Raises:
        ConfigError: names the device, and what a user of GPUs does.
    """
    if device_type != "cpu":
        _refuse("device", device_type, "cpu; GPUs need --prefill-context-parallel-size, not context_parallel_size")


def check_arguments(arguments: Any) -> None:
    """Refuse arguments that the plugin would have to overrule.

    Args:
        arguments: vLLM's arguments, as the user gave them.

    Raises:
        ConfigError: names the argument.
    """
    if arguments.worker_cls != "auto":
        _refuse("worker_cls", arguments.worker_cls, "auto")
    if arguments.distributed_executor_backend not in (None, "mp"):
        _refuse("distributed_executor_backend", arguments.distributed_executor_backend, "mp")
    if envs.VLLM_USE_V2_MODEL_RUNNER:
        _refuse("VLLM_USE_V2_MODEL_RUNNER", "1", "0, or unset")
    # Only vLLM's V2 model runner has these; vLLM's own checks name the runner, not the option.
    for name, wrong in (
        ("return_sampling_mask", arguments.return_sampling_mask),
        ("enable_trace_replay", arguments.enable_trace_replay),
        ("enable_return_routed_experts", arguments.aux_output_config.enable_return_routed_experts),
    ):
        if wrong:
            _refuse(name, True, "false")
    if arguments.watermark_config is not None:
        _refuse("watermark_config", "a value", "none (watermarks)")


def check_config(config: Any) -> None:
    """Refuse what does not work with context parallelism.

    Raises:
        ConfigError: names the option.
        UnsupportedModelError: names the model.
    """
    parallel, model, cache = config.parallel_config, config.model_config, config.cache_config
    for name in (
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
        "data_parallel_size",
        "nnodes",
    ):
        if getattr(parallel, name) != 1:
            _refuse(name, getattr(parallel, name), "1")
    mode = config.compilation_config.mode
    if mode == CompilationMode.STOCK_TORCH_COMPILE:
        _refuse("compilation_config.mode", mode.name, "NONE, DYNAMO_TRACE_ONCE or VLLM_COMPILE")
    for name in ("enable_expert_parallel", "enable_dbo"):
        if getattr(parallel, name):
            _refuse(name, True, "false")
    if parallel.ubatch_size > 1:
        _refuse("ubatch_size", parallel.ubatch_size, "0 or 1")
    for name, what in (
        ("speculative_config", "speculative decoding"),
        ("lora_config", "LoRA"),
        ("kv_transfer_config", "KV connectors"),
        ("ec_transfer_config", "encoder connectors"),
    ):
        if getattr(config, name) is not None:
            _refuse(name, "a value", f"none ({what})")
    if cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        _refuse("kv_cache_dtype", cache.cache_dtype, "auto")
    if model.enable_sleep_mode:
        _refuse("enable_sleep_mode", True, "false")
    if model.runner_type != "generate":
        _refuse("runner", model.runner_type, "generate")
    if model.enable_prompt_embeds:
        _refuse("enable_prompt_embeds", True, "false")
    for wrong, what in (
        (model.is_multimodal_model, "a multimodal model"),
        (model.uses_mrope, "multimodal positions"),
        (model.is_encoder_decoder, "an encoder and a decoder"),
        (model.use_mla, "multi-head latent attention"),
        (model.attention_chunk_size, "chunked attention"),
        (model.is_hybrid or model.has_inner_state, "layers with a recurrent state"),
        (getattr(model, "supports_kv_cache_grouping", False), "groups of KV caches of its own"),  # new in 0.33
    ):
        if wrong:
            raise UnsupportedModelError(f"model: {model.model} has {what}, which {KEY} does not support")


def _refuse(name: str, got: object, legal: str) -> None:
    raise ConfigError(f"{name}: got {got}, legal with {KEY} in additional_config is {legal}")
