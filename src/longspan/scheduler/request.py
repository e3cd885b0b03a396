"""One request, as the driver holds it: the truth from which all KV can be recomputed.

Holds token ids, sampling state, and how far the request has come; it alone changes its fields. Its pages are its
allocation's. Must not know torch, processes or text.
Read next: `longspan.scheduler.allocation`; `longspan.scheduler.scheduler`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from longspan.errors import LongspanError
from longspan.kv.prefix import extend_hashes
from longspan.plan.types import SampledToken, SampleRow
from longspan.scheduler.allocation import Allocation
from longspan.scheduler.delivery import Delivery
from longspan.scheduler.drafter import Drafter
from longspan.types import Adapter, FinishReason, Phase, RopeLengths, SamplingParams, TokenLogprobs

PRIORITY_REQUESTS = 1000
"""Requests that may come later and go first, per unit of `priority`: bounded, so that nothing waits for ever."""


class Constraint(Protocol):
    """What a request's output must look like, one token at a time."""

    def allowed(self) -> bytes | None:
        """Bit mask of the tokens that may come next (bit i % 8 of byte i // 8; at least one), or None for all."""

    def accept(self, token_id: int) -> None:
        """Take the token that came next; the request goes on after it.

        Raises:
            LongspanError: nothing can follow. It ends this request, and no other.
        """

    def copy(self) -> "Constraint":
        """A constraint in the same state, which goes its own way: along drafts that may be wrong."""


class Draft(NamedTuple):
    """A guess at a token that is not sampled yet."""

    token_id: int
    constraint: Constraint | None
    """The request's constraint, if it has one, behind this draft and those before it."""


def hash_root(rope: RopeLengths | None, rope_len: int, adapter: Adapter | None) -> bytes:
    """What KV of a request depends on beside tokens, for its page hashes: 0, 8, 16 or 24 bytes."""
    of_rope = b"" if rope is None else rope.hash_root(rope_len)
    return of_rope + (b"" if adapter is None else adapter.digest)


