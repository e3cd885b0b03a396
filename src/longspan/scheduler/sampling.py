"""From a request to the row that says how its next token is sampled.

The only place that makes a `SampleRow`. Holds what only the driver knows: counts, and what may come next. Must not know
torch, logits, or how the rules are applied.
Read next: `longspan.worker.sampler`, which applies them.
"""

from msgspec import structs

from longspan.plan.types import SampleRow
from longspan.scheduler.request import Request


def can_sample_ahead(request: Request) -> bool:
    """Whether the row of the token after next is known: it depends on no token that is not."""
    params = request.params
    return (
        request.constraint is None
        and request.num_generated >= params.min_tokens
        and params.repetition_penalty == 1
        and not params.presence_penalty
        and not params.frequency_penalty
    )


def sample_row(request: Request, position: int) -> SampleRow:
    """How to sample the token that follows `position`, where the request's last known token stands.

    One position further on where `can_sample_ahead` says so.
    """
    is_alike = can_sample_ahead(request)
    assert is_alike or position == len(request.token_ids) - 1
    if not is_alike:
        return _row(request, position)
    if request.next_row is None:
        request.note_row(_row(request, position))
    assert request.next_row is not None
    return structs.replace(request.next_row, position=position)


def _row(request: Request, position: int) -> SampleRow:
    params = request.params
    allowed = None if request.constraint is None else request.constraint.allowed()
    banned = request.banned_token_ids()
    if allowed is not None and banned and not _any_left(allowed, banned):
        banned = ()  # a complete output ends, whatever min_tokens says
    counts = request.generated_counts() if params.presence_penalty or params.frequency_penalty else {}
    return SampleRow(
        request_id=request.request_id,
        position=position,
        temperature=float(params.temperature),
        top_p=float(params.top_p),
        top_k=params.top_k,
        min_p=float(params.min_p),
        seed=request.seed,
        num_logprobs=params.logprobs,
        banned_token_ids=banned,
        allowed=allowed,
        logit_bias=params.logit_bias,
        repetition_penalty=float(params.repetition_penalty),
        seen=request.seen_tokens() if params.repetition_penalty != 1 else None,
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        generated_token_ids=tuple(counts),
        generated_counts=tuple(counts.values()),
    )


def _any_left(allowed: bytes, banned: tuple[int, ...]) -> bool:
    """Whether some allowed token is not banned."""
    left = bytearray(allowed)
    for token_id in banned:
        if token_id // 8 < len(left):
            left[token_id // 8] &= ~(1 << token_id % 8)
    return any(left)
