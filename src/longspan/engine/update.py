"""Result of a step for one request: the message from the thread that drives the engine to the one that reads text.

Holds one frozen struct, and how it is made. Must not know text.
Read next: `longspan.engine.output_reader`, which puts updates together.
"""

import msgspec

from longspan.scheduler.request import Request
from longspan.types import FinishReason, TokenLogprobs


class Update(msgspec.Struct, frozen=True):
    """Result of one step for one request."""

    token_ids: list[int]
    """New tokens; empty while the prompt is being computed."""
    logprobs: list[TokenLogprobs]
    """One entry per new token, if asked for."""
    num_prefilled: int
    """Prompt tokens computed, loaded or found in the cache so far."""
    num_cached: int
    """Prompt tokens that were found in the cache, or loaded."""
    since_start_s: float
    """Seconds since the call of `generate` in `LLM`; since the request's first plan in `AsyncEngine`."""
    finish_reason: FinishReason | None
    prompt_logprobs: list[TokenLogprobs] | None
    """One entry per prompt token but the first, if asked for; None except with the first generated token."""
    num_accepted: int = 0
    """Drafts so far that became tokens."""
    num_rejected: int = 0
    """Drafts so far that were wrong."""
    is_recovering: bool = False
    """Whether the ranks are lost, so that new ones compute prompt and tokens again before the next token."""


def merged(first: Update, second: Update) -> Update:
    """Return one update that says what two of a request say, one after the other."""
    return Update(
        token_ids=[*first.token_ids, *second.token_ids],
        logprobs=[*first.logprobs, *second.logprobs],
        num_prefilled=second.num_prefilled,
        num_cached=second.num_cached,
        since_start_s=second.since_start_s,
        finish_reason=second.finish_reason,
        prompt_logprobs=first.prompt_logprobs if second.prompt_logprobs is None else second.prompt_logprobs,
        num_accepted=second.num_accepted,
        num_rejected=second.num_rejected,
    )


def update_of(request: Request, num_read: int, since_start_s: float) -> Update:
    """Make the update of a request that has advanced.

    Args:
        request: the request after the step.
        num_read: number of generated tokens in earlier updates.
        since_start_s: seconds since the request began.
    """
    drafter = request.drafter
    return Update(
        token_ids=request.token_ids[request.prompt_len + num_read :],
        logprobs=request.logprobs[num_read:],
        num_prefilled=min(request.num_computed, request.prompt_len),
        num_cached=request.num_cached,
        since_start_s=since_start_s,
        finish_reason=request.finish_reason,
        prompt_logprobs=request.prompt_logprobs if num_read == 0 < request.num_generated else None,
        num_accepted=0 if drafter is None else drafter.num_accepted,
        num_rejected=0 if drafter is None else drafter.num_rejected,
    )
