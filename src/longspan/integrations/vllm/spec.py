"""Choice of blocks in vLLM's scheduler: managers that name a rank for every new block.

Holds KV cache specs and their managers. Runs in the engine core, which imports this module when it unpickles a worker's
specs; that registers the managers. Must not know models or tensors.
Read next: `longspan.integrations.vllm.placer`, which chooses ranks; `longspan.integrations.vllm.free_queue`.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
    replace_as,
)
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from longspan.integrations.vllm.free_queue import RankedFreeQueue
from longspan.integrations.vllm.placement import Striping
from longspan.integrations.vllm.placer import BlockPlacer


class _Placing(SingleTypeKVCacheManager):
    """Part of a manager that chooses the rank of every new block."""

    def __init__(self, kv_cache_spec: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        assert kv_cache_spec.striping is not None
        pool = self.block_pool
        if not isinstance(pool.free_block_queue, RankedFreeQueue):
            free = pool.free_block_queue.get_all_free_blocks()
            pool.free_block_queue = RankedFreeQueue(free, pool.num_gpu_blocks, BlockPlacer(kv_cache_spec.striping))
        self._queue: RankedFreeQueue = pool.free_block_queue
        self._placer = self._queue.placer
        self._placer.num_tables += 1

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, prefill_end: int = 0, **kwargs: Any
    ) -> int:
        # The longest that any call names: vLLM asks for the whole prompt first (scheduler_reserve_full_isl), then
        # for a chunk, and names prefill_end only where prefix_cache_retention_interval is 0.
        self._placer.expect(request_id, -(-max(prefill_end, num_tokens) // self.block_size))
        found: int = super().get_num_blocks_to_allocate(
            request_id, num_tokens, *args, prefill_end=prefill_end, **kwargs
        )
        return found + self.kv_cache_spec.spare_blocks if found else 0

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[request_id]
        new = range(len(blocks), -(-num_tokens // self.block_size))
        if new:
            last_rank = None if not blocks or blocks[-1].is_null else self._queue.rank_of(blocks[-1])
            self._queue.want(self._placer.ranks(request_id, new, self._queue.room, last_rank))
        found: list[KVCacheBlock] = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        self._queue.want([])
        return found

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._placer.forget(request_id)
        found: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return found


class PlacingManager(_Placing, FullAttentionManager):
    """vLLM's manager of full attention, which also chooses ranks."""


class PlacingWindowManager(_Placing, SlidingWindowManager):
    """vLLM's manager of sliding windows, which also chooses ranks."""


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """Part of a spec that says how blocks are placed.

    No subclass of vLLM's: its fields would count before those of the spec beside it.
    """

    striping: Striping | None = None
    """Sizes of stripes; the same in all specs of a model."""
    spare_blocks: int = 0
    """Blocks that must be free beside those that are taken. See Note [Several block tables] in
    `longspan.integrations.vllm.placer`."""

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Return the bytes of the longest request, so that vLLM refuses lengths that could never run."""
        found: int = super().max_memory_usage_bytes(vllm_config)  # type: ignore[misc]
        page_bytes: int = self.page_size_bytes  # type: ignore[attr-defined]
        return found + self.spare_blocks * page_bytes

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Merge specs as vLLM does, but keep our fields, which vLLM would drop."""
        first = specs[0]
        assert all(spec.striping == first.striping for spec in specs), "all layers share one striping"
        merged = super().merge(specs)  # type: ignore[misc]
        return replace(merged, striping=first.striping, spare_blocks=first.spare_blocks)


@register_kv_cache_spec(manager_class=PlacingManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class PlacedSpec(_Placed, FullAttentionSpec):
    """Attention whose blocks lie on several ranks, and are kept until the request ends."""


@register_kv_cache_spec(manager_class=PlacingWindowManager, uniform_type_base_spec=SlidingWindowSpec)
@dataclass(frozen=True, kw_only=True)
class PlacedWindowSpec(_Placed, SlidingWindowSpec):
    """Attention with a sliding window: its blocks lie on several ranks, and are freed behind the window."""


def place(spec: KVCacheSpec, striping: Striping, spare_blocks: int, *, is_freed: bool) -> KVCacheSpec:
    """Return a layer's spec with the ranks of its blocks.

    Args:
        spec: vLLM's own.
        striping: sizes of stripes.
        spare_blocks: see `_Placed.spare_blocks`.
        is_freed: whether blocks behind a window are freed; else they are kept, like those of a chunk.
    """
    ours = {"striping": striping, "spare_blocks": spare_blocks}
    if isinstance(spec, SlidingWindowSpec) and is_freed:
        return replace_as(spec, PlacedWindowSpec, **ours)
    names = {"sliding_window", "extra_retained_tokens", "attention_chunk_size"}
    return replace_as(spec, PlacedSpec, drop=names & {field.name for field in fields(spec)}, **ours)