@dataclass(slots=True, eq=False)
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
    rope_lengths: RopeLengths | None = None
    """The model's."""
    rope_len: int = 0
    """Length that counts for RoPE in every row, but where `position + 1` is more; 0 where it does not matter."""
    adapter: Adapter | None = None
    """LoRA adapter that it is continued with; None for the model alone."""
    num_cached: int = 0
    """Prompt tokens whose KV was found in the prefix cache, or loaded from a tier behind it."""
    num_computed: int = 0
    """Tokens whose KV is stored."""
    num_planned: int = 0
    """Tokens whose KV is stored, or is being computed by plans in flight."""
    allocation: Allocation | None = None
    """The request's pages, from its admission to a preemption; the memory's. Once the request has ended it says where
    they were, and holds nothing."""
    page_hashes: list[bytes] = field(default_factory=list)
    """Of the full pages of `token_ids`, as far as they were needed (`hash_pages`)."""
    num_preemptions: int = 0
    delivery: Delivery = field(default_factory=Delivery)
    """Record of what ranks know of the request: the plan writer notes it, the request forgets it."""
    num_crashes: int = 0
    """How often, one after another, the ranks were lost while they computed this request, and it got no further."""
    farthest: int = 0
    """Tokens that were computed when the ranks were last lost; to compute these again is not to get further."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    """What happened, if `finish_reason` is `ERROR`."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One per generated token, if asked for."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One per prompt token but the first, if asked for."""
    drafter: Drafter | None = None
    """Where drafts come from; None for none."""
    drafts: Sequence[Draft] = ()
    """Drafts that the plan in flight checks: they may come behind the newest token, and are no part of `token_ids`."""
    num_given: int | None = None
    """Of a request that follows another one, tokens that it was given: those behind them are guesses, which may be
    taken back. None for one that follows none."""
    pauses_at: int | None = None
    """Number of tokens with which it pauses until it is given more; None where it never does."""
    next_row: SampleRow | None = None
    """How all next tokens are sampled but for their positions, once they are sampled alike."""
    _counts: Counter[int] | None = None
    _seen: bytearray | None = None

    @property
    def phase(self) -> Phase:
        """Prefill while more than the newest token is to be computed: a prompt, or all tokens after a preemption."""
        return Phase.PREFILL if len(self.token_ids) - self.num_computed > 1 else Phase.DECODE

    @property
    def in_flight(self) -> bool:
        """Whether a plan that computes some of the tokens has not come back."""
        return self.num_planned > self.num_computed

    @property
    def is_paused(self) -> bool:
        """Whether it has as many tokens as were asked for, and computes no more before it is given others."""
        return self.pauses_at is not None and len(self.token_ids) >= self.pauses_at and self.phase is Phase.DECODE

    @property
    def num_settled(self) -> int:
        """Tokens whose KV is stored and stays, however the request goes on."""
        return self.num_computed if self.num_given is None else min(self.num_computed, self.num_given)

    @property
    def queue_key(self) -> int:
        """Place in the queue: that of the request that would come as late without a priority."""
        return self.request_id + PRIORITY_REQUESTS * self.params.priority

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    def hash_pages(self, page_size: int) -> list[bytes]:
        """Hashes of all full pages of `token_ids`, computed once."""
        root = hash_root(self.rope_lengths, self.rope_len, self.adapter)
        extend_hashes(self.page_hashes, self.token_ids, page_size, root)
        return self.page_hashes

    def admit(self, allocation: Allocation, num_tokens: int) -> None:
        """Go on from cached pages.

        Args:
            allocation: the request's pages from now on.
            num_tokens: tokens whose KV was found in the prefix cache.
        """
        self.allocation = allocation
        self.num_computed = self.num_planned = num_tokens
        if self.num_preemptions == 0:
            self.num_cached = num_tokens

    def note_loaded(self, end: int) -> None:
        """Take down that all positions up to `end` have their KV stored, which came from a tier."""
        self.num_computed = end
        if self.num_preemptions == 0:
            self.num_cached = min(end, self.prompt_len)

    def give_back(self) -> None:
        """Begin again without pages, which the memory has back; all tokens are kept."""
        self.allocation = None
        self.num_computed = self.num_planned = 0
        self.drafts = ()
        self.delivery.forget_tables()

    def preempt(self) -> None:
        """Begin again without pages, for the sake of an older request."""
        self.give_back()
        self.num_preemptions += 1

    def crosses(self, num_tokens: int) -> bool:
        """Whether a request of so many tokens has to be computed again, as RoPE has other frequencies from there on."""
        rope = self.rope_lengths
        return rope is not None and rope.is_recomputed and self.rope_len <= rope.same_up_to < num_tokens

    def cross(self) -> None:
        """Take down that all rows count the present length: what was computed and hashed before is of no use."""
        self.rope_len = len(self.token_ids)
        self.page_hashes = []

    def lose_ranks(self, *, was_in_flight: bool) -> None:
        """Begin again, as the ranks that computed it are gone with all that they held.

        Args:
            was_in_flight: whether a plan in flight computed it.
        """
        self.num_crashes += was_in_flight
        self.farthest = max(self.farthest, self.num_computed)
        self.preempt()
        self.forget_ranks()

    def forget_ranks(self) -> None:
        """Take down that the ranks are gone, and new ones have heard nothing of the request."""
        self.delivery.lose_ranks()

    def follow(self, token_ids: Sequence[int], pauses_at: int, page_size: int) -> None:
        """Go on behind another request's tokens: own guesses that differ are taken back, with all behind them.

            given 7 8, guessed 9 4 5, KV of 7 8 9 4     given now 7 8 9 6: 6 is to be computed where 4 was, 5 is gone
                                                        given now 7 8 9: nothing is to be computed again

        Args:
            token_ids: the other request's, which begin with those that were given before.
            pauses_at: number of tokens with which to pause.
            page_size: tokens per page.
        """
        assert not self.in_flight, "a plan computes what may be taken back"
        own, same = self.token_ids, self.prompt_len if self.num_given is None else self.num_given
        known = min(len(own), len(token_ids))
        while same < known and own[same] == token_ids[same]:
            same += 1
        if same < len(token_ids):
            own[same:] = token_ids[same:]
            self.num_computed = self.num_planned = min(self.num_computed, same)
            del self.page_hashes[same // page_size :]
        self.num_given, self.pauses_at = len(token_ids), pauses_at
        self.delivery.go_back()

    def note_planned(self, end: int) -> None:
        """Take down that a plan computes all tokens up to `end`."""
        self.num_planned = end

    def most_drafts(self) -> int:
        """Most drafts that the next step may check, however many are proposed: all of them may become tokens."""
        left = self.params.max_tokens - self.num_generated - 1
        rope = self.rope_lengths
        if rope is not None and rope.is_recomputed and self.rope_len <= rope.same_up_to:
            left = min(left, rope.same_up_to - len(self.token_ids))  # rows behind it have other frequencies
        return max(0, left)

    def note_drafts(self, drafts: Sequence[Draft]) -> None:
        """Take down what the next plan checks behind the newest token."""
        self.drafts = drafts

    def take_sampled(self, sampled: Mapping[int, SampledToken], failed: str | None) -> int:
        """Append what a step has sampled: a token, and behind every draft that equals the token before it, one more.

        As each token is sampled with its own position's random number, and from the logits behind the tokens that it
        follows, tokens are those that come without drafts.

        Args:
            sampled: sampled tokens by their positions, those behind wrong drafts included.
            failed: why a row could not be sampled, if one could not.

        Returns:
            Drafts that were right.
        """
        drafts, self.drafts = self.drafts, ()
        num_accepted = 0
        for draft in (*drafts, None):
            found = sampled.get(len(self.token_ids))
            if found is None:
                self.fail(failed or "no rank has sampled its next token")
                break
            is_right = draft is not None and found.token_id == draft.token_id
            self.add_token(found.token_id, found.logprobs, draft if is_right else None)
            num_accepted += is_right
            if not is_right or self.finish_reason is not None:
                break
        if self.drafter is not None:
            self.drafter.note_checked(len(drafts), num_accepted)
            if self.finish_reason is None:
                self.drafter.read(self.token_ids)
        if drafts:  # keys of wrong drafts are written over by the next step
            self.num_planned = min(self.num_planned, len(self.token_ids) - 1)
        return num_accepted

    def note_computed(self, num_tokens: int) -> None:
        """Take down that so many tokens have their KV stored, those of wrong drafts not counted."""
        self.num_computed = max(self.num_computed, min(num_tokens, self.num_planned))
        if self.drafter is not None:
            self.drafter.read_prompt(self.token_ids, self.num_computed)
        if self.num_computed > self.farthest:
            self.num_crashes = 0

    def banned_token_ids(self, num_more: int = 0) -> tuple[int, ...]:
        """Tokens that must not be sampled behind so many more: whatever would end the request before `min_tokens`."""
        if self.num_generated + num_more >= self.params.min_tokens:
            return ()
        return tuple(sorted({*self.eos_token_ids, *self.params.stop_token_ids}))

    def generated_counts(self, more: Sequence[int] = ()) -> Counter[int]:
        """How often each token was generated, `more` included. Counted once, then kept; not to be changed."""
        if self._counts is None:
            self._counts = Counter(self.output_token_ids)
        return self._counts + Counter(more) if more else self._counts

    def seen_tokens(self, more: Sequence[int] = ()) -> bytes:
        """The tokens of prompt and output, and `more`, as bits: bit i % 8 of byte i // 8. Collected once, then kept."""
        if self._seen is None:
            self._seen = bytearray(max(self.token_ids) // 8 + 1)
            for token_id in set(self.token_ids):
                self._seen[token_id // 8] |= 1 << token_id % 8
        if not more:
            return bytes(self._seen)
        seen = bytearray(self._seen)
        seen.extend(bytes(max(0, max(more) // 8 + 1 - len(seen))))
        for token_id in more:
            seen[token_id // 8] |= 1 << token_id % 8
        return bytes(seen)

    def note_row(self, row: SampleRow) -> None:
        """Keep how all next tokens are sampled, but for their positions."""
        self.next_row = row

    def end(self, reason: FinishReason) -> None:
        """Take down why the request has ended."""
        self.finish_reason = reason

    def fail(self, reason: str) -> None:
        """End with an error.

        Args:
            reason: why the request cannot go on.
        """
        self.finish_reason, self.error = FinishReason.ERROR, reason

    def add_prompt_logprobs(self, logprobs: Sequence[TokenLogprobs]) -> None:
        """Append the log-probabilities of the next prompt tokens."""
        self.prompt_logprobs.extend(logprobs)

    def add_token(self, token_id: int, logprobs: TokenLogprobs | None, draft: Draft | None = None) -> None:
        """Append a sampled token and see whether it ends the request.

        Args:
            token_id: the token.
            logprobs: what was asked for.
            draft: the draft that it equals, if there was one.
        """
        self.token_ids.append(token_id)
        if self._counts is not None:
            self._counts[token_id] += 1
        if self._seen is not None:
            self._seen.extend(bytes(max(0, token_id // 8 + 1 - len(self._seen))))
            self._seen[token_id // 8] |= 1 << token_id % 8
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if token_id in self.eos_token_ids or token_id in self.params.stop_token_ids:
            self.finish_reason = FinishReason.STOP
        elif self.num_generated >= self.params.max_tokens:
            self.finish_reason = FinishReason.LENGTH
        elif self.constraint is not None and draft is not None:
            self.constraint = draft.constraint
        elif self.constraint is not None:
            try:
                self.constraint.accept(token_id)
            except LongspanError as error:
                self.fail(str(error))
