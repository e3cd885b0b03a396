"""vLLM's V2 model runner, in which every rank computes the tokens that it stores.

Holds what differs from vLLM's: blocks of this rank, the rows of a step, kernels. Must not know how a worker starts.
Read next: `longspan.integrations.vllm.runner.manager`; `docs/decisions/0039-vllm-v2-runner.md`.
"""

from dataclasses import replace
from typing import Any

import torch
from vllm.distributed.parallel_state import get_pcp_group
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from longspan.errors import UnsupportedModelError
from longspan.integrations.vllm.plain_attention import attention_layers
from longspan.integrations.vllm.runner.blocks import RequestBlocks
from longspan.integrations.vllm.runner.kernels import Kernels, TorchKernels
from longspan.integrations.vllm.runner.manager import OwnerManager
from longspan.integrations.vllm.runner.rows import Scheduled


class OwnerRunner(GPUModelRunner):
    """The runner of one rank. vLLM's own tables hold this rank's blocks only; `RequestBlocks` knows those of all."""

    @property
    def pcp_manager_cls(self) -> type[OwnerManager]:
        return OwnerManager

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        """Allocate this rank's share.

        Args:
            kv_cache_config: vLLM's, with the blocks of all ranks.
            args: see vLLM.
            kwargs: see vLLM.

        Raises:
            UnsupportedModelError: layers do not share one table of blocks, or kernels have blocks of another size.
        """
        group = get_pcp_group()
        if len(kv_cache_config.kv_cache_groups) != 1 or len(kv_cache_config.kv_cache_tensors) != 1:
            raise UnsupportedModelError("model: its layers differ in what they cache, which longspan does not support")
        block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        local = local_kv_cache_config(kv_cache_config, group.world_size)
        super().initialize_kv_cache(local, *args, **kwargs)
        if self.kernel_block_sizes != [block_size]:
            raise UnsupportedModelError(
                f"block_size: got {block_size}, legal with longspan is what the kernel takes, {self.kernel_block_sizes}"
            )
        self._blocks = RequestBlocks(kv_cache_config.num_blocks, group.world_size, group.rank_in_group, block_size)
        for groups in self.attn_groups:
            for attn_group in groups:
                attn_group.get_metadata_builder(0).manager = self.pcp_manager
        for layer in attention_layers(self.compilation_config.static_forward_context).values():
            layer.impl.kernels = make_kernels(layer.impl, self.device)
            warm_up_merge(layer.impl, group.world_size, self.dtype, self.device)

    def finish_requests(self, scheduler_output: Any) -> None:
        self._blocks.forget(scheduler_output)
        super().finish_requests(scheduler_output)

    def add_requests(self, scheduler_output: Any) -> None:
        super().add_requests(self._blocks.add(scheduler_output))

    def update_requests(self, scheduler_output: Any) -> None:
        super().update_requests(self._blocks.extend(scheduler_output))

    def gather_batch_req_state(self, scheduler_output: Any, dummy_run: bool) -> Any:
        """Say what the step computes before vLLM asks the manager for rows; the same numbers on every rank."""
        state, uniform_len = super().gather_batch_req_state(scheduler_output, dummy_run)
        if state is not None:
            starts = self.req_states.num_computed_tokens_np[state.idx_mapping_np].tolist()
            self.pcp_manager.begin(
                [
                    Scheduled(self._blocks[req_id], row, start, num_tokens, is_prefilling)
                    for req_id, row, start, num_tokens, is_prefilling in zip(
                        state.req_ids,
                        state.idx_mapping_np.tolist(),
                        starts,
                        state.num_scheduled_tokens.tolist(),
                        state.is_prefilling_np.tolist(),
                        strict=True,
                    )
                ]
            )
        return state, uniform_len


def local_kv_cache_config(config: Any, num_ranks: int) -> Any:
    """Return vLLM's KVCacheConfig with one rank's share of the blocks.

    Args:
        config: the blocks of all ranks; one KV cache group, laid out as one tensor.
        num_ranks: ranks that share them.
    """
    num_blocks = -(-config.num_blocks // num_ranks)
    (tensor,) = config.kv_cache_tensors

    def share(num_bytes: int) -> int:
        assert num_bytes % config.num_blocks == 0, "every block has the same bytes"
        return int(num_bytes // config.num_blocks * num_blocks)

    is_layer_outermost = tensor.layer_stride > tensor.block_stride
    local = replace(
        tensor,
        size=share(tensor.size),
        layer_stride=share(tensor.layer_stride) if is_layer_outermost else tensor.layer_stride,
    )
    return replace(config, num_blocks=num_blocks, kv_cache_tensors=[local])


def make_kernels(impl: Any, device: torch.device) -> Kernels:
    """Make the kernels of one layer for a device.

    Raises:
        UnsupportedModelError: vLLM has no FlashAttention for the layer on this GPU.
    """
    if device.type == "cpu":
        return TorchKernels()
    from longspan.integrations.vllm.runner.flash import make_flash_kernels

    return make_flash_kernels(impl.head_size, impl.params.softcap is not None, device)


def warm_up_merge(impl: Any, num_ranks: int, dtype: torch.dtype, device: torch.device) -> None:
    """Run the only kernel that vLLM's own warm-up does not reach, and that is compiled when it first runs."""
    parts = torch.zeros(num_ranks, 1, impl.num_heads, impl.head_size, dtype=dtype, device=device)
    lses = torch.zeros(parts.shape[:-1], dtype=torch.float32, device=device)
    impl.kernels.merge(parts, lses, torch.empty_like(parts[0]))
