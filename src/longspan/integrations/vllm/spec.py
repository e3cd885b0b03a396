"""Choice of blocks in vLLM's scheduler: one free queue per rank, and a manager that names the ranks.

Holds a KV cache spec, its manager and the queue. Runs in the engine core, which imports this module when it unpickles a
worker's spec; that registers the manager. Must not know models or tensors.
Read next: `longspan.integrations.vllm.placement`, which chooses ranks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from longspan.integrations.vllm.placement import RequestPlacement, Striping, block_rank, choose_home


class RankedFreeQueue:
    """vLLM's queue of free blocks, with one queue per rank behind it."""

    def __init__(self, free: Sequence[KVCacheBlock], num_blocks: int, num_ranks: int) -> None:
        """Divide the free blocks among the ranks.

        Args:
            free: free blocks, in the order of eviction.
            num_blocks: number of all blocks.
            num_ranks: number of ranks.
        """
        self._num_blocks, self._num_ranks = num_blocks, num_ranks
        self._queues = [
            FreeKVCacheBlockQueue([b for b in free if self.rank_of(b) == rank]) for rank in range(num_ranks)
        ]
        self._wanted: list[int] = []

    def rank_of(self, block: KVCacheBlock) -> int:
        """Return the rank of a block."""
        return block_rank(block.block_id, self._num_blocks, self._num_ranks)[0]

    @property
    def room(self) -> list[int]:
        """Number of free blocks per rank."""
        return [queue.num_free_blocks for queue in self._queues]

    @property
    def num_free_blocks(self) -> int:
        return sum(self.room)

    def want(self, ranks: Sequence[int]) -> None:
        """Set the ranks of the blocks that the next `popleft_n` takes."""
        self._wanted = list(ranks)

    def popleft(self) -> KVCacheBlock:
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """Take the blocks that are free longest on the wanted ranks, or on the rank with most room."""
        assert self.num_free_blocks >= n
        wanted, self._wanted = self._wanted, []
        blocks: list[KVCacheBlock] = []
        for i in range(n):
            rank = wanted[i] if i < len(wanted) else self._roomiest()
            if not self._queues[rank].num_free_blocks:
                rank = self._roomiest()
            blocks.append(self._queues[rank].popleft())
        return blocks

    def _roomiest(self) -> int:
        return max(range(self._num_ranks), key=lambda rank: self._queues[rank].num_free_blocks)

    def remove(self, block: KVCacheBlock) -> None:
        self._queues[self.rank_of(block)].remove(block)

    def append(self, block: KVCacheBlock) -> None:
        self._queues[self.rank_of(block)].append(block)

    def append_n(self, blocks: Iterable[KVCacheBlock]) -> None:
        for block in blocks:
            self.append(block)

    def prepend_n(self, blocks: Iterable[KVCacheBlock]) -> None:
        for rank, mine in self._by_rank(blocks).items():
            self._queues[rank].prepend_n(mine)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        return [block for queue in self._queues for block in queue.get_all_free_blocks()]

    def _by_rank(self, blocks: Iterable[KVCacheBlock]) -> dict[int, list[KVCacheBlock]]:
        found: dict[int, list[KVCacheBlock]] = {}
        for block in blocks:
            found.setdefault(self.rank_of(block), []).append(block)
        return found


class PlacingManager(FullAttentionManager):
    """vLLM's block manager, which also chooses the rank of every new block."""

    def __init__(self, kv_cache_spec: Any, block_pool: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool, *args, **kwargs)
        striping = kv_cache_spec.striping
        assert striping is not None
        self._striping: Striping = striping
        pool = self.block_pool
        if not isinstance(pool.free_block_queue, RankedFreeQueue):
            free = pool.free_block_queue.get_all_free_blocks()
            pool.free_block_queue = RankedFreeQueue(free, pool.num_gpu_blocks, striping.geometry.num_ranks)
        self._queue: RankedFreeQueue = pool.free_block_queue
        self._prompt_blocks: dict[str, int] = {}
        self._placements: dict[str, RequestPlacement] = {}

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, prefill_end: int = 0, **kwargs: Any
    ) -> int:
        if request_id not in self._placements:
            # The longest that any call names: vLLM asks for the whole prompt first (scheduler_reserve_full_isl), then
            # for a chunk, and names prefill_end only where prefix_cache_retention_interval is 0.
            blocks = -(-max(prefill_end, num_tokens) // self.block_size)
            self._prompt_blocks[request_id] = max(blocks, self._prompt_blocks.get(request_id, 0))
        found: int = super().get_num_blocks_to_allocate(
            request_id, num_tokens, *args, prefill_end=prefill_end, **kwargs
        )
        return found

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[request_id]
        num_required = -(-num_tokens // self.block_size)
        if num_required > len(blocks):
            placement = self._placements.get(request_id) or self._place(request_id, blocks, num_required)
            self._queue.want([placement.rank_of(i) for i in range(len(blocks), num_required)])
        found: list[KVCacheBlock] = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        self._queue.want([])
        return found

    def _place(self, request_id: str, cached: Sequence[KVCacheBlock], num_required: int) -> RequestPlacement:
        prompt_blocks = max(self._prompt_blocks.pop(request_id, 0), num_required)
        room = self._queue.room
        last_rank = self._queue.rank_of(cached[-1]) if cached else None
        home = choose_home(room, last_rank, prompt_blocks - len(cached))
        placement = RequestPlacement(self._striping, prompt_blocks, len(cached), room, home)
        self._placements[request_id] = placement
        return placement

    def free(self, request_id: str) -> None:
        self._placements.pop(request_id, None)
        self._prompt_blocks.pop(request_id, None)
        super().free(request_id)


@register_kv_cache_spec(manager_class=PlacingManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class PlacedSpec(FullAttentionSpec):
    """Full attention whose blocks lie on several ranks."""

    striping: Striping | None = None

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Merge specs as vLLM does, but keep `striping`, which vLLM would drop."""
        assert all(spec.striping == specs[0].striping for spec in specs), "all layers share one striping"
        merged = super().merge(specs)
        return replace(merged, striping=specs[0].striping)
