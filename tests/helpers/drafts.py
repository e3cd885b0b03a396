"""Drafts of any quality, from what a request is known to generate: all right, all wrong, or some of each."""

import random
from collections.abc import Callable, Sequence

import pytest

from longspan.scheduler import drafting
from longspan.scheduler.request import Request

SPECULATION = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2}


class ScriptedProposer:
    """Proposes the right tokens, each replaced by another one with a given probability."""

    num_coming = 0

    def __init__(self, truth: Sequence[int], wrong: float, vocab_size: int, seed: int = 0) -> None:
        """Args: `truth` is prompt and output; behind its end nothing is proposed."""
        self._truth, self._wrong, self._vocab_size, self._seed = truth, wrong, vocab_size, seed

    def read(self, token_ids: Sequence[int], end: int) -> None:
        """Take in nothing: all is known."""

    def end(self) -> None:
        """Do nothing."""

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        """As long a draft as may be, the same for the same tokens."""
        rng = random.Random(f"{self._seed} {len(token_ids)}")
        right = self._truth[len(token_ids) : len(token_ids) + rng.choice([most, most, 1, 0])]
        return [(t + rng.randrange(1, self._vocab_size)) % self._vocab_size if rng.random() < self._wrong else t
                for t in right]  # fmt: skip


def scripted(
    truth_of: Callable[[Request], Sequence[int]], wrong: float, vocab_size: int
) -> Callable[[Request], ScriptedProposer]:
    """A maker of proposers (`Drafting.make_proposer`)."""
    return lambda request: ScriptedProposer(truth_of(request), wrong, vocab_size, request.request_id)


def check_all_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps check all that is proposed, whether it pays or not."""
    monkeypatch.setattr(drafting, "count_drafts", lambda offers, *costs: [most for _, most in offers])
