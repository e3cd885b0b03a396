"""Entry point of the plugin: only `--additional-config '{"longspan": {...}}'` selects one of our workers.

Holds the wrapper of `EngineArgs.create_engine_config`. Must stay cheap and harmless: vLLM calls `register` in every
process, also without context parallelism, and under versions of vLLM that we do not support.
Read next: `longspan.integrations.vllm.start`; with vLLM's prefill_context_parallel_size,
`longspan.integrations.vllm.runner.start`.
"""

import functools
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from longspan.integrations.vllm.options import KEY, parse_options

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
        if parse_options(self.additional_config or {}) is None:
            return original(self, *args, **kwargs)
        from longspan.integrations.vllm.start import create_cpu_config

        return create_cpu_config(original, self, *args, **kwargs)

    setattr(create_engine_config, _MARK, original)
    EngineArgs.create_engine_config = create_engine_config
