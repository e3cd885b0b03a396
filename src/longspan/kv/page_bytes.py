"""Pages as bytes: copies whole pages of a pool to and from memory of the host.

Holds copies between a pool's tensors and one tensor of bytes. Must not know files, ranks, or which pages are wanted.
Read next: `longspan.kv.pool` and `longspan.kv.state_pool`, the pools; `longspan.worker.page_mover`, which uses this.

A page's bytes are those of its rows in every component, layer by layer, as the pool stores them; a page of a pool of
states is one slot. Ranks, slots and the number of pages in the pool are not in them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class PageBytes:
    """The pages of one pool."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        """Look at a pool's tensors.

        Args:
            parts: [heads, slots, elements] of the pool's memory, every component of every layer.
        """
        self._parts = [part.view(torch.uint8) for part in parts]  # [heads, slots, bytes]
        self.page_bytes = sum(part.shape[0] * part.shape[2] for part in self._parts)
        """Bytes of one page in all layers."""

    def gather(self, slots: Sequence[int]) -> Tensor:
        """Copies of pages, [N, page_bytes] uint8 in memory of the host."""
        index = torch.tensor(slots, dtype=torch.long)
        pages = torch.empty(len(slots), self.page_bytes, dtype=torch.uint8)
        for part, place in zip(self._parts, self._places(pages), strict=True):
            place.copy_(part.index_select(1, index).transpose(0, 1))
        return pages

    def scatter(self, slots: Sequence[int], pages: Tensor) -> None:
        """Write pages [N, page_bytes] uint8 to the slots."""
        index = torch.tensor(slots, dtype=torch.long)
        for part, place in zip(self._parts, self._places(pages), strict=True):
            part.index_copy_(1, index, place.transpose(0, 1))

    def _places(self, pages: Tensor) -> list[Tensor]:
        """Views [N, heads, bytes] of the parts' places in pages [N, page_bytes]."""
        views, start = [], 0
        for part in self._parts:
            heads, size = part.shape[0], part.shape[2]
            views.append(pages[:, start : start + heads * size].view(len(pages), heads, size))
            start += heads * size
        return views
