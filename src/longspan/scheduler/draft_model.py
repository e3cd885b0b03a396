"""Drafts of a smaller model: in a scheduler of its own, a request follows every request that is decoded.

Holds the pairs of requests, and who waits for which drafts. Must not know how many drafts pay, nor how plans run.
Read next: `longspan.scheduler.drafting`, which asks; `longspan.engine.drafts`, which starts the model.

Note [Followers]
    A follower is given the tokens of the request that it follows, and pauses when it has guessed as many more as were
    asked for. Given the next ones, it takes wrong guesses back, computes what it lacks, and guesses again:

        request     7 8         step checks 9 4 5       7 8 9 6
        follower    7 8|9 4 5   pauses                  7 8 9 6|2 1 3       4 and 5 are taken back

    To its scheduler it is a request like any other, with its own pages, prompt and prefix hits: only guesses are kept
    out of the prefix cache. It begins when the other one has its first token, and is asked for drafts once it has
    computed what it was given first; until then, or where it has no room, there are no drafts.

    The requests of one step ask together, and wait until all drafts have come or cannot come: they would not share
    their next step otherwise. A follower that has lost its pages, or cannot get the next one, is not waited for.

    Followers draw as the requests do, with the same random numbers: a model that gives tokens similar probabilities
    then mostly draws the same ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

from longspan.errors import CapacityError, ConfigError
from longspan.plan.types import Plan, PlanResult
from longspan.scheduler.request import Request
from longspan.scheduler.scheduler import Scheduler
from longspan.types import FinishReason, SamplingParams

MEMORY = 0.5
"""Factor on the time of steps so far when a new one is learnt."""

DOUBT = 0.98
"""Factor on the predicted time with every step that asks for nothing, until a step shows it again: what was slow once,
such as a first step, must not keep requests from drafts for ever."""


class Follower:
    """Proposer of one request, whose drafts are the guesses of another one that follows it."""

    def __init__(self, model: "DraftModel", request: Request) -> None:
        """Begin without guesses. Args: `model` makes them for `request`."""
        self._model, self._request = model, request
        self._guessing: Request | None = None
        self._scheduler: Scheduler | None = None  # of `_guessing`

    @property
    def guessing(self) -> Request | None:
        """The request that follows, which may have ended with an error; None before it has begun, on these ranks."""
        return self._guessing if self._scheduler is self._model.scheduler else None

    @property
    def num_coming(self) -> int:
        guessing = self.guessing
        if guessing is None or guessing.finish_reason is not None or guessing.allocation is None:
            return 0
        return self._model.most if guessing.is_paused and not guessing.in_flight else 0

    def read(self, token_ids: Sequence[int], end: int) -> None:
        """Do nothing: tokens are given when drafts are asked for."""

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        """Nothing yet."""
        return []

    def begin(self) -> None:
        """Let a request follow; where its tokens are too many for the model or its ranks, none does."""
        if self._scheduler is self._model.scheduler:
            return
        self._scheduler, self._guessing = self._model.scheduler, None
        token_ids, params = self._request.token_ids, self._request.params
        drawn = SamplingParams(
            max_tokens=params.max_tokens - self._request.num_generated,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            seed=self._request.seed,
            ignore_eos=True,
        )
        try:
            self._guessing = self._scheduler.add_request(token_ids, drawn)
        except (ConfigError, CapacityError):
            return
        self._scheduler.follow(self._guessing, token_ids, len(token_ids) + 1)

    def end(self) -> None:
        guessing = self.guessing
        if guessing is not None and guessing.finish_reason is None:
            self._model.scheduler.finish(guessing, FinishReason.ABORT)


class _Asked(NamedTuple):
    """Drafts of one request that are being made."""

    request: Request
    guessing: Request
    num_tokens: int
    """Tokens of the request when it asked."""
    num_drafts: int


class _Round(NamedTuple):
    """Drafts that are asked for together."""

    asked: Sequence[_Asked]
    held: Sequence[Request]
    """Requests that wait for all of them."""


class DraftModel:
    """Followers of all requests."""

    def __init__(self, scheduler: Scheduler, most: int) -> None:
        """Begin without followers.

        Args:
            scheduler: of the draft model.
            most: most drafts of one request in one step.
        """
        self.scheduler = scheduler
        """Scheduler of the draft model; replaced with the ranks."""
        self.most = most
        self._learnt_s: float | None = None
        self._doubt = 1.0
        self._rounds: list[_Round] = []

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step that makes a draft of each request that asks; 0 while nothing is known."""
        return self._doubt * (self._learnt_s or 0.0)

    def rest(self) -> None:
        """Take down that a step of decodes asks for nothing."""
        self._doubt *= DOUBT

    def follow(self, request: Request) -> Follower:
        """Proposer of a new request."""
        return Follower(self, request)

    def begin(self, request: Request) -> None:
        """Let a follower compute a request's tokens, if there is none yet."""
        _follower(request).begin()

    def ask(self, wanted: Sequence[tuple[Request, int]], held: Sequence[Request]) -> None:
        """Let followers make drafts. Arguments: `DraftSource.ask`."""
        asked: list[_Asked] = []
        for request, count in wanted:
            guessing, num_tokens = _follower(request).guessing, len(request.token_ids)
            assert guessing is not None, "a source that is not there is asked"
            self.scheduler.follow(guessing, request.token_ids, num_tokens + count)
            asked.append(_Asked(request, guessing, num_tokens, count))
        self._rounds.append(_Round(asked, held))

    def update(self, result: PlanResult) -> None:
        """Take in what a plan's ranks answered."""
        plan = self.scheduler.in_flight[result.plan_id].plan
        if sum(plan.num_tokens) <= (1 + self.most) * len(plan.samples):  # guesses, and tokens that were given before
            step_s, before = max(rank_result.step_s for rank_result in result.ranks), self._learnt_s
            self._learnt_s = step_s if before is None else MEMORY * before + (1 - MEMORY) * step_s
            self._doubt = 1.0
        self.scheduler.update(result)

    def schedule(self) -> Plan | None:
        """The next plan to submit, or None when nothing can start now."""
        return self.scheduler.schedule()

    def release(self) -> list[Request]:
        """Hand drafts over that are complete, or will not be. Call it when `schedule` has no plan.

        Returns:
            The requests that waited for them.
        """
        open_rounds, released = list[_Round](), list[Request]()
        for asked, held in self._rounds:
            if any(self._is_coming(one.guessing) for one in asked):
                open_rounds.append(_Round(asked, held))
                continue
            for request, guessing, num_tokens, num_drafts in asked:
                if (guessing.num_given, len(request.token_ids)) == (num_tokens, num_tokens) and request.drafter:
                    request.drafter.take(guessing.token_ids[num_tokens : num_tokens + num_drafts])
            released += held
        self._rounds = open_rounds
        return released

    def _is_coming(self, guessing: Request) -> bool:
        """Whether more guesses will come without waiting for anybody's pages."""
        if guessing.finish_reason is not None or guessing.allocation is None or guessing.is_paused:
            return False
        return guessing.in_flight or bool(self.scheduler.in_flight)

    def begin_again(self, scheduler: Scheduler) -> None:
        """Go on without followers and drafts, as the ranks are lost; requests that decode get new ones.

        Args:
            scheduler: for the new ranks.
        """
        scheduler.next_plan_id, scheduler.next_request_id = self.scheduler.next_plan_id, self.scheduler.next_request_id
        self.scheduler = scheduler
        self._rounds = []


def _follower(request: Request) -> Follower:
    assert request.drafter is not None
    assert isinstance(request.drafter.proposer, Follower)
    return request.drafter.proposer
