"""Admission and pages: which ranks a request gets, and which slots.

Holds the allocators of all ranks and KV groups, and what running requests have reserved. Must not know steps, torch or
processes.
Read next: `longspan.scheduler.scheduler`.

All pages that a request may ever need are *placed* on ranks and reserved at admission, and *allocated* when a step
first writes them. So a running request never runs out of pages, and what it does not use is never touched.
"""

from collections.abc import Sequence

from longspan.config import EngineConfig
from longspan.errors import CapacityError
from longspan.kvcache.allocator import PageAllocator
from longspan.kvcache.capacity import pool_bytes, window_pages
from longspan.scheduler.request import Request, count_pages, last_kv_position
from longspan.sharding.pages import PageRun, PageTable
from longspan.sharding.placement import chunk_len, place, stripe_lengths
from longspan.types import ModelSpec, Placement


class KVMemory:
    """Pages of all ranks."""

    def __init__(self, model: ModelSpec, config: EngineConfig, num_pages: Sequence[int]) -> None:
        """Args: `num_pages` per KV group, the same on every rank."""
        self.model, self.config = model, config
        self.num_ranks = config.context_parallel_size
        self.allocators = [[PageAllocator(pages) for pages in num_pages] for _ in range(self.num_ranks)]
        """[rank][KV group]"""
        self._reserved = [[0] * len(num_pages) for _ in range(self.num_ranks)]  # [rank][group]
        self._num_pages = tuple(num_pages)
        # The group that limits a request's length: one without a window, if there is one.
        full = [i for i, group in enumerate(model.kv_groups) if group.spec.window is None]
        self._limiting_group = full[0] if full else None

    @property
    def _whole_pages_per_step(self) -> int:
        """Tokens in the whole pages of one rank's token budget; at least one page. No stripe is longer: else a step
        would have work for one rank only."""
        size = self.config.page_size
        return max(size, self.config.max_num_batched_tokens // size * size)

    @property
    def striped_tokens_per_rank(self) -> int:
        """Most tokens per rank and step of a striped prompt, so that chunks end where snake order has come round."""
        budget = self._whole_pages_per_step
        return chunk_len(budget, min(self.config.stripe_size, budget), self.num_ranks) // self.num_ranks

    # -- admission ---------------------------------------------------------------------------------------------------

    def _need(self, group_idx: int, num_pages: int) -> int:
        """Pages to reserve on a rank for a request with `num_pages` of its pages there."""
        window = self.model.kv_groups[group_idx].spec.window
        if window is None:
            return num_pages
        return min(num_pages, window_pages(window, self.config.page_size, self.config.max_num_batched_tokens))

    def _place(
        self, prompt_len: int, end: int, placement: Placement, reserved: Sequence[Sequence[int]]
    ) -> list[tuple[int, int]] | None:
        """Ranks of all pages up to position `end` under a placement, or None when they do not fit."""
        size, num_ranks = self.config.page_size, self.num_ranks
        if self._limiting_group is None:
            free = [self._num_pages[0] - taken[0] for taken in reserved]
            # Windows only: a rank with room for one window and one step holds any length, as pages get freed.
            total = _pages(end, size)
            room = [total if self._need(0, total) <= pages else pages for pages in free]
        else:
            room = [self._num_pages[self._limiting_group] - taken[self._limiting_group] for taken in reserved]
            free = room
        home = max(range(num_ranks), key=lambda rank: (free[rank], -rank))
        stripe_len = min(self.config.stripe_size, self._whole_pages_per_step)
        stripes = stripe_lengths(
            _pages(prompt_len, size),
            stripe_len // size,
            self.striped_tokens_per_rank * num_ranks // size,
            num_ranks,
            _pages(end, size) - _pages(prompt_len, size),
        )
        runs = place(placement, stripes, room, home)
        if runs is None:
            return None
        for rank, pages in enumerate(count_pages(runs, num_ranks)):
            for group_idx, taken in enumerate(reserved[rank]):
                if self._need(group_idx, pages) > self._num_pages[group_idx] - taken:
                    return None
        return runs

    def _choose(self, prompt_len: int, end: int, reserved: Sequence[Sequence[int]]) -> list[tuple[int, int]] | None:
        """By the user's policy, or by ours: packed when short, striped when long or when one rank is too small."""
        forced = self.config.forced_placement
        if forced is not None:
            return self._place(prompt_len, end, forced, reserved)
        # From two whole stripes per rank on, striping balances the work and pays for its exchanges.
        is_short = prompt_len < 2 * self.num_ranks * self.config.stripe_size
        if self.num_ranks == 1 or is_short:
            empty = [[0] * len(self._num_pages)] * self.num_ranks
            packed = self._place(prompt_len, end, Placement.PACKED, reserved)
            if packed is not None or self._place(prompt_len, end, Placement.PACKED, empty) is not None:
                return packed  # it fits one rank, if not now then later
        return self._place(prompt_len, end, Placement.STRIPED, reserved)

    def check_fits(self, prompt_len: int, max_tokens: int) -> None:
        """Refuse a request that would not fit even on empty ranks.

        Raises:
            CapacityError: with what was asked, what fits, and what would make it fit.
        """
        end = prompt_len + max_tokens - 1
        empty = [[0] * len(self._num_pages)] * self.num_ranks
        if self._choose(prompt_len, end, empty) is not None:
            return
        config, size, budget = self.config, self.config.page_size, self.config.max_num_batched_tokens
        is_packed = config.forced_placement is Placement.PACKED
        used_ranks = 1 if is_packed else self.num_ranks
        limit = self._num_pages[self._limiting_group or 0]
        pages = _pages(end, size)
        others = " and placement striped or spill" if is_packed else ""
        ways = [f"context_parallel_size of at least {_pages(pages, limit)}{others}"]
        if is_packed and pages <= limit * self.num_ranks:
            ways = ["placement striped or spill" + (", and another strategy than local") * (config.placement == "auto")]
        needed = pool_bytes(self.model, _pages(pages, used_ranks), size, budget)
        ways.append(f"kv_cache_memory of at least {needed} bytes per rank")
        memory = config.kv_cache_memory or pool_bytes(self.model, limit, size, budget)
        for smaller in (size >> shift for shift in range(1, size.bit_length())):
            if config.stripe_size % smaller:
                continue
            if pool_bytes(self.model, _pages(_pages(end, smaller), used_ranks), smaller, budget) <= memory:
                ways.append(f"page_size {smaller}")
                break
        room = f"{used_ranks} rank{'s' * (used_ranks > 1)} x {limit} page{'s' * (limit > 1)} x {size} tokens"
        raise CapacityError(
            f"prompt + max_tokens: got {prompt_len} + {max_tokens} = {prompt_len + max_tokens} tokens, "
            f"legal is at most {used_ranks * limit * size + 1} ({room}, and one that needs no page); "
            f"what would fit it: {'; or '.join(ways)}"
        )

    def admit(self, request: Request) -> bool:
        """Place a request's pages and reserve them; False when they do not fit now."""
        end = last_kv_position(request.prompt_len, request.params)
        runs = self._choose(request.prompt_len, end, self._reserved)
        if runs is None:
            return False
        request.page_ranks = runs
        request.tables = [PageTable(self.config.page_size) for _ in self.model.kv_groups]
        self._reserve(request, 1)
        return True

    def _reserve(self, request: Request, sign: int) -> None:
        for rank, pages in enumerate(count_pages(request.page_ranks, self.num_ranks)):
            for group_idx in range(len(self._num_pages)):
                self._reserved[rank][group_idx] += sign * self._need(group_idx, pages)

    # -- pages -------------------------------------------------------------------------------------------------------

    def grow(self, request: Request, end: int) -> list[list[PageRun]]:
        """Allocate the pages that positions up to `end` need.

        Returns:
            Per KV group the runs added to the page table.
        """
        size = self.config.page_size
        added: list[list[PageRun]] = []
        for group_idx, table in enumerate(request.tables):
            new: list[PageRun] = []
            for rank, first, last in list(request.ranks_of(table.num_pages * size, -(-end // size) * size, size)):
                allocator = self.allocators[rank][group_idx]
                near = next((run.slot + run.num_pages for run in reversed(table.runs) if run.rank == rank), None)
                for slot, num_pages in allocator.allocate((last - first) // size, near):
                    new.append(table.append(rank, slot, num_pages))
            added.append(new)
        return added

    def slide(self, request: Request) -> None:
        """Free the pages that no later token's window reaches."""
        for group_idx, (group, table) in enumerate(zip(self.model.kv_groups, request.tables, strict=True)):
            if group.spec.window is not None:
                oldest = max(0, request.num_computed - group.spec.window + 1)
                self._release(group_idx, table.free_before(oldest // self.config.page_size))

    def free(self, request: Request) -> None:
        """Give back everything that a request holds and has reserved."""
        for group_idx, table in enumerate(request.tables):
            self._release(group_idx, table.free_before(table.num_pages))
        self._reserve(request, -1)

    def _release(self, group_idx: int, runs: Sequence[PageRun]) -> None:
        for run in runs:
            self.allocators[run.rank][group_idx].release(run.slot, run.num_pages)

    def check_integrity(self) -> None:
        """Assert that the allocators are sound; with no request running, that all pages are free."""
        for allocators, reserved in zip(self.allocators, self._reserved, strict=True):
            for allocator, taken in zip(allocators, reserved, strict=True):
                allocator.check_integrity()
                assert allocator.num_used <= taken <= allocator.num_pages, "pages in use that nobody reserved"


def _pages(num_tokens: int, page_size: int) -> int:
    """Pages that hold so many tokens: division, rounded up."""
    return -(-num_tokens // page_size)
