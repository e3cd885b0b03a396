"""Sampling: tokens and log-probabilities from logits.

Holds pure functions of one row of logits. Must not know requests, plans in flight or ranks: the random number for a
token depends on the request's seed and the token's position only, so a request that is computed again, on other ranks
or in other batches, draws the same numbers. The row holds all earlier state: a worker remembers nothing.
Read next: `longspan.scheduler.sampling`, which makes the rows; `longspan.worker.runner`.

Note [The order of the rules]
    The order is that of vLLM's sampler:

        1. what the grammar, or `min_tokens`, forbids       logit = -inf
        2. logit_bias                                       logit += bias
        3. repetition_penalty r, token seen before          logit /= r if logit > 0, else logit *= r
        4. frequency_penalty, presence_penalty              logit -= frequency * count + presence * (count > 0)
        5. temperature 0 takes the largest logit; else      logit /= temperature
        6. min_p, top_k, top_p                              each keeps the most probable token
        7. draw

    So a bias counts for the sign that the repetition penalty looks at, rules 1 to 4 apply to greedy, and no rule allows
    a forbidden token again. The code forbids after step 4 instead of before, which is equivalent: no finite number
    added to -inf, and no positive factor, changes it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from longspan.errors import LongspanError
from longspan.plan.types import SampleRow
from longspan.types import TokenLogprobs


def uniform(seed: int, position: int) -> float:
    """Random number in [0, 1) of a request's token at a position, from a counter-based generator (Philox)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, position, 0])).random())


_LARGEST_LOGIT = 1e300
"""Bound that keeps logits finite under an extreme repetition penalty."""


def sample_all(logits: Tensor, rows: Sequence[SampleRow]) -> list[int | LongspanError]:
    """Sample every row; plain greedy rows, the usual batch, are sampled at once.

    Args:
        logits: [n, vocab] float; not changed.
        rows: n sampling parameters.

    Returns:
        The token of every row, or the error: a failing request must not end the others.
    """
    plain = [i for i, row in enumerate(rows) if _is_plain_greedy(row)]
    best: dict[int, int] = {}
    if len(plain) > 1:
        some = logits if len(plain) == len(rows) else logits[torch.tensor(plain, device=logits.device)]
        is_sound = ~torch.isnan(some).any(dim=1)
        best = {
            i: token for i, token, ok in zip(plain, some.argmax(dim=1).tolist(), is_sound.tolist(), strict=True) if ok
        }
    return [best[i] if i in best else _sample_or_error(logits[i], row) for i, row in enumerate(rows)]


def _sample_or_error(logits: Tensor, row: SampleRow) -> int | LongspanError:
    try:
        return sample(logits, row)
    except LongspanError as error:
        return error


def _is_plain_greedy(row: SampleRow) -> bool:
    """Whether the token is that of the largest unchanged logit."""
    return (
        row.temperature == 0
        and row.allowed is None
        and row.seen is None
        and not row.banned_token_ids
        and not row.logit_bias
        and not row.generated_token_ids
    )


def sample(logits: Tensor, row: SampleRow) -> int:
    """Choose the token that follows `row.position`. See "the order of the rules" above.

    Args:
        logits: [vocab] float; not changed.
        row: sampling parameters.

    Raises:
        LongspanError: the logits hold NaN, so the model's output means nothing; or no token is allowed.
    """
    logits = logits.double()
    if torch.isnan(logits).any():
        raise LongspanError(f"request {row.request_id}: the model's logits at position {row.position} hold NaN")
    if row.logit_bias or row.seen is not None or row.generated_token_ids:
        logits = _adjusted(logits, row)
    if row.banned_token_ids or row.allowed is not None:
        logits = _restricted(logits, row)
        if logits.max() == -torch.inf:
            raise LongspanError(f"request {row.request_id}: no token is allowed after position {row.position}")
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
        before = kept.cumsum(-1) - kept  # probability of all more likely tokens
        keep &= before < row.top_p * kept.sum()
    keep[0] = True  # an extreme top_p or min_p may round to 0
    cumulative = (probs * keep).cumsum(-1)
    drawn = uniform(row.seed, row.position + 1) * cumulative[-1]
    return int(order[int(torch.searchsorted(cumulative, drawn, right=True).clamp(max=int(keep.nonzero()[-1])))])


def _adjusted(logits: Tensor, row: SampleRow) -> Tensor:
    """Apply bias and penalties to logits; return [vocab] float64."""
    device = logits.device
    if row.logit_bias:
        ids, biases = zip(*row.logit_bias, strict=True)
        logits = logits.index_add(
            0, torch.tensor(ids, device=device), torch.tensor(biases, dtype=logits.dtype, device=device)
        )
    if row.seen is not None:
        scaled = torch.where(logits > 0, logits / row.repetition_penalty, logits * row.repetition_penalty)
        scaled = scaled.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        logits = torch.where(_bits(row.seen, len(logits)).to(device) & logits.isfinite(), scaled, logits)
    if row.generated_token_ids:
        counts = torch.tensor(row.generated_counts, dtype=logits.dtype, device=device)
        penalties = row.frequency_penalty * counts + row.presence_penalty
        logits = logits.index_add(0, torch.tensor(row.generated_token_ids, device=device), -penalties)
    return logits


def _restricted(logits: Tensor, row: SampleRow) -> Tensor:
    """Return the logits [vocab] with -inf where a token is forbidden."""
    if row.banned_token_ids:
        logits = logits.index_fill(0, torch.tensor(row.banned_token_ids, device=logits.device), -torch.inf)
    if row.allowed is not None:
        logits = logits.masked_fill(~_bits(row.allowed, len(logits)).to(logits.device), -torch.inf)
    return logits


def _bits(mask: bytes, size: int) -> Tensor:
    """Unpack a bit mask to [size] bool on the CPU: bit i % 8 of byte i // 8, False past the end of `mask`."""
    padded = mask.ljust((size + 7) // 8, b"\0")  # NumPy would pad too, but an empty mask with whatever is in memory
    return torch.from_numpy(np.unpackbits(np.frombuffer(padded, np.uint8), count=size, bitorder="little")).bool()


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> list[TokenLogprobs]:
    """Compute log-probabilities of given tokens and of the most probable ones.

    Args:
        logits: [n, vocab] float, before any sampling parameter.
        token_ids: [n] int64, one token per row.
        num_top: number of most probable tokens to report.
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
