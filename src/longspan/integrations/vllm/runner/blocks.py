"""Blocks of every request, as vLLM's scheduler gives them out: the rank of each, and those of this rank.

Holds a mirror of vLLM's block ids, the same on every rank. Must not know tensors, or what a step computes.
Read next: `longspan.integrations.vllm.placement`, which numbers blocks; `longspan.integrations.vllm.spec`, which
chooses their ranks.
"""

import copy
from collections.abc import Sequence
from typing import Any

from longspan.errors import LongspanError
from longspan.integrations.vllm.placement import block_rank
from longspan.sharding.pages import PageTable


class RequestBlocks:
    """Page tables of all requests. vLLM is left with the blocks of this rank, under the ids that they have here."""

    def __init__(self, num_blocks: int, num_ranks: int, rank: int, block_size: int) -> None:
        """Start without requests.

        Args:
            num_blocks: blocks of all ranks, as vLLM's scheduler counts them.
            num_ranks: ranks that share them.
            rank: this rank.
            block_size: tokens per block.
        """
        self._num_blocks, self._num_ranks, self._rank, self._block_size = num_blocks, num_ranks, rank, block_size
        self._tables: dict[str, PageTable] = {}

    def __getitem__(self, req_id: str) -> PageTable:
        """Return the page table of a request."""
        return self._tables[req_id]

    def __len__(self) -> int:
        return len(self._tables)

    def forget(self, step: Any) -> None:
        """Drop the requests that a SchedulerOutput says are finished or preempted."""
        for req_id in [*step.finished_req_ids, *(step.preempted_req_ids or ())]:
            self._tables.pop(req_id, None)

    def add(self, step: Any) -> Any:
        """Take in the new requests of a SchedulerOutput, and those that vLLM resumes by sending them as new.

        Returns:
            The SchedulerOutput with this rank's blocks only; the argument is not changed.
        """
        local = copy.copy(step)
        local.scheduled_new_reqs = []
        for new in step.scheduled_new_reqs:
            self._tables[new.req_id] = PageTable(self._block_size)
            mine = copy.copy(new)
            mine.block_ids = self._append(new.req_id, new.block_ids)
            local.scheduled_new_reqs.append(mine)
        return local

    def extend(self, step: Any) -> Any:
        """Take in the blocks that a SchedulerOutput adds to running requests.

        Returns:
            The SchedulerOutput with this rank's blocks only; the argument is not changed.

        Raises:
            LongspanError: the step asks for something that is refused at start.
        """
        for name in ("kv_cache_block_copies", "new_block_ids_to_zero", "scheduled_spec_decode_tokens"):
            if getattr(step, name):
                raise LongspanError(f"{name}: vLLM's scheduler asks for it, and longspan does not support it")
        cached = step.scheduled_cached_reqs
        if cached.resumed_req_ids:
            raise LongspanError("vLLM resumes a request by its id, which its V2 model runner does not do")
        local = copy.copy(step)
        local.scheduled_cached_reqs = mine = copy.copy(cached)
        mine.new_block_ids = [
            blocks if blocks is None else self._append(req_id, blocks)
            for req_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True)
        ]
        return local

    def _append(self, req_id: str, block_ids: Sequence[Sequence[int]]) -> tuple[list[int]]:
        """Append blocks to a request's table; return the ids that this rank's have here."""
        (ids,) = block_ids  # one KV cache group
        table, mine = self._tables[req_id], []
        for block_id in ids:
            rank, slot = block_rank(block_id, self._num_blocks, self._num_ranks)
            table.append(rank, slot, 1)
            if rank == self._rank:
                mine.append(slot)
        return (mine,)
