"""How many drafts a step checks: tokens that are expected of them, against what their rows cost.

Holds the choice, and the fit of what a row costs. Must not know where drafts come from, or the plan's parts.
Read next: `longspan.scheduler.drafter`, one request's drafts; `longspan.costmodel.row_time`, which drafts pay;
docs/speculation.md.

Note [Drafts]
    A draft is a guess at a token that is not sampled yet. A step that computes a request's newest token and k drafts
    behind it samples k + 1 tokens, each with its own position's random number, and keeps them up to the first one that
    differs from the draft in its place (`Request.take_sampled`). So tokens are those that come without drafts, greedy
    or sampled; keys of wrong drafts are written over, and only what was kept is published.

        known 7 8, drafts 9 4 4      rows    8   9   4   4
                                     sampled 9   4   5   .     kept: 9 4 5, of which two drafts were right
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from longspan.config import EngineConfig
from longspan.costmodel.row_time import WAIT_SHARE, RowTime, count_drafts
from longspan.plan.types import Plan, PlanResult
from longspan.scheduler.chunks import Chunks
from longspan.scheduler.drafter import Drafter, Proposer
from longspan.scheduler.filling import ChosenStep
from longspan.scheduler.ngrams import NgramProposer
from longspan.scheduler.request import Draft, Request
from longspan.scheduler.sampling import make_drafts
from longspan.speculation import NgramDrafts
from longspan.types import ModelSpec, Phase


class DraftSource(Protocol):
    """What makes drafts of several requests together, and takes its time."""

    @property
    def step_s(self) -> float:
        """Predicted seconds of one draft of each request that asks."""

    def begin(self, request: Request) -> None:
        """Get ready to make drafts of a request, unless that was begun before."""

    def ask(self, wanted: Sequence[tuple[Request, int]], held: Sequence[Request]) -> None:
        """Make drafts of the next tokens.

        Args:
            wanted: requests whose source is ready, and how many drafts of each.
            held: requests that wait until all of them have come.
        """

    def rest(self) -> None:
        """Take down that a step of decodes asks for nothing."""


class Drafting:
    """Choice of drafts for all requests of one scheduler."""

    def __init__(self, model: ModelSpec, config: EngineConfig, chunks: Chunks) -> None:
        """Begin without requests.

        Args:
            model: one with recurrent layers gets no drafts: a state cannot be taken back behind a wrong one.
            config: of the engine.
            chunks: says which ranks a request's step involves without drafts; it involves no others with them.
        """
        self._chunks = chunks
        speculation = None if model.state_groups else config.speculation
        self._most = 0 if speculation is None else speculation.num_drafts
        self._budget, self._wait_share = config.max_num_batched_tokens, WAIT_SHARE * config.async_scheduling
        self._row_time = RowTime()
        self.make_proposer: Callable[[Request], Proposer] | None = None
        """Maker of a request's source of drafts; None for no drafts."""
        if isinstance(speculation, NgramDrafts):
            self.make_proposer = lambda request: NgramProposer(speculation.longest, speculation.shortest)
        self.source: DraftSource | None = None
        """What makes the drafts that proposers do not have at once; None where there is no such thing."""
        self.num_drafted = 0
        """Times that a step checked drafts of a request."""
        self.num_accepted = 0
        """Drafts that became tokens."""
        self.num_rejected = 0
        """Drafts that were wrong."""
        self.is_on = self.make_proposer is not None and self._most > 0
        """Whether steps may check drafts."""

    def use(self, source: DraftSource, make_proposer: Callable[[Request], Proposer]) -> None:
        """Let all new requests have drafts of a source.

        Args:
            source: makes the drafts.
            make_proposer: makes a request's part of it.
        """
        self.source, self.make_proposer, self.is_on = source, make_proposer, self._most > 0

    def take_over(self, other: "Drafting") -> None:
        """Go on with the counts and the proposers of another one, which is not to be used any more."""
        self.make_proposer, self.source, self.is_on = other.make_proposer, other.source, other.is_on
        self.num_drafted = other.num_drafted
        self.num_accepted, self.num_rejected = other.num_accepted, other.num_rejected

    def begin(self, request: Request) -> None:
        """Give a new request its source of drafts, if there are any."""
        if self.make_proposer is not None and self.is_on:
            request.drafter = Drafter(self.make_proposer(request), self._most)

    def num_wanted(self, request: Request) -> int:
        """Drafts for which a request that is ready would like to have pages."""
        if request.drafter is None or request.phase is not Phase.DECODE:
            return 0
        return min(len(request.drafter.proposal), request.most_drafts())

    def pays(self, requests: Sequence[Request]) -> bool:
        """Whether a step that decodes these requests should have drafts, as far as is known before it."""
        return any(self._paying(requests, [_num_offered(request) for request in requests]))

    def ask(self, requests: Sequence[Request]) -> list[Request]:
        """Ask the source for drafts of the next tokens, as far as they pay.

        Args:
            requests: those that a step of decodes has advanced.

        Returns:
            The requests that wait until the drafts have come: all that take their next step together.
        """
        if self.source is None:
            return []
        most = [0 if request.drafter is None else min(self._most, request.most_drafts()) for request in requests]
        for request, count in zip(requests, self._paying(requests, most), strict=True):
            if count:
                self.source.begin(request)
        held = [request for request in requests if not request.in_flight]
        counts = self._paying(held, [_num_offered(request) for request in held])
        wanted = [(request, count) for request, count in zip(held, counts, strict=True) if count]
        if not wanted:
            self.source.rest()
            return []
        self.source.ask(wanted, held)
        return held

    def _paying(self, requests: Sequence[Request], numbers: Sequence[int]) -> list[int]:
        """Drafts of each request that pay, if they decode together, and one has so many at most. Those that a source
        makes take its time too, which all that ask share."""
        num_asking = sum(number > 0 for number in numbers)
        if not num_asking:
            return [0] * len(numbers)
        num_rows, share = len(requests), self._row_time.share(len(requests))
        if self.source is not None and (step_s := self._row_time.step_s(num_rows)):
            share += self.source.step_s / step_s / num_asking
        rates = [0.0 if request.drafter is None else request.drafter.hit_rate for request in requests]
        return count_drafts(list(zip(rates, numbers, strict=True)), num_rows, share, self._wait_share)

    def choose(self, step: ChosenStep) -> ChosenStep:
        """Add the drafts that pay to a step, as far as its ranks, budgets and pages go."""
        decodes = [request for request, _ in step.chosen if request.phase is Phase.DECODE]
        offers = [(r.drafter.hit_rate, num) for r in decodes if r.drafter and (num := self.num_wanted(r))]
        if not offers:
            return step
        num_rows = sum(end - request.num_computed for request, end in step.chosen)
        counts = count_drafts(offers, len(decodes), self._row_time.share(num_rows), self._wait_share)
        left = self._left(step)
        for request, count in zip([r for r in decodes if self.num_wanted(r)], counts, strict=True):
            request.note_drafts(_legal(request, self._chunks.ranks(request, len(request.token_ids)), count, left))
            self.num_drafted += bool(request.drafts)
        return step._replace(chosen=[(request, end + len(request.drafts)) for request, end in step.chosen])

    def _left(self, step: ChosenStep) -> dict[int, int]:
        """Tokens that every rank of a step may compute beside those that are chosen."""
        left = dict.fromkeys(step.ranks, self._budget)
        for request, end in step.chosen:
            assert request.allocation is not None
            for rank, start, stop in request.allocation.ranks_of(request.num_computed, end):
                left[rank] -= stop - start
        return left

    def note(self, plan: Plan, result: PlanResult) -> None:
        """Learn from a finished plan what a row takes."""
        if self.is_on and plan.phase is Phase.DECODE:
            step_s = max(rank_result.step_s for rank_result in result.ranks)
            self._row_time.learn(sum(plan.num_tokens), step_s)

    def note_checked(self, num_drafts: int, num_accepted: int) -> None:
        """Count the drafts of one request that a step has checked."""
        self.num_accepted += num_accepted
        self.num_rejected += num_drafts - num_accepted


def _num_offered(request: Request) -> int:
    """Drafts that the next step of a request may check: those that are there, or that come when they are asked for."""
    drafter = request.drafter
    if drafter is None:
        return 0
    return min(max(len(drafter.proposal), drafter.proposer.num_coming), request.most_drafts())


def _legal(request: Request, ranks: AbstractSet[int], count: int, left: dict[int, int]) -> list[Draft]:
    """The first proposed drafts, as far as they may become tokens, their pages are placed on these ranks, and the
    budgets `left` there have room for them."""
    drafter, allocation = request.drafter, request.allocation
    assert drafter is not None
    assert allocation is not None
    first = len(request.token_ids)
    count = min(count, allocation.num_pages * allocation.page_size - first)
    used: dict[int, int] = {}
    for i in range(count):
        rank = allocation.rank_at(first + i)
        if rank not in ranks or used.get(rank, 0) == left[rank]:
            count = i
            break
        used[rank] = used.get(rank, 0) + 1
    for rank, num_tokens in used.items():
        left[rank] -= num_tokens
    return make_drafts(request, drafter.proposal[: max(0, count)])
