"""A vLLM plugin of the tests: asynchronous scheduling on CPUs, where LONGSPAN_TEST_ASYNC is set.

vLLM's CPU platform turns it off in every process that looks at the configuration.
"""

import functools
import os


def register():
    if "LONGSPAN_TEST_ASYNC" not in os.environ:
        return
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def check_and_update_config(cls, vllm_config):
        wanted = vllm_config.scheduler_config.async_scheduling
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
