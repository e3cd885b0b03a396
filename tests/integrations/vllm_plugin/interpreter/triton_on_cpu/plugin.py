"""A vLLM plugin of the tests: what V2 needs on CPUs beside Triton's interpreter.

Asynchronous scheduling, where LONGSPAN_TEST_ASYNC is set: vLLM's CPU platform turns it off in every process that looks
at the configuration. And masks with a part that is a scalar, as vLLM's kernel of grammars has: the interpreter makes
integers of them, and then refuses to store by them.
"""

import functools
import os


def register():
    _store_by_masks_of_integers()
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


def _store_by_masks_of_integers():
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_masked_store
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def create_masked_store(self, ptrs, value, mask, cache_policy):
        mask.data = mask.data.astype(bool)
        return original(self, ptrs, value, mask, cache_policy)

    InterpreterBuilder.create_masked_store = create_masked_store
