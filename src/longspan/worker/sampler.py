"""From logits to tokens and log-probabilities.

Holds pure functions of one row of logits. Must not know requests, plans in flight or ranks: the random number for a
token depends on the request's seed and the token's position only, so a request that is computed again, on other ranks
or in other batches, draws the same numbers.
Read next: `longspan.worker.runner`.
"""

import numpy as np
import torch
from torch import Tensor

from longspan.errors import LongspanError
from longspan.plan.types import SampleRow
from longspan.types import TokenLogprobs


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of a request's token at a position, from a counter-based generator (Philox)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, position, 0])).random())


def sample(logits: Tensor, row: SampleRow) -> int:
    """Choose the token that follows `row.position`.

    Temperature first, then min_p, top_k, top_p, as vLLM does; each keeps the most probable token.

    Args:
        logits: [vocab] float.
        row: sampling parameters.

    Raises:
        LongspanError: the logits hold NaN, so the model's output means nothing.
    """
    logits = logits.double()
    if torch.isnan(logits).any():
        raise LongspanError(f"request {row.request_id}: the model's logits at position {row.position} hold NaN")
    if row.banned_token_ids:
        logits = logits.index_fill(0, torch.tensor(row.banned_token_ids, device=logits.device), -torch.inf)
    if row.temperature == 0:
        return int(logits.argmax())
    # Division by a tiny temperature overflows to inf only after the maximum is subtracted away.
    probs = torch.softmax((logits - logits.max()) / row.temperature, dim=-1)
    probs, order = probs.sort(descending=True, stable=True)
    keep = torch.ones_like(probs, dtype=torch.bool)
    if row.min_p > 0:
        keep &= probs >= row.min_p * probs[0]
    if row.top_k > 0:
        keep[row.top_k :] = False
    if row.top_p < 1:
        kept = probs * keep
        before = kept.cumsum(-1) - kept  # probability of all that is more likely
        keep &= before < row.top_p * kept.sum()
    cumulative = (probs * keep).cumsum(-1)
    drawn = uniform(row.seed, row.position + 1) * cumulative[-1]
    return int(order[int(torch.searchsorted(cumulative, drawn, right=True).clamp(max=int(keep.nonzero()[-1])))])


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of given tokens and of the most probable ones.

    Args:
        logits: [n, vocab] float, before any sampling parameter.
        token_ids: [n] int64, one token per row.
        num_top: how many of the most probable tokens to report.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > chosen).sum(dim=1) + 1
    top = logprobs.topk(min(num_top, logprobs.shape[1]), dim=1)
    return [
        TokenLogprobs(token_id, logprob, rank, tuple(zip(top_ids, top_values, strict=True)))
        for token_id, logprob, rank, top_ids, top_values in zip(
            token_ids.tolist(),
            chosen[:, 0].tolist(),
            ranks.tolist(),
            top.indices.tolist(),
            top.values.tolist(),
            strict=True,
        )
    ]
