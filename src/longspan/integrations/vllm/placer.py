"""Ranks of the blocks of all requests, the same in every block table of a request.

Holds what is known of each request's prompt and placement. Must not know vLLM, or which blocks are free.
Read next: `longspan.integrations.vllm.placement`, which places one request; `longspan.integrations.vllm.spec`.

Note [Several block tables]
    A token is computed where it is stored, in all layers: so block i of a request must be on one rank in all of its
    tables. vLLM allocates for one table after the other; the first that asks for some blocks gets their ranks chosen,
    and the others get the same. A rank is chosen only if it has room for the block of every table.

    vLLM admits a request by the number of free blocks, whichever rank they are on. With G tables and N ranks there is a
    rank with G free blocks as long as more than N * (G - 1) are free. So each table's manager asks for N blocks more
    than it takes (`spare_blocks` in `longspan.integrations.vllm.spec`).
"""

from collections.abc import Sequence

from longspan.integrations.vllm.placement import RequestPlacement, Striping, choose_home


class BlockPlacer:
    """Chooses ranks; shared by the managers of all block tables."""

    def __init__(self, striping: Striping) -> None:
        self._striping = striping
        self.num_ranks = striping.geometry.num_ranks
        self.num_tables = 0
        """Block tables of a request; every manager counts itself."""
        self._prompt_blocks: dict[str, int] = {}
        self._placements: dict[str, RequestPlacement] = {}
        self._chosen: dict[str, tuple[range, list[int]]] = {}  # the newest blocks of each request

    def expect(self, request_id: str, num_blocks: int) -> None:
        """Take note of a prompt's length, before it is placed; of several, the longest counts."""
        if request_id not in self._placements:
            self._prompt_blocks[request_id] = max(num_blocks, self._prompt_blocks.get(request_id, 0))

    def ranks(self, request_id: str, blocks: range, room: Sequence[int], last_rank: int | None) -> list[int]:
        """Return the ranks of a request's next blocks.

        Args:
            request_id: the request.
            blocks: indices of the blocks in a block table.
            room: free blocks per rank; of all tables together there are enough for these blocks.
            last_rank: rank of the last block before these, or None.
        """
        if request_id in self._chosen and self._chosen[request_id][0] == blocks:
            return self._chosen[request_id][1]
        left = [count // self.num_tables for count in room]
        placement = self._placements.get(request_id) or self._place(request_id, blocks, left, last_rank)
        chosen: list[int] = []
        for block_idx in blocks:
            rank = placement.rank_of(block_idx)
            if not left[rank]:
                rank = max(range(len(left)), key=left.__getitem__)
            left[rank] -= 1
            assert left[rank] >= 0, "there is room for every table's block"
            chosen.append(rank)
        self._chosen[request_id] = (blocks, chosen)
        return chosen

    def _place(self, request_id: str, blocks: range, room: Sequence[int], last_rank: int | None) -> RequestPlacement:
        prompt_blocks = max(self._prompt_blocks.pop(request_id, 0), blocks.stop)
        home = choose_home(room, last_rank, prompt_blocks - blocks.start)
        placement = RequestPlacement(self._striping, prompt_blocks, blocks.start, room, home)
        self._placements[request_id] = placement
        return placement

    def forget(self, request_id: str) -> None:
        """Drop a request, which has lost its blocks."""
        for known in (self._placements, self._prompt_blocks, self._chosen):
            known.pop(request_id, None)
