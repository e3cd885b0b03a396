"""Pages in the host memory of one rank, as the rank has them.

Holds names and their order of use. Must not know tensors, or when pages move.
Read next: `longspan.scheduler.tiers`, which decides; `longspan.worker.page_mover`, which has the bytes.

The driver says what a rank keeps and drops, in one order with all else that it is told, so this is exact.
"""

from collections.abc import Sequence

from longspan.kv.page_directory import PageKey


class HostPages:
    """Pages of one rank, those used longest ago first."""

    def __init__(self, capacity: int, page_bytes: Sequence[int]) -> None:
        """Begin without pages.

        Args:
            capacity: bytes that they may take.
            page_bytes: bytes of a page per pool.
        """
        self._capacity, self._page_bytes = capacity, page_bytes
        self._pages: dict[PageKey, None] = {}
        self.num_bytes = 0
        """Bytes of all pages."""

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, key: PageKey) -> bool:
        return key in self._pages

    def fits(self, pool_idx: int) -> bool:
        """Whether a page of a pool fits at all."""
        return self._page_bytes[pool_idx] <= self._capacity

    def put(self, key: PageKey) -> list[PageKey]:
        """Add a page that is not there; return those that go for it."""
        assert key not in self._pages, "a page is kept twice"
        self._pages[key] = None
        self.num_bytes += self._page_bytes[key.pool_idx]
        gone: list[PageKey] = []
        while self.num_bytes > self._capacity:
            oldest = next(iter(self._pages))
            self.drop(oldest)
            gone.append(oldest)
        return gone

    def drop(self, key: PageKey) -> bool:
        """Drop a page; return whether it was there."""
        if key not in self._pages:
            return False
        del self._pages[key]
        self.num_bytes -= self._page_bytes[key.pool_idx]
        return True

    def touch(self, key: PageKey) -> None:
        """Take down that a page is used now, if it is there."""
        if key in self._pages:
            del self._pages[key]
            self._pages[key] = None

    def clear(self) -> None:
        """Drop all pages."""
        self._pages.clear()
        self.num_bytes = 0
