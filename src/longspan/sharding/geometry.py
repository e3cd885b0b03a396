"""Step geometry: how long stripes and chunks of a striped prompt are.

Holds integers. Must not know requests, free pages or time.
Read next: `longspan.sharding.placement`, which lays stripes on ranks.
"""

from dataclasses import dataclass

from longspan.sharding.placement import chunk_len, stripe_lengths


@dataclass(frozen=True, slots=True)
class StepGeometry:
    """How a prompt is cut into stripes, and which of them a step computes."""

    num_ranks: int
    page_size: int
    stripe_len: int
    """Tokens of a full stripe; whole pages."""
    chunk_len: int
    """Tokens of a full chunk, over all ranks; whole pages."""

    @classmethod
    def of_rank_budget(
        cls, num_ranks: int, page_size: int, stripe_size: int, max_num_batched_tokens: int
    ) -> "StepGeometry":
        """The geometry of an engine where every rank has a budget.

        No stripe is longer than the whole pages in the budget: else a step would have work for one rank only.

        Args:
            num_ranks: ranks that share a prompt.
            page_size: tokens per page.
            stripe_size: most tokens of a stripe; whole pages.
            max_num_batched_tokens: most tokens that one rank computes in one step; below a page it counts as one.
        """
        whole_pages = max(page_size, max_num_batched_tokens // page_size * page_size)
        stripe_len = min(stripe_size, whole_pages)
        return cls(num_ranks, page_size, stripe_len, chunk_len(whole_pages, stripe_len, num_ranks))

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
        """Pages of a full stripe."""
        return self.stripe_len // self.page_size

    @property
    def tokens_per_rank(self) -> int:
        """Most tokens per rank and step of a striped prompt, so that chunks end where snake order has come round."""
        return self.chunk_len // self.num_ranks

    def stripes(self, prompt_pages: int, tail_pages: int = 0) -> list[int]:
        """Pages per stripe of a prompt, then of `tail_pages` pages of generated tokens; see `stripe_lengths`."""
        chunk_pages = self.chunk_len // self.page_size
        return stripe_lengths(prompt_pages, self.stripe_pages, chunk_pages, self.num_ranks, tail_pages)
