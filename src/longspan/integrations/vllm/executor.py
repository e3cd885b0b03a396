"""Executor that starts cp x tp worker processes.

Holds what differs from vLLM's own executor: the number of processes, which of them answers, and when. Must not
know models or plans.
Read next: `longspan.integrations.vllm.worker`.

Note [Ranks]
    Process `cp_rank * tp_size + tp_rank`. vLLM makes tensor parallel groups of `tp_size` consecutive processes; the
    processes with equal `tp_rank` are a cp_group. The first process samples, and answers for all.
"""

from concurrent.futures import Future
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from longspan.integrations.vllm.options import parse_options

NOBODY = -1
"""Output rank of a call that no process answers."""


class ContextParallelExecutor(MultiprocExecutor):
    """vLLM's executor of processes, with one process per (cp_rank, tp_rank)."""

    def _get_parallel_sizes(self) -> tuple[int, int, int]:
        config = self.parallel_config
        options = parse_options(self.vllm_config.additional_config)
        assert options is not None, "the plugin selects this executor only with its options"
        # vLLM reads it here when it starts a worker, and the worker does too.
        config.world_size = options.context_parallel_size * config.tensor_parallel_size
        self.world_size, self.local_world_size = config.world_size, config.local_world_size
        return config.tensor_parallel_size, 1, options.context_parallel_size

    def _is_driver_worker(self, rank: int) -> bool:
        return bool(rank % self.parallel_config.tensor_parallel_size == 0)

    def _get_output_rank(self) -> int:
        return 0

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Let the processes begin a step, without an answer: `sample_tokens`, which vLLM calls next, has it."""
        if not scheduler_output.total_num_scheduled_tokens:
            return super().execute_model(scheduler_output, non_block)  # nothing is sampled
        if self.is_failed:
            raise RuntimeError("Executor failed.")
        assert self.rpc_broadcast_mq is not None
        self.rpc_broadcast_mq.enqueue(("begin_step", (scheduler_output,), {}, NOBODY))
        begun: Future[None] = Future()
        begun.set_result(None)
        return begun if non_block else None
