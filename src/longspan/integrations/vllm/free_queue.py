"""Free blocks of vLLM's scheduler, one queue per rank.

Holds the queue. Must not know requests, or which ranks are chosen.
Read next: `longspan.integrations.vllm.spec`, which puts it into vLLM's block pool; `longspan.integrations.vllm.placer`.
"""

from collections.abc import Iterable, Sequence

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from longspan.integrations.vllm.placement import block_rank
from longspan.integrations.vllm.placer import BlockPlacer


class RankedFreeQueue:
    """vLLM's queue of free blocks, with one queue per rank behind it."""

    def __init__(self, free: Sequence[KVCacheBlock], num_blocks: int, placer: BlockPlacer) -> None:
        """Divide the free blocks among the ranks.

        Args:
            free: free blocks, in the order of eviction.
            num_blocks: number of all blocks.
            placer: chooses ranks, for all managers that take blocks from this queue.
        """
        self.placer = placer
        self._num_blocks, self._num_ranks = num_blocks, placer.num_ranks
        self._queues = [
            FreeKVCacheBlockQueue([b for b in free if self.rank_of(b) == rank]) for rank in range(self._num_ranks)
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
