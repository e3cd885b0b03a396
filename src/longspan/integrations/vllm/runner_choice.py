"""Choice of vLLM's V1 model runner for one engine.

Holds a class of configurations, and what vLLM reads while it makes one. Must not know options of the plugin.
Read next: `longspan.integrations.vllm.plugin`, which uses both.

Note [Which runner]
    Our worker supports what vLLM's V1 runner does, and vLLM itself refuses, at start and per request, what only its V2
    runner supports, if its configuration says V1. Users choose by an environment variable, which holds for a process.
    An engine without context parallelism in the same process shall not notice, so the variable is set only while a
    configuration is made; from then on the configuration's class says V1, in all processes that it is sent to.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from vllm.config import VllmConfig

VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"


class V1Config(VllmConfig):
    """vLLM's configuration of an engine that uses the V1 runner. See Note [Which runner]."""

    @property
    def use_v2_model_runner(self) -> bool:
        return False


@contextmanager
def choosing_v1_runner() -> Iterator[None]:
    """Let vLLM choose the V1 runner inside of the block, in this thread and any other that reads the variable."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
