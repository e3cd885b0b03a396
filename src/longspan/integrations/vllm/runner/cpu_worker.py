"""vLLM's CPU worker with our runner, for tests: V2 kernels are Triton's, which a CPU runs in Triton's interpreter.

Holds what differs from the worker of GPUs. Must not know steps.
Read next: `longspan.integrations.vllm.runner.worker`. For CPUs there is `longspan.integrations.vllm.worker`.
"""

import vllm.v1.worker.cpu.shm  # noqa: F401  it changes torch for CPUs, before anything else of vLLM's workers
from vllm.v1.worker.cpu import model_runner
from vllm.v1.worker.cpu_worker import CPUWorker

from longspan.integrations.vllm.runner.runner import OwnerRunner
from longspan.integrations.vllm.runner.worker import OwnerWorker


class OwnerCPURunner(OwnerRunner, model_runner.CPUModelRunner):
    """Our runner, with what vLLM's runner of CPUs adds."""


class OwnerCPUWorker(OwnerWorker, CPUWorker):
    """The process of one (pcp_rank, tp_rank) on a CPU."""

    def init_device(self) -> None:
        """Start as vLLM's worker does, which has no place to choose a runner: ours is put in the place of its own."""
        original = model_runner.CPUModelRunner
        model_runner.CPUModelRunner = OwnerCPURunner
        try:
            super().init_device()
        finally:
            model_runner.CPUModelRunner = original
