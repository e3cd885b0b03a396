"""vLLM's CPU build, one prompt at a time.

Runs in vLLM's environment. `VLLM_CPU_OMP_THREADS_BIND` comes from whoever starts it.
Read next: `protocol.py`.
"""

import itertools
from typing import Any

from protocol import Stopwatch, serve


def import_all() -> None:
    import vllm.model_executor.models.llama
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401


class VllmEngine:
    """The engine core in a process of its own, as `vllm serve` has it."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        import vllm
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = {"dtype": "float32", "skip_tokenizer_init": True, "disable_log_stats": True, **options}
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._ids = itertools.count()
        config = self._engine.vllm_config
        self.facts = {
            "version": vllm.__version__,
            "torch": torch.__version__,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "compilation": str(config.compilation_config.mode),
            "kv_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
            "kv_bytes_per_rank": config.cache_config.kv_cache_memory_bytes,
        }

    def run(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        stopwatch, token_ids, num_cached = Stopwatch(), [], 0
        self._engine.add_request(str(next(self._ids)), {"prompt_token_ids": prompt}, params)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                for _ in range(len(output.outputs[0].token_ids) - len(token_ids)):
                    stopwatch.token()
                token_ids, num_cached = list(output.outputs[0].token_ids), output.num_cached_tokens
        return stopwatch.answer(token_ids, num_cached or 0)

    def close(self) -> None:
        self._engine.engine_core.shutdown()


if __name__ == "__main__":
    serve(import_all, VllmEngine)
