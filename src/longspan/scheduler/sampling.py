"""From a request to the rows that say how its next tokens are sampled.

The only place that makes a `SampleRow`. Holds what only the driver knows: counts, and what may come next. Must not know
torch, logits, or how the rules are applied.
Read next: `longspan.worker.sampler`, which applies them.
"""

from collections.abc import Sequence

from msgspec import structs

from longspan.errors import LongspanError
from longspan.plan.types import SampleRow
from longspan.scheduler.request import Constraint, Draft, Request


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


def make_drafts(request: Request, token_ids: Sequence[int]) -> list[Draft]:
    """Drafts of leading tokens that may come next without ending the request: its constraint allows them, and behind an
    end there is nothing to sample."""
    ends = {*request.eos_token_ids, *request.params.stop_token_ids}
    state, drafts = request.constraint, list[Draft]()
    for token_id in token_ids:
        if token_id in ends:
            break
        if state is not None:
            if not _is_allowed(state, token_id):
                break
            state = state.copy()
            try:
                state.accept(token_id)
            except LongspanError:  # nothing can follow it
                break
        drafts.append(Draft(token_id, state))
    return drafts


def sample_rows(request: Request, position: int) -> list[SampleRow]:
    """How to sample the token that follows `position`, where the request's last known token stands, and the token
    behind each of its drafts, if all drafts before it were tokens."""
    rows, is_alike = [sample_row(request, position)], can_sample_ahead(request)
    for i in range(1, len(request.drafts) + 1):
        if is_alike:
            rows.append(structs.replace(rows[0], position=position + i))
        else:
            rows.append(_row(request, position + i, request.drafts[:i]))
    return rows


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


def _row(request: Request, position: int, drafts: Sequence[Draft] = ()) -> SampleRow:
    """The row at a position, behind drafts that count as tokens."""
    params, more = request.params, [draft.token_id for draft in drafts]
    constraint = drafts[-1].constraint if drafts else request.constraint
    allowed = None if constraint is None else constraint.allowed()
    banned = request.banned_token_ids(len(drafts))
    if allowed is not None and banned and not _any_left(allowed, banned):
        banned = ()  # a complete output ends, whatever min_tokens says
    has_counts = bool(params.presence_penalty or params.frequency_penalty)
    counts = request.generated_counts(more) if has_counts else {}
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
        seen=request.seen_tokens(more) if params.repetition_penalty != 1 else None,
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        generated_token_ids=tuple(counts),
        generated_counts=tuple(counts.values()),
    )


def _is_allowed(constraint: Constraint, token_id: int) -> bool:
    """Whether a token may come next."""
    mask = constraint.allowed()
    return mask is None or (token_id // 8 < len(mask) and bool(mask[token_id // 8] >> token_id % 8 & 1))


def _any_left(allowed: bytes, banned: tuple[int, ...]) -> bool:
    """Whether some allowed token is not banned."""
    left = bytearray(allowed)
    for token_id in banned:
        if token_id // 8 < len(left):
            left[token_id // 8] &= ~(1 << token_id % 8)
    return any(left)
