"""Step geometry: how long stripes and chunks of a striped prompt are, on equal ranks and on unequal ones.

Holds integers. Must not know requests, free pages or time.
Read next: `longspan.sharding.placement`, which lays stripes on ranks.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from longspan.errors import ConfigError
from longspan.sharding.placement import chunk_len, equal_stripes, snake_rank, weighted_stripes


@dataclass(frozen=True, slots=True)
class StepGeometry:
    """How a prompt is cut into stripes, and which of them a step computes."""

    num_ranks: int
    page_size: int
    stripe_len: int
    """Tokens of a full stripe, on the rank with the largest share; whole pages."""
    chunk_len: int
    """Tokens of a full chunk, over all ranks; whole pages."""
    shares: tuple[int, ...] = ()
    """Pages of a full chunk on every rank, where ranks are unequal; empty where all have the same."""

    @classmethod
    def of_rank_budget(
        cls,
        num_ranks: int,
        page_size: int,
        stripe_size: int,
        max_num_batched_tokens: int,
        weights: Sequence[float] | None = None,
    ) -> "StepGeometry":
        """The geometry of an engine where every rank has a budget.

        No stripe is longer than the whole pages in the budget: else a step would have work for one rank only.

        Args:
            num_ranks: ranks that share a prompt.
            page_size: tokens per page.
            stripe_size: most tokens of a stripe; whole pages.
            max_num_batched_tokens: most tokens that one rank computes in one step; below a page it counts as one.
            weights: what each rank's part of a prompt is in proportion to, rounded to whole pages of a chunk; the rank
                with the largest one spends the budget. None: all parts are equal.

        Raises:
            ConfigError: a weight is so small that its rank has no page in a chunk.
        """
        whole_pages = max(page_size, max_num_batched_tokens // page_size * page_size)
        stripe_len = min(stripe_size, whole_pages)
        full_len = chunk_len(whole_pages, stripe_len, num_ranks)
        if weights is None or len(set(weights)) == 1:
            return cls(num_ranks, page_size, stripe_len, full_len)
        most_pages, largest = full_len // num_ranks // page_size, max(weights)
        shares = tuple([int(most_pages * weight / largest + 0.5) for weight in weights])
        if 0 in shares:
            raise ConfigError(
                f"rank_weights: got {', '.join(f'{weight:g}' for weight in weights)}, which leaves rank "
                f"{shares.index(0)} without a page: a chunk has {most_pages} pages of {page_size} tokens on the rank "
                f"with the largest weight; legal is at least {largest / (2 * most_pages):g}"
            )
        return cls(num_ranks, page_size, stripe_len, sum(shares) * page_size, shares)

    @classmethod
    def of_step_budget(
        cls, num_ranks: int, page_size: int, stripe_size: int, max_num_batched_tokens: int
    ) -> "StepGeometry":
        """The geometry under a host that has one budget for all ranks together, and cuts chunks itself.

        Chunks take the whole budget, and stripes are short enough that each rank has two of them in a chunk.

        Args:
            num_ranks: ranks that share a prompt.
            page_size: tokens per page.
            stripe_size: most tokens of a stripe, rounded up to whole pages.
            max_num_batched_tokens: most tokens of one step on all ranks.
        """
        per_stripe = min(stripe_size, max(1, max_num_batched_tokens // (2 * num_ranks)))
        chunk_pages = max(1, max_num_batched_tokens // page_size)
        return cls(num_ranks, page_size, -(-per_stripe // page_size) * page_size, chunk_pages * page_size)

    @property
    def stripe_pages(self) -> int:
        """Pages of a full stripe, on the rank with the largest share."""
        return self.stripe_len // self.page_size

    @property
    def num_passes(self) -> int:
        """Passes over all ranks in a full chunk of unequal ranks; 1 where all stripes are equal."""
        return max(1, max(self.shares) // self.stripe_pages) if self.shares else 1

    @property
    def pass_len(self) -> int:
        """Tokens of one pass over all ranks, in whole pages."""
        if not self.shares:
            return self.num_ranks * self.stripe_len
        return sum(self.shares) // self.num_passes * self.page_size

    @property
    def tokens_per_rank(self) -> tuple[int, ...]:
        """Most tokens of each rank in a step of a striped prompt, so that chunks end where snake order comes round."""
        if not self.shares:
            return (self.chunk_len // self.num_ranks,) * self.num_ranks
        return tuple([pages * self.page_size for pages in self.shares])

    @property
    def relative_shares(self) -> tuple[float, ...]:
        """Each rank's part of a prompt, relative to the largest one."""
        if not self.shares:
            return (1.0,) * self.num_ranks
        return tuple([pages / max(self.shares) for pages in self.shares])

    @property
    def rank_shares(self) -> tuple[float, ...]:
        """Each rank's part of a prompt; they sum to 1."""
        tokens = self.tokens_per_rank
        return tuple([count / sum(tokens) for count in tokens])

    def stripes(self, prompt_pages: int, tail_pages: int = 0, home: int = 0) -> list[int]:
        """Cut the pages of a prompt, then of generated tokens, into stripes.

        Full chunks take full stripes. A last, shorter chunk is cut into the fewest passes that are no longer than full
        ones and whose number is even, so that the chunk balances too and snake order starts anew behind it.

        Args:
            prompt_pages: pages of the prompt.
            tail_pages: pages of generated tokens.
            home: rank where snake order starts.

        Returns:
            Pages per stripe, in sequence order; they sum to `prompt_pages + tail_pages`. Stripe i lies on
            `snake_rank(i, home, num_ranks)`.
        """
        chunk_pages, num_ranks = self.chunk_len // self.page_size, self.num_ranks
        num_chunks, left = divmod(prompt_pages, chunk_pages)
        lengths: list[int] = []
        for _ in range(num_chunks):
            lengths += self._full_stripes(chunk_pages, len(lengths), home)
        if self.shares:
            num_passes = 2 * -(-left * self.num_passes // (2 * chunk_pages))
            order = [snake_rank(len(lengths) + i, home, num_ranks) for i in range(num_passes * num_ranks)]
            lengths += weighted_stripes(left, num_passes, self.shares, order)
        else:
            lengths += equal_stripes(left, self.stripe_pages, 2 * num_ranks)
        return lengths + self._full_stripes(tail_pages, len(lengths), home)

    def tail_rank(self, page_idx: int, home: int) -> int:
        """Rank of one page of generated tokens, whose stripes start anew at `home`."""
        if not self.shares:
            return snake_rank(page_idx // self.stripe_pages, home, self.num_ranks)
        ends = _tail_ends(self, home)
        page_idx %= ends[-1]
        return snake_rank(bisect_right(ends, page_idx), home, self.num_ranks)

    def _full_stripes(self, num_pages: int, first: int, home: int) -> list[int]:
        """Cut pages into full stripes, the last one into what is left, from stripe `first` on, where a pass begins."""
        if not self.shares:
            num_full, left = divmod(num_pages, self.stripe_pages)
            return [self.stripe_pages] * num_full + [left] * (left > 0)
        num_passes, num_ranks = self.num_passes, self.num_ranks
        lengths: list[int] = []
        while num_pages or len(lengths) % num_ranks:  # to the end of a pass, where its last stripes may be empty
            share = self.shares[snake_rank(first + len(lengths), home, num_ranks)]
            full = share // num_passes + (len(lengths) // num_ranks % num_passes < share % num_passes)
            lengths.append(min(num_pages, full))
            num_pages -= lengths[-1]
        return lengths


@cache
def _tail_ends(geometry: StepGeometry, home: int) -> tuple[int, ...]:
    """Ends of the stripes of generated tokens, in pages, until they come again, which is after two chunks at most."""
    return tuple(accumulate(geometry._full_stripes(2 * sum(geometry.shares), 0, home)))
