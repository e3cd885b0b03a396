"""How `context_parallel_size` under `longspan` comes to our worker for CPUs.

Holds the changes of vLLM's arguments, and what only this worker refuses. Must not know how a worker runs.
Read next: `longspan.integrations.vllm.refusals`, `longspan.integrations.vllm.worker`; for GPUs there is
`longspan.integrations.vllm.runner.start`.
"""

import copy
from collections.abc import Callable
from typing import Any

import vllm.envs as envs
from vllm.platforms import current_platform

from longspan.errors import UnsupportedModelError
from longspan.integrations.vllm.executor import ContextParallelExecutor
from longspan.integrations.vllm.refusals import check_arguments, check_config, check_version, refuse
from longspan.integrations.vllm.runner_choice import V1Config, choosing_v1_runner
from longspan.integrations.vllm.stored import STORED_AS

WORKER = "longspan.integrations.vllm.worker.Worker"


def create_cpu_config(original: Callable[..., Any], arguments: Any, *args: Any, **kwargs: Any) -> Any:
    """Return vLLM's configuration with our executor and worker.

    Args:
        original: vLLM's `EngineArgs.create_engine_config`.
        arguments: vLLM's arguments, as the user gave them.
        args: see vLLM.
        kwargs: see vLLM.

    Raises:
        ConfigError: an option cannot be honoured.
        UnsupportedModelError: the model is not supported.
    """
    check_version()
    check_platform(current_platform.device_type)
    check_arguments(arguments)
    ours = copy.copy(arguments)
    ours.worker_cls, ours.distributed_executor_backend = WORKER, ContextParallelExecutor
    with choosing_v1_runner():
        config = original(ours, *args, **kwargs)
    config.__class__ = V1Config
    check_config(config, STORED_AS.keys(), has_lora=True, has_text_parts=True)
    check_lora(config)
    return config


def check_lora(config: Any) -> None:
    """Refuse adapters that were never compared with merged weights.

    Raises:
        ConfigError: names the option.
        UnsupportedModelError: the model is a mixture of experts.
    """
    if config.lora_config is None:
        return
    if config.lora_config.fully_sharded_loras:
        refuse("fully_sharded_loras", True, "false")
    if config.model_config.is_moe:
        raise UnsupportedModelError(
            f"model: {config.model_config.model} has experts, legal with enable_lora are others"
        )


def check_platform(device_type: str) -> None:
    """Refuse devices other than CPUs, and vLLM's V2 model runner.

    Args:
        device_type: vLLM's name of the platform's devices.

    Raises:
        ConfigError: names the device, and what a user of GPUs does.
    """
    if device_type != "cpu":
        refuse("device", device_type, "cpu; GPUs need --prefill-context-parallel-size, not context_parallel_size")
    if envs.VLLM_USE_V2_MODEL_RUNNER:
        refuse("VLLM_USE_V2_MODEL_RUNNER", "1", "0, or unset")
