"""Entry point of the plugin: only `--additional-config '{"longspan": {...}}'` selects our executor and worker.

Holds the wrapper of `EngineArgs.create_engine_config`. Must stay cheap and harmless: vLLM calls `register` in every
process, also without context parallelism, and under versions of vLLM that we do not support.
Read next: `longspan.integrations.vllm.refusals`, `longspan.integrations.vllm.worker`.
"""

import copy
import functools
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from longspan.integrations.vllm.options import KEY, parse_options

WORKER = "longspan.integrations.vllm.worker.Worker"
_MARK = "_longspan_original"


def register() -> None:
    """Wrap `EngineArgs.create_engine_config`. May be called any number of times."""
    original = EngineArgs.create_engine_config
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        if self.prefill_context_parallel_size > 1 and KEY in (self.additional_config or {}):
            from longspan.integrations.vllm.runner.start import create_owner_config

            return create_owner_config(original, self, *args, **kwargs)
        options = parse_options(self.additional_config or {})
        if options is None:
            return original(self, *args, **kwargs)
        from longspan.integrations.vllm.refusals import check_arguments, check_config, check_platform, check_version
        from longspan.integrations.vllm.runner_choice import V1Config, choosing_v1_runner

        check_version()
        check_platform(current_platform.device_type)
        check_arguments(self)
        ours = copy.copy(self)
        ours.worker_cls, ours.distributed_executor_backend = WORKER, _executor()
        with choosing_v1_runner():
            config = original(ours, *args, **kwargs)
        config.__class__ = V1Config
        check_config(config)
        return config

    setattr(create_engine_config, _MARK, original)
    EngineArgs.create_engine_config = create_engine_config


def _executor() -> type:
    """Return our executor as a class: vLLM reads its attributes."""
    from longspan.integrations.vllm.executor import ContextParallelExecutor

    return ContextParallelExecutor
