"""Where the new pages of a request go, and which requests can never have enough of them.

Holds the placement policy of an engine, as arithmetic of pages and ranks. Must not know which pages are free at the
moment (callers say it), which are cached, or requests.
Read next: `longspan.sharding.placement`, which lays stripes on ranks; `longspan.scheduler.admission`, which asks first.
"""

import math
from collections.abc import Sequence

from longspan.config import EngineConfig
from longspan.errors import CapacityError
from longspan.scheduler.allocation import Allocation
from longspan.scheduler.reservations import RankPools
from longspan.sharding.capacity import pool_bytes
from longspan.sharding.geometry import StepGeometry
from longspan.sharding.placement import place
from longspan.types import ModelSpec, Placement


class PagePlacer:
    """Places pages, by the user's policy or by ours."""

    def __init__(self, model: ModelSpec, config: EngineConfig, pools: RankPools) -> None:
        """Keep what placement depends on.

        Args:
            model: its KV groups.
            config: of the engine.
            pools: of all ranks.

        Raises:
            ConfigError: the weights leave a rank without a page.
        """
        self._model, self._config, self._pools = model, config, pools
        self._num_ranks = config.context_parallel_size
        self.geometry = self._geometry(config.known_weights)
        """How striped prompts are cut."""
        self.striped_from = config.striped_from
        """Tokens of a prompt from which on `auto` stripes it."""

    def stripe_from(self, num_tokens: int) -> None:
        """Let `auto` stripe prompts of this length and longer."""
        self.striped_from = num_tokens

    def weigh(self, weights: Sequence[float]) -> None:
        """Divide prompts and answers that come from now on by these weights, one per rank."""
        self.geometry = self._geometry(weights)

    def _geometry(self, weights: Sequence[float] | None) -> StepGeometry:
        config = self._config
        size, budget = config.page_size, config.max_num_batched_tokens
        return StepGeometry.of_rank_budget(self._num_ranks, size, config.stripe_size, budget, weights)

    @property
    def may_leave_home(self) -> bool:
        """Whether a request may have pages on several ranks."""
        return self._config.forced_placement is not Placement.PACKED

    @property
    def max_request_len(self) -> int:
        """Most tokens of one request, prompt and output together; windows may admit more than this."""
        limits = self._pools.limits
        return (sum(limits) if self.may_leave_home else max(limits)) * self._config.page_size + 1

    def placement_of(self, num_tokens: int) -> Placement:
        """By the user's policy, or by ours: packed when short (and when one rank can hold it), else striped."""
        forced = self._config.forced_placement
        if forced is not None:
            return forced
        is_short = self._num_ranks == 1 or num_tokens < self.striped_from
        if is_short and self._pools.fit_some_rank(pages_for(num_tokens, self._config.page_size)):
            return Placement.PACKED
        return Placement.STRIPED

    def place(
        self, prompt_pages: int, tail_pages: int, placement: Placement, room: Sequence[Sequence[int]]
    ) -> list[tuple[int, int]] | None:
        """Choose the ranks of new pages.

        Args:
            prompt_pages: pages of known tokens.
            tail_pages: pages of generated tokens behind them.
            placement: the policy.
            room: [rank][KV group], in pages.

        Returns:
            (rank, pages) runs in sequence order, or None when they do not fit.
        """
        total = prompt_pages + tail_pages
        most = [self._pools.most_pages(of_rank) for of_rank in room]
        by_rank = [total if pages is None else pages for pages in most]
        limiting = self._pools.limiting_group or 0
        home = max(range(self._num_ranks), key=lambda rank: (by_rank[rank], room[rank][limiting], -rank))
        is_striped = placement is Placement.STRIPED
        stripes = self.geometry.stripes(prompt_pages, tail_pages, home) if is_striped else [total]
        return place(placement, stripes, by_rank, home)

    def room_beside(self, rank: int, num_pages: int, room: Sequence[Sequence[int]]) -> list[list[int]] | None:
        """The room of all ranks beside new pages on one of them; None if these do not fit."""
        left = [list(of_rank) for of_rank in room]
        left[rank] = [free - self._pools.needed(group_idx, num_pages) for group_idx, free in enumerate(room[rank])]
        return left if min(left[rank]) >= 0 else None

    def next_rank(self, allocation: Allocation, prompt_len: int) -> int:
        """Where the next page of generated tokens should go.

        A packed request's next page goes to the rank of its last one, as does any with a state; a striped one's follows
        snake order.
        """
        forced = self._config.forced_placement
        if self._model.state_groups:  # or the state, as large as thousands of tokens' KV, would move once a stripe
            return allocation.page_ranks[-1][0]
        if forced in (Placement.PACKED, Placement.SPILL) or (forced is None and len(allocation.page_ranks) == 1):
            return allocation.page_ranks[-1][0]
        tail_pages = allocation.num_pages - pages_for(prompt_len, self._config.page_size)
        home = allocation.page_ranks[0][0]
        return self.geometry.tail_rank(max(0, tail_pages), home)

    def check_fits(self, prompt_len: int, max_tokens: int) -> None:
        """Refuse a request that would not fit even on empty ranks.

        Raises:
            CapacityError: with what was asked, what fits, and what would make it fit.
        """
        size = self._config.page_size
        end = prompt_len + max_tokens - 1
        placement = self.placement_of(prompt_len)
        if placement is Placement.PACKED and self.may_leave_home:
            placement = Placement.SPILL  # what is generated may go on to other ranks
        prompt_pages = pages_for(prompt_len, size)
        if self.place(prompt_pages, pages_for(end, size) - prompt_pages, placement, self._pools.num_pages) is not None:
            return
        raise CapacityError(
            f"prompt + max_tokens: got {prompt_len} + {max_tokens} = {prompt_len + max_tokens} tokens, "
            f"legal is at most {self.max_request_len} ({self._room_words()}, and one that needs no page); "
            f"what would fit it: {'; or '.join(self._ways_to_fit(end))}"
        )

    def _room_words(self) -> str:
        """What a request may use, in words."""
        limits, size = self._pools.limits, self._config.page_size
        limits = limits if self.may_leave_home else (max(limits),)
        if len(set(limits)) > 1:
            return f"ranks with {', '.join(map(str, limits))} pages x {size} tokens"
        ranks, pages = f"{len(limits)} rank{'s' * (len(limits) > 1)}", f"{limits[0]} page{'s' * (limits[0] > 1)}"
        return f"{ranks} x {pages} x {size} tokens"

    def _ways_to_fit(self, end: int) -> list[str]:
        """What would make a request with `end` tokens in pages fit."""
        size, config, limits = self._config.page_size, self._config, self._pools.limits
        budget, pages, most = config.max_num_batched_tokens, pages_for(end, size), max(limits)
        used_ranks = sum(limits) / most if self.may_leave_home else 1.0  # of the size of the largest one

        def bytes_for(num_pages: int, page_size: int) -> int:
            """Memory of the largest rank, if the request takes so many pages."""
            return pool_bytes(self._model, math.ceil(num_pages / used_ranks), page_size, budget)

        others = "" if self.may_leave_home else " and placement striped or spill"
        ways = [] if min(limits) < most else [f"context_parallel_size of at least {-(-pages // most)}{others}"]
        if not self.may_leave_home and pages <= sum(limits):
            ways = ["placement striped or spill" + (", and another strategy than local") * (config.placement == "auto")]
        ways.append(f"kv_cache_memory of at least {bytes_for(pages, size)} bytes per rank")
        memory = config.kv_cache_memory or pool_bytes(self._model, most, size, budget)
        for smaller in (size >> shift for shift in range(1, size.bit_length())):
            if config.stripe_size % smaller:
                continue
            if bytes_for(pages_for(end, smaller), smaller) <= memory:
                ways.append(f"page_size {smaller}")
                break
        return ways


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold so many tokens: division, rounded up."""
    return -(-num_tokens // page_size)
