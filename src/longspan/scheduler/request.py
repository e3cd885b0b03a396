"""One request, as the driver holds it: the truth from which all KV can be recomputed.

Holds token ids, sampling state and page tables. Must not know torch, processes or text.
Read next: `longspan.scheduler.scheduler`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from longspan.sharding.pages import PageTable
from longspan.types import FinishReason, Phase, SamplingParams, TokenLogprobs


class Constraint(Protocol):
    """What a request's output must look like, one token at a time."""

    def allowed(self) -> bytes | None:
        """Bit mask of the tokens that may come next (bit i % 8 of byte i // 8), or None for all."""

    def accept(self, token_id: int) -> None:
        """Take the token that came next."""


@dataclass(slots=True)
class Request:
    """A request from admission to its end."""

    request_id: int
    params: SamplingParams
    seed: int
    """Key of the random numbers."""
    token_ids: list[int]
    """Prompt and generated tokens."""
    prompt_len: int
    eos_token_ids: tuple[int, ...]
    """End tokens that count, `ignore_eos` considered."""
    constraint: Constraint | None = None
    num_cached: int = 0
    """Prompt tokens whose KV was found in the prefix cache."""
    num_computed: int = 0
    """Tokens whose KV is stored."""
    tables: list[PageTable] = field(default_factory=list)
    """Per KV group, empty before admission."""
    page_ranks: list[tuple[int, int]] = field(default_factory=list)
    """(rank, pages) runs: the placement of all pages that the request may ever need, decided at admission."""
    informed_ranks: set[int] = field(default_factory=set)
    """Ranks that know the page tables as of the last plan."""
    involved_ranks: set[int] = field(default_factory=set)
    """Ranks that ever heard of the request."""
    in_flight: bool = False
    last_plan_id: int = -1
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One per generated token, if asked for."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One per prompt token but the first, if asked for."""

    @property
    def phase(self) -> Phase:
        """Prefill until the whole prompt is computed."""
        return Phase.PREFILL if self.num_computed < self.prompt_len else Phase.DECODE

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    def ranks_of(self, start: int, end: int, page_size: int) -> Iterator[tuple[int, int, int]]:
        """(rank, start, end) of the planned placement of positions `[start, end)`, in sequence order."""
        first = 0
        for rank, num_pages in self.page_ranks:
            last = first + num_pages * page_size
            if max(first, start) < min(last, end):
                yield rank, max(first, start), min(last, end)
            first = last

    def banned_token_ids(self) -> tuple[int, ...]:
        """Tokens that must not be sampled next: whatever would end the request before `min_tokens`."""
        if self.num_generated >= self.params.min_tokens:
            return ()
        return tuple(sorted({*self.eos_token_ids, *self.params.stop_token_ids}))

    def add_token(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Append a sampled token and see whether it ends the request."""
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if token_id in self.eos_token_ids or token_id in self.params.stop_token_ids:
            self.finish_reason = FinishReason.STOP
        elif self.num_generated >= self.params.max_tokens:
            self.finish_reason = FinishReason.LENGTH


def last_kv_position(prompt_len: int, params: SamplingParams) -> int:
    """One past the last position whose KV is ever stored: the last generated token's is not."""
    return prompt_len + params.max_tokens - 1


def count_pages(page_ranks: Sequence[tuple[int, int]], num_ranks: int) -> list[int]:
    """Pages per rank of a placement."""
    counts = [0] * num_ranks
    for rank, num_pages in page_ranks:
        counts[rank] += num_pages
    return counts
