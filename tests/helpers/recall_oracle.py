"""What the bundled model must answer, computed from the token ids alone.

Holds the two oracles of `longspan.models.recall` for tests and demos: the next token wherever the last k tokens
occurred exactly once before, and the closed-form logits wherever they occurred at all. Needs no model, no attention.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longspan.models.recall_weights import HIDDEN_SIZE, LOGIT_GAIN, RMS_NORM_EPS, VOTE_GAIN, answer_codes


def iter_votes(tokens: Sequence[int], match_len: int) -> Iterator[tuple[int, Counter[int]]]:
    """Yields (position, votes) for each position whose last `match_len` tokens occurred before.

    Votes count the token after each earlier occurrence, overlapping ones and one that ends just before `position`
    included. The counter is still counting: use it before going on. Its total is the number of occurrences.
    """
    # Python's own hashes of byte strings are fast and exact: two bytes per token, as specials are above 255.
    data = b"".join(token.to_bytes(2, "little") for token in tokens)
    votes_of: defaultdict[bytes, Counter[int]] = defaultdict(Counter)
    for position in range(match_len - 1, len(tokens)):
        if position >= match_len:
            gram_before = data[2 * (position - match_len) : 2 * position]
            votes_of[gram_before][tokens[position]] += 1
        gram = data[2 * (position + 1 - match_len) : 2 * (position + 1)]
        if gram in votes_of:
            yield position, votes_of[gram]


def expected_next(tokens: Sequence[int], match_len: int) -> dict[int, int]:
    """Maps each position whose last `match_len` tokens occurred exactly once before to the token that followed."""
    return {
        position: next(iter(votes))
        for position, votes in iter_votes(tokens, match_len)
        if votes.total() == 1  # 2 votes for one token are certain too, but this is the oracle that users are told
    }


def expected_logits(tokens: Sequence[int], match_len: int) -> dict[int, Tensor]:
    """Maps each position whose last `match_len` tokens occurred before to its logits, [VOCAB_SIZE] float64."""
    codes = answer_codes().double()
    return {
        position: vote_logits(tokens[position], votes, match_len, codes)
        for position, votes in iter_votes(tokens, match_len)
    }


def vote_logits(last_token: int, votes: Counter[int], match_len: int, codes: Tensor) -> Tensor:
    """The logits after `last_token` when earlier occurrences were followed by `votes`.

    Args:
        last_token: The token at the position in question.
        votes: Token to number of occurrences that it followed; at least one.
        match_len: k, in tokens.
        codes: `answer_codes()`, [VOCAB_SIZE, 64] float64.

    Returns:
        [VOCAB_SIZE] float64.
    """
    answer = codes[last_token].clone()  # [64], the residual stream's code part after the recall layer
    for token, count in votes.items():
        answer += VOTE_GAIN * count / votes.total() * codes[token]
    square_sum = 8 * (match_len + 1) + 1 + answer.square().sum()  # blocks, the constant, the code
    return LOGIT_GAIN * codes @ answer / torch.sqrt(square_sum / HIDDEN_SIZE + RMS_NORM_EPS)
