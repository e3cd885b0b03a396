"""Sampling: tokens and log-probabilities from logits.

Holds pure functions of rows of logits. Must not know requests, plans in flight or ranks: the random number for a
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

from longspan.attention.staging import to_device
from longspan.errors import LongspanError
from longspan.plan.types import SampleRow
from longspan.types import TokenLogprobs


def uniform(seed: int, position: int) -> float:
    """Random number in [0, 1) of a request's token at a position, from a counter-based generator (Philox)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, position, 0])).random())


_LARGEST_LOGIT = 1e300
"""Bound that keeps logits finite under an extreme repetition penalty."""


ROWS_AT_ONCE = {"cpu": 1, "cuda": 16}
"""Rows that are sampled together, by kind of device: on a GPU a launch per row would take longer than its work, and 16
rows of 128k tokens take 16 MB a tensor and 8 tensors; on a CPU a row alone stays in its caches."""


def sample_all(logits: Tensor, rows: Sequence[SampleRow]) -> list[int | LongspanError]:
    """Sample every row. However many they are, the device is waited for once.

    Args:
        logits: [n, vocab] float; not changed.
        rows: n sampling parameters.

    Returns:
        The token of every row, or the error: a failing request must not end the others.
    """
    if not rows:
        return []
    plain = [i for i, row in enumerate(rows) if _is_plain_greedy(row)]
    others = [i for i, row in enumerate(rows) if not _is_plain_greedy(row)]
    drawn: list[Tensor] = []  # [rows, 3] each: token, whether the logits hold NaN, whether no token is allowed
    if plain:
        some = logits if not others else logits[_index(plain, logits.device)]
        none = torch.zeros(len(plain), dtype=torch.long, device=logits.device)
        drawn.append(torch.stack((some.argmax(dim=1), torch.isnan(some).any(dim=1).long(), none), dim=1))
    count = ROWS_AT_ONCE[logits.device.type]
    for first in range(0, len(others), count):
        part = others[first : first + count]
        drawn.append(_draw(logits[_index(part, logits.device)], [rows[i] for i in part]))
    found: list[int | LongspanError] = [0] * len(rows)
    for i, (token, has_nan, is_forbidden) in zip(plain + others, torch.cat(drawn).tolist(), strict=True):
        found[i] = token
        if has_nan or is_forbidden:
            found[i] = _error(rows[i], has_nan=bool(has_nan))
    return found


def sample(logits: Tensor, row: SampleRow) -> int:
    """Choose the token that follows `row.position`. See "the order of the rules" above.

    Args:
        logits: [vocab] float; not changed.
        row: sampling parameters.

    Raises:
        LongspanError: the logits hold NaN, so the model's output means nothing; or no token is allowed.
    """
    (found,) = sample_all(logits[None], [row])
    if isinstance(found, LongspanError):
        raise found
    return found


def _error(row: SampleRow, *, has_nan: bool) -> LongspanError:
    if has_nan:
        return LongspanError(f"request {row.request_id}: the model's logits at position {row.position} hold NaN")
    return LongspanError(f"request {row.request_id}: no token is allowed after position {row.position}")


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


