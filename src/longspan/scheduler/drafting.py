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

from longspan.config import EngineConfig
from longspan.costmodel.row_time import WAIT_SHARE, RowTime, count_drafts
from longspan.plan.types import Plan, PlanResult
from longspan.scheduler.chunks import Chunks
from longspan.scheduler.drafter import Drafter, Proposer
from longspan.scheduler.filling import ChosenStep
from longspan.scheduler.ngrams import NgramProposer
from longspan.scheduler.request import Draft, Request
from longspan.scheduler.sampling import make_drafts
from longspan.types import ModelSpec, Phase


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
        if speculation is not None:
            self.make_proposer = lambda request: NgramProposer(speculation.longest, speculation.shortest)
        self.num_drafted = 0
        """Times that a step checked drafts of a request."""
        self.num_accepted = 0
        """Drafts that became tokens."""
        self.num_rejected = 0
        """Drafts that were wrong."""

    @property
    def is_on(self) -> bool:
        """Whether steps may check drafts."""
        return self.make_proposer is not None and self._most > 0

    def take_over(self, other: "Drafting") -> None:
        """Go on with the counts and the proposers of another one, which is not to be used any more."""
        self.make_proposer = other.make_proposer
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
        offers = [(r.drafter.hit_rate, min(len(r.drafter.proposal), r.most_drafts())) for r in requests if r.drafter]
        return any(num_offered for _, num_offered in offers) and any(self._counts(offers, len(requests), len(requests)))

    def choose(self, step: ChosenStep) -> ChosenStep:
        """Add the drafts that pay to a step, as far as its ranks, budgets and pages go."""
        decodes = [request for request, _ in step.chosen if request.phase is Phase.DECODE]
        offers = [(r.drafter.hit_rate, num) for r in decodes if r.drafter and (num := self.num_wanted(r))]
        if not offers:
            return step
        num_rows = sum(end - request.num_computed for request, end in step.chosen)
        counts = self._counts(offers, len(decodes), num_rows)
        left = self._left(step)
        for request, count in zip([r for r in decodes if self.num_wanted(r)], counts, strict=True):
            request.note_drafts(_legal(request, self._chunks.ranks(request, len(request.token_ids)), count, left))
            self.num_drafted += bool(request.drafts)
        return step._replace(chosen=[(request, end + len(request.drafts)) for request, end in step.chosen])

    def _counts(self, offers: Sequence[tuple[float, int]], num_decodes: int, num_rows: int) -> list[int]:
        return count_drafts(offers, num_decodes, self._row_time.share(num_rows), self._wait_share)

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
