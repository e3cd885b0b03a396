"""Choice of the rank of every block of a request, made when the first block is allocated.

Holds arithmetic on block numbers. Must not know vLLM.
Read next: `longspan.integrations.vllm.spec`, which uses it; `longspan.sharding.geometry`, where stripes come from.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from longspan.integrations.vllm.options import Options
from longspan.sharding.geometry import StepGeometry
from longspan.sharding.placement import snake_rank


@dataclass(frozen=True)
class Striping:
    """Sizes of the stripes that long prompts are cut into, and the prompts that are long."""

    geometry: StepGeometry
    """Sizes of steps, whose pages are vLLM's blocks."""
    min_striped_blocks: int
    """Requests with fewer blocks of prompt are packed where one rank has room; 0 packs none."""


def block_rank(block_id: int, num_blocks: int, num_ranks: int) -> tuple[int, int]:
    """Return (rank, slot) of a global block id: every rank has a contiguous range of ids, the same number of each."""
    per_rank = -(-num_blocks // num_ranks)
    return divmod(block_id, per_rank)


class RequestPlacement:
    """Wanted rank of every block of one request."""

    def __init__(self, striping: Striping, num_prompt_blocks: int, first_block: int, room: Sequence[int], home: int):
        """Choose packed or striped.

        Args:
            striping: stripe sizes of the engine.
            num_prompt_blocks: blocks of the prompt, those found in the prefix cache included.
            first_block: blocks found in the prefix cache.
            room: free blocks per rank.
            home: rank that a packed request fills, and where stripes start.
        """
        self._geometry, self._home, self._first = striping.geometry, home, first_block
        new_blocks = max(0, num_prompt_blocks - first_block)
        is_short = num_prompt_blocks < striping.min_striped_blocks
        self.is_packed = striping.geometry.num_ranks == 1 or (is_short and new_blocks < room[home])
        self._ends: list[int] = []  # ends of the prompt's stripes, in blocks after the cached ones
        if not self.is_packed:
            self._ends = list(accumulate(striping.geometry.stripes(new_blocks)))

    def rank_of(self, block_idx: int) -> int:
        """Return the rank where a block should lie; if that is full, `RankedFreeQueue` takes the one with most room."""
        if self.is_packed:
            return self._home
        offset = block_idx - self._first
        if self._ends and offset < self._ends[-1]:
            stripe = bisect_right(self._ends, offset)
        else:
            past = offset - (self._ends[-1] if self._ends else 0)
            stripe = len(self._ends) + past // self._geometry.stripe_pages
        return snake_rank(stripe, self._home, self._geometry.num_ranks)


def choose_home(room: Sequence[int], last_rank: int | None, needed: int) -> int:
    """Return the rank to start on: that of the last cached block if it has room, else the one with most room.

    Rank 0 is taken even if another rank has one block more: vLLM's null block lies on it, and it samples, so that a
    lone request on it has nothing to exchange.

    Args:
        room: free blocks per rank.
        last_rank: rank of the last block found in the prefix cache, or None.
        needed: blocks that the prompt still needs.
    """
    if last_rank is not None and room[last_rank] > needed:
        return last_rank
    return max(range(len(room)), key=lambda rank: (room[rank] + (rank == 0), -rank))


def striping_of(options: Options, block_size: int, max_num_batched_tokens: int) -> Striping:
    """Return how prompts are cut.

    Args:
        options: the user's.
        block_size: tokens per block.
        max_num_batched_tokens: most tokens of one step on all ranks together.
    """
    shortest = {"packed": 2**31 - 1, "striped": 0, "auto": options.min_striped_len}[options.placement]
    geometry = StepGeometry.of_step_budget(
        options.context_parallel_size, block_size, options.stripe_size, max_num_batched_tokens
    )
    return Striping(geometry, min_striped_blocks=-(-shortest // block_size))
