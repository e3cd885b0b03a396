"""Drafts of one request: what is proposed, and how often proposals have been right.

Holds what is known of one request's drafts. Must not know steps, or what a row costs.
Read next: `longspan.scheduler.ngrams`, a proposer; `longspan.scheduler.drafting`, which decides how many are checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

FIRST_HIT_RATE = 0.5
"""Hit rate that is assumed before a draft has been seen to be right or wrong."""

MEMORY = 0.85
"""Factor on the hit rate so far when a token shows whether a draft was right."""

FORGETTING = 0.02
"""Share by which the hit rate goes back to `FIRST_HIT_RATE` with a token for which there might have been a draft: what
was seen long ago must not keep a request from drafts for ever."""


class Proposer(Protocol):
    """Source of drafts for one request. Drafts may be wrong: they decide how fast tokens come, and never which."""

    @property
    def num_coming(self) -> int:
        """Drafts that come when they are asked for, later than `propose` is called; 0 where there are none."""

    def read(self, token_ids: Sequence[int], end: int) -> None:
        """Take in the request's tokens before position `end`; those before an earlier `end` are the same."""

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        """Drafts of the tokens behind all of these, at most so many; none where there is no telling, or not yet."""

    def end(self) -> None:
        """The request has ended; nothing is called any more."""


@dataclass(slots=True)
class Drafter:
    """Drafts of one request, of which every new token shows whether they were right, checked by a step or not."""

    proposer: Proposer
    most: int
    """Most drafts of one step."""
    hit_rate: float = FIRST_HIT_RATE
    """How often a draft behind right ones has been right lately."""
    proposal: list[int] = field(default_factory=list)
    """Drafts of the tokens behind those that were read last."""
    num_accepted: int = 0
    """Drafts that steps have checked, and that became tokens."""
    num_rejected: int = 0
    """Drafts that steps have checked in vain."""
    _num_read: int = 0

    def read_prompt(self, token_ids: Sequence[int], end: int) -> None:
        """Take in known tokens before position `end`."""
        self.proposer.read(token_ids, end)

    def read(self, token_ids: Sequence[int]) -> None:
        """Take in new tokens at the end of all, see whether they were proposed, and propose what follows."""
        if not self.proposal and self.proposer.num_coming:
            self.hit_rate += FORGETTING * (FIRST_HIT_RATE - self.hit_rate)
        new = token_ids[self._num_read :] if self.proposal else ()
        for token_id, draft in zip(new, self.proposal, strict=False):
            is_hit = token_id == draft
            self.hit_rate += (1 - MEMORY) * (is_hit - self.hit_rate)
            if not is_hit:
                break
        self._num_read = len(token_ids)
        self.proposal = self.proposer.propose(token_ids, self.most)

    def take(self, proposal: list[int]) -> None:
        """Take drafts of the tokens behind those that were read last, which came later."""
        self.proposal = proposal

    def note_checked(self, num_drafts: int, num_accepted: int) -> None:
        """Count the drafts that a step has checked."""
        self.num_accepted += num_accepted
        self.num_rejected += num_drafts - num_accepted
