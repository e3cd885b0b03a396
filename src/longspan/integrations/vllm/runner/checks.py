"""Refusals, at start and by the option's name, of what is not proven with `prefill_context_parallel_size`.

Holds checks of arguments and configurations. Must not change anything.
Read next: `longspan.integrations.vllm.runner.backend`, which refuses models by their layers.
"""

from typing import Any

import vllm.envs as envs
from vllm.config import CompilationMode, CUDAGraphMode

from longspan.errors import ConfigError, UnsupportedModelError
from longspan.integrations.vllm.options import KEY

GRAPHS = (None, CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE)
"""What a user may ask for; None leaves the choice to vLLM, which takes piecewise graphs."""


def check_platform(device_type: str, has_triton: bool) -> None:
    """Refuse a platform on which vLLM's V2 model runner does not start.

    Args:
        device_type: vLLM's name of the platform's devices.
        has_triton: whether vLLM can use Triton there.

    Raises:
        ConfigError: names the device, and what a user of CPUs does.
    """
    if device_type == "cpu" and not has_triton:
        _refuse("device", "cpu", f"cuda; on CPUs give context_parallel_size under {KEY} instead")
    if device_type not in ("cpu", "cuda"):
        _refuse("device", device_type, "cuda")
    if envs.VLLM_USE_V2_MODEL_RUNNER is False:
        _refuse("VLLM_USE_V2_MODEL_RUNNER", "0", "1, or unset")


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
    if arguments.attention_backend is not None:
        _refuse("attention_backend", arguments.attention_backend, "none: longspan's own")
    # vLLM's own checks of these name other reasons first.
    for name in ("return_sampling_mask", "enable_trace_replay"):
        if getattr(arguments, name):
            _refuse(name, True, "false")
    if arguments.watermark_config is not None:
        _refuse("watermark_config", "a value", "none (watermarks)")
    graphs = arguments.compilation_config.cudagraph_mode
    if graphs not in GRAPHS:
        _refuse("compilation_config.cudagraph_mode", graphs.name, "NONE or PIECEWISE")


def check_config(config: Any) -> None:
    """Refuse what does not work, or was never compared with one device, when ranks share a request.

    Raises:
        ConfigError: names the option.
        UnsupportedModelError: names the model.
    """
    parallel, model, cache = config.parallel_config, config.model_config, config.cache_config
    if not config.use_v2_model_runner:
        _refuse("model runner", "V1, which vLLM prefers here", "V2; vLLM's log says why it prefers V1")
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "data_parallel_size", "nnodes"):
        if getattr(parallel, name) != 1:
            _refuse(name, getattr(parallel, name), "1")
    for owner, name in (
        (parallel, "enable_expert_parallel"),
        (parallel, "enable_eplb"),
        (parallel, "enable_dbo"),
        (parallel, "enable_batch_sharded_sampling"),
        (parallel, "enable_fault_tolerance"),
        (model, "enable_sleep_mode"),
        (model, "enable_prompt_embeds"),
        (cache, "kv_sharing_fast_prefill"),
        (config.aux_output_config, "enable_return_routed_experts"),
    ):
        if getattr(owner, name):
            _refuse(name, True, "false")
    if parallel.ubatch_size > 1:
        _refuse("ubatch_size", parallel.ubatch_size, "0")
    for name, what in (
        ("speculative_config", "speculative decoding"),
        ("lora_config", "LoRA"),
        ("kv_transfer_config", "KV connectors"),
        ("ec_transfer_config", "encoder connectors"),
    ):
        if getattr(config, name) is not None:
            _refuse(name, "a value", f"none ({what})")
    if config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE:
        _refuse("compilation_config.mode", "STOCK_TORCH_COMPILE", "NONE, DYNAMO_TRACE_ONCE or VLLM_COMPILE")
    if cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        _refuse("kv_cache_dtype", cache.cache_dtype, "auto")
    if model.runner_type != "generate":
        _refuse("runner", model.runner_type, "generate")
    _check_model(model)


def _check_model(model: Any) -> None:
    window = model.get_sliding_window()
    kinds = getattr(model.hf_text_config, "layer_types", None)
    has_window = window is not None and (kinds is None or "sliding_attention" in kinds)
    for wrong, what in (
        (model.is_multimodal_model, "several modalities"),
        (model.is_encoder_decoder, "an encoder and a decoder"),
        (model.use_mla, "multi-head latent attention"),
        (model.is_moe, "a mixture of experts"),
        (model.is_hybrid or model.has_inner_state, "layers with a recurrent state"),
        (model.uses_mrope, "multimodal positions"),
        (model.attention_chunk_size is not None, f"chunked attention of {model.attention_chunk_size} tokens"),
        (getattr(model, "supports_kv_cache_grouping", False), "groups of KV caches of its own"),  # new in vLLM 0.33
        (has_window, f"a sliding window of {window} tokens"),
    ):
        if wrong:
            raise UnsupportedModelError(
                f"model: {model.model} has {what}, which {KEY} does not support with prefill_context_parallel_size"
            )


def _refuse(name: str, got: object, legal: str) -> None:
    raise ConfigError(
        f"{name}: got {got}, legal with {KEY} in additional_config and prefill_context_parallel_size is {legal}"
    )
