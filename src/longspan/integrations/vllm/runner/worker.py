"""vLLM's GPU worker with our runner: KV memory of all ranks, blocks with an owner.

Holds what differs from vLLM's worker. Must not know steps.
Read next: `longspan.integrations.vllm.runner.runner`; `longspan.integrations.vllm.spec`, which this makes vLLM's
scheduler use.
"""

from dataclasses import fields
from typing import Any

from vllm.distributed.parallel_state import get_pcp_group
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu_worker import Worker

from longspan.errors import UnsupportedModelError
from longspan.integrations.vllm.options import KEY
from longspan.integrations.vllm.placement import Striping, striping_of
from longspan.integrations.vllm.plain_attention import attention_layers
from longspan.integrations.vllm.runner.backend import install_backend
from longspan.integrations.vllm.runner.messages import warm_up
from longspan.integrations.vllm.runner.options import parse_runner_options
from longspan.integrations.vllm.runner.runner import OwnerRunner
from longspan.integrations.vllm.runner.step import exchanged_bytes
from longspan.integrations.vllm.spec import PlacedSpec


class OwnerWorker(Worker):
    """The process of one (pcp_rank, tp_rank) on a GPU."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        install_backend(vllm_config.device_config.device_type)
        super().__init__(vllm_config, *args, **kwargs)

    def _make_model_runner(self) -> OwnerRunner:
        """Return our runner; vLLM's worker leaves this to its subclasses."""
        return OwnerRunner(self.vllm_config, self.device)

    def get_kv_cache_spec(self) -> dict[str, PlacedSpec]:
        """Return what vLLM's block manager must know of every layer.

        Raises:
            UnsupportedModelError: a layer is not plain full attention.
        """
        attention_layers(self.vllm_config.compilation_config.static_forward_context)
        num_ranks = self.parallel_config.prefill_context_parallel_size
        options = parse_runner_options(self.vllm_config.additional_config, num_ranks)
        budget = self.scheduler_config.max_num_batched_tokens
        striping = striping_of(options, self.cache_config.block_size, budget)
        return {name: placed_spec(name, spec, striping) for name, spec in super().get_kv_cache_spec().items()}

    def determine_available_memory(self) -> int:
        """Return the KV bytes of all ranks together, as far as this one knows; vLLM takes the least of all answers.

        vLLM measures a step without attention. What the exchanges of a step hold at most is left free, unless the user
        names the bytes of the KV cache.

        Collective: every process, once.
        """
        warm_up(get_pcp_group().device_group, self.device)  # the buffers of these exchanges are in what vLLM measures
        num_bytes: int = super().determine_available_memory()
        num_ranks: int = self.parallel_config.prefill_context_parallel_size
        if self.cache_config.kv_cache_memory_bytes is None:
            layers = attention_layers(self.vllm_config.compilation_config.static_forward_context)
            row_bytes = max(layer.impl.num_heads * layer.impl.head_size for layer in layers.values())
            row_bytes *= self.model_config.dtype.itemsize
            num_bytes -= exchanged_bytes(num_ranks, self.scheduler_config.max_num_batched_tokens, row_bytes)
        return max(0, num_bytes) * num_ranks


def placed_spec(name: str, spec: Any, striping: Striping) -> PlacedSpec:
    """Return vLLM's spec of a layer with a choice of ranks.

    Raises:
        UnsupportedModelError: the layer is not plain full attention.
    """
    is_plain = type(spec) is FullAttentionSpec and not spec.non_causal
    if not is_plain or spec.sliding_window is not None or spec.attention_chunk_size is not None:
        raise UnsupportedModelError(
            f"model: layer {name} needs {spec}, legal with {KEY} and prefill_context_parallel_size is full attention"
        )
    own = {field.name: getattr(spec, field.name) for field in fields(spec) if field.init}
    return PlacedSpec(**{**own, "dcp_sharded": False}, striping=striping)