def _draw(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Apply the rules to some rows together.

    Args:
        logits: [n, vocab] float.
        rows: n sampling parameters.

    Returns:
        [n, 3] int64 per row: token, whether the logits hold NaN, whether no token is allowed.
    """
    device, logits = logits.device, logits.double()
    has_nan = torch.isnan(logits).any(dim=1)
    logits = _restricted(_adjusted(logits, rows), rows)
    best, tokens = logits.max(dim=1, keepdim=True)
    is_forbidden = (best[:, 0] == -torch.inf) & ~has_nan
    if any(row.temperature > 0 for row in rows):
        numbers = [
            (row.temperature or 1.0, row.min_p, row.top_k, row.top_p, uniform(row.seed, row.position + 1))
            for row in rows
        ]
        temperature, min_p, top_k, top_p, draw = to_device(np.array(numbers), device).T[:, :, None]  # [n, 1] each
        # Division by a tiny temperature overflows to inf only after the maximum is subtracted away.
        probs = torch.softmax((logits - best) / temperature, dim=-1)
        probs, order = probs.sort(descending=True, stable=True)
        keep = probs >= min_p * probs[:, :1]
        places = torch.arange(probs.shape[1], device=device)
        keep &= (places < top_k) | (top_k == 0)
        kept = probs * keep
        before = kept.cumsum(-1) - kept  # probability of all more likely tokens
        keep &= (before < top_p * kept.sum(dim=-1, keepdim=True)) | (top_p >= 1)
        keep[:, 0] = True  # an extreme top_p or min_p may round to 0
        cumulative = (probs * keep).cumsum(-1)
        place = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True)
        last = (places * keep).amax(dim=1, keepdim=True)
        sampled = order.gather(1, torch.minimum(place, last))
        is_greedy = _index([row.temperature == 0 for row in rows], device).bool()
        tokens = torch.where(is_greedy[:, None], tokens, sampled)
    return torch.stack((tokens[:, 0], has_nan.long(), is_forbidden.long()), dim=1)


def _adjusted(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Apply biases and penalties to logits; return [n, vocab] float64."""
    logits = _added(logits, [row.logit_bias for row in rows])
    if any(row.seen is not None for row in rows):
        penalties = to_device(np.array([[row.repetition_penalty] for row in rows]), logits.device)
        scaled = torch.where(logits > 0, logits / penalties, logits * penalties)
        scaled = scaled.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        seen = _bits([row.seen or b"" for row in rows], logits)
        logits = torch.where(seen & logits.isfinite(), scaled, logits)
    return _added(
        logits,
        [
            [
                (token, -(row.frequency_penalty * count + row.presence_penalty))
                for token, count in zip(row.generated_token_ids, row.generated_counts, strict=True)
            ]
            for row in rows
        ],
    )


def _restricted(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Return the logits [n, vocab] with -inf where a token is forbidden."""
    banned = [(i, token) for i, row in enumerate(rows) for token in row.banned_token_ids]
    if banned:
        at = to_device(np.array(banned, dtype=np.int64).T, logits.device)
        logits = logits.index_put((at[0], at[1]), logits.new_full((), -torch.inf))
    if any(row.allowed is not None for row in rows):
        everything = b"\xff" * ((logits.shape[1] + 7) // 8)
        allowed = _bits([everything if row.allowed is None else row.allowed for row in rows], logits)
        logits = logits.masked_fill(~allowed, -torch.inf)
    return logits


def _added(logits: Tensor, addends: Sequence[Sequence[tuple[int, float]]]) -> Tensor:
    """Add numbers to some tokens' logits, per row."""
    if not any(addends):
        return logits
    device = logits.device
    places = [(i, token) for i, of_row in enumerate(addends) for token, _ in of_row]
    numbers = to_device(np.array([number for of_row in addends for _, number in of_row], dtype=np.float64), device)
    at = to_device(np.array(places, dtype=np.int64).T, device)
    return logits.index_put((at[0], at[1]), numbers, accumulate=True)


def _bits(masks: Sequence[bytes], logits: Tensor) -> Tensor:
    """Unpack bit masks to [n, vocab] bool: bit i % 8 of byte i // 8, False past the end of a mask."""
    num_bytes = (logits.shape[1] + 7) // 8
    packed = np.frombuffer(b"".join(mask.ljust(num_bytes, b"\0")[:num_bytes] for mask in masks), np.uint8)
    on_device = to_device(packed.reshape(len(masks), num_bytes, 1).copy(), logits.device)
    bits = (on_device >> torch.arange(8, dtype=torch.uint8, device=logits.device)) & 1
    return bits.flatten(1)[:, : logits.shape[1]].bool()


def _index(values: Sequence[int], device: torch.device) -> Tensor:
    return to_device(np.array(values, dtype=np.int64), device)


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
