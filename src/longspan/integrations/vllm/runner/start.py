"""How vLLM's `--prefill-context-parallel-size N` comes to our worker.

Holds the changes of vLLM's arguments. Must not know how a worker runs.
Read next: `longspan.integrations.vllm.runner.checks`, `longspan.integrations.vllm.runner.worker`.
"""

import copy
from collections.abc import Callable
from typing import Any

from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from longspan.integrations.vllm import refusals
from longspan.integrations.vllm.runner.checks import check_arguments, check_config, check_platform
from longspan.integrations.vllm.runner.options import parse_runner_options

PACKAGE = __name__.rpartition(".")[0]
WORKERS = {"cuda": f"{PACKAGE}.worker.OwnerWorker", "cpu": f"{PACKAGE}.cpu_worker.OwnerCPUWorker"}
"""Our worker by the platform's device type."""


def create_owner_config(original: Callable[..., Any], arguments: Any, *args: Any, **kwargs: Any) -> Any:
    """Return vLLM's configuration with our worker and attention.

    Args:
        original: vLLM's `EngineArgs.create_engine_config`.
        arguments: vLLM's arguments, as the user gave them; prefill_context_parallel_size is more than 1.
        args: see vLLM.
        kwargs: see vLLM.

    Raises:
        ConfigError: an option cannot be honoured.
        UnsupportedModelError: the model is not supported.
    """
    device_type = current_platform.device_type
    refusals.check_version()
    check_platform(device_type, HAS_TRITON)
    parse_runner_options(arguments.additional_config, arguments.prefill_context_parallel_size)
    refusals.check_arguments(arguments)
    check_arguments(arguments)
    ours = copy.copy(arguments)
    ours.worker_cls, ours.distributed_executor_backend = WORKERS[device_type], "mp"
    if device_type == "cuda":
        ours.attention_backend = AttentionBackendEnum.CUSTOM
    config = original(ours, *args, **kwargs)
    refusals.check_config(config)
    check_config(config)
    return config
