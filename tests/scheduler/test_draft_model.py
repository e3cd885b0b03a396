"""Followers: what is computed of them, what is taken back, who waits for them, and that nobody else is kept waiting.

Both models' ranks are simulated; the simulator checks that every key is that of the tokens before it.
"""

import random
from dataclasses import dataclass, field

import fake_ranks
import pytest
from drafts import check_all_drafts
from fake_ranks import VOCAB, FakeRanks, assert_all_free, make_config, make_model, make_scheduler, tokens_alone
from msgspec import structs

from longspan.costmodel import row_time
from longspan.plan.types import FIRST_DRAFT_PLAN
from longspan.scheduler.draft_model import DraftModel
from longspan.scheduler.drafting import Drafting
from longspan.scheduler.request import Request
from longspan.types import FinishReason, SamplingParams

MOST = 4
SPECULATION = {"method": "draft_model", "model": "small", "num_speculative_tokens": MOST}
OWN_SEEDS = 10**6
"""Seeds of followers are so much larger than those of the requests that they follow."""


def token_of(row):
    """Of a follower, what the request will sample; in three positions of ten, by its seed, another token."""
    seed, is_follower = row.seed % OWN_SEEDS, row.seed >= OWN_SEEDS
    token = random.Random(f"{seed} {row.position}").randrange(VOCAB // 2)
    token = 2 if token in row.banned_token_ids else token
    is_wrong = is_follower and random.Random(f"{seed} {row.position} wrong").random() < Pair.wrong
    return (token + 1) % VOCAB if is_wrong else token


@dataclass
class Pair:
    """Ranks with two models."""

    main: FakeRanks
    small: FakeRanks
    drafts: DraftModel
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    wrong = 0.3
    """Probability that a draft is wrong."""

    def submit_all(self):
        while True:
            if (plan := self.drafts.schedule()) is not None:
                self.small.submit(plan)
                continue
            self.main.scheduler.take_drafts(self.drafts.release())
            if (plan := self.main.scheduler.schedule()) is None:
                return
            self.main.submit(plan)

    def step(self):
        self.submit_all()
        plans = [(self.main, plan) for plan in self.main.first_plans()]
        plans += [(self.small, plan) for plan in self.small.first_plans()]
        assert self.main.in_flight or not self.main.scheduler.has_requests or self.small.in_flight, "nothing runs"
        ranks, plan = self.rng.choice(plans)
        if ranks is self.main:
            self.main.complete(plan)
            return
        del self.small.in_flight[plan.plan_id]
        self.drafts.update(self.small.answer(plan))
        self.small.scheduler.memory.check_integrity()
        self.small.check_cached()

    def run_to_the_end(self):
        for _ in range(20_000):
            if not self.main.scheduler.has_requests:
                break
            self.step()
        else:
            raise AssertionError("requests do not end")
        for ranks in (self.main, self.small):
            while ranks.in_flight:
                self.step()
        assert_all_free(self.main.scheduler)
        assert_all_free(self.small.scheduler)


@pytest.fixture(autouse=True)
def tokens_of_two_models(monkeypatch):
    monkeypatch.setattr(fake_ranks, "fake_token", token_of)
    check_all_drafts(monkeypatch)


def make_pair(num_ranks=2, *windows, memory_tokens=600, draft_tokens=None, **options):
    config = make_config(num_ranks, speculative_config=SPECULATION, **options)
    main = make_scheduler(make_model(*(windows or (None,))), config, memory_tokens)
    own = structs.replace(config, speculative_config=None, placement="packed", strategy="auto")
    small = make_scheduler(make_model(*(windows or (None,))), own, draft_tokens or memory_tokens)
    small.next_plan_id = FIRST_DRAFT_PLAN
    add_request = small.add_request
    small.add_request = lambda prompt, params: add_request(
        prompt, structs.replace(params, seed=params.seed + OWN_SEEDS)
    )
    drafts = DraftModel(small, MOST)
    main.drafting.use(drafts, drafts.follow)
    ranks = FakeRanks(small, random.Random(2), first_plan_id=FIRST_DRAFT_PLAN)
    return Pair(FakeRanks(main, random.Random(0)), ranks, drafts)


def params(max_tokens=40, seed=3, **options):
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=seed, **options)


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("windows", [(None,), (None, 6), (5,)])
@pytest.mark.parametrize("placement", ["striped", "packed"])
def test_requests_have_the_same_tokens_and_keys(placement, windows, is_async, wrong, monkeypatch):
    monkeypatch.setattr(Pair, "wrong", wrong)
    pair = make_pair(2, *windows, placement=placement, async_scheduling=is_async)
    add = pair.main.scheduler.add_request
    requests = [add([5] * length, params(seed=i)) for i, length in enumerate((1, 9, 33))]
    pair.run_to_the_end()
    assert all(request.output_token_ids == tokens_alone(request) for request in requests)
    drafting = pair.main.scheduler.drafting
    assert bool(drafting.num_accepted) == (wrong < 1)
    assert bool(drafting.num_rejected) == (wrong > 0)


def test_a_right_draft_saves_steps(monkeypatch):
    monkeypatch.setattr(Pair, "wrong", 0.0)
    pair = make_pair()
    request = pair.main.scheduler.add_request([5] * 9, params())
    pair.run_to_the_end()
    assert request.output_token_ids == tokens_alone(request)
    assert len(pair.main.plans) < 20


def test_only_given_tokens_are_found_by_others(monkeypatch):
    """A second request with the same prompt computes the end of its prompt alone, whatever the first one guessed."""
    pair = make_pair(1)
    for seed in (3, 4):
        pair.main.scheduler.add_request([5] * 33, params(seed=seed))
        pair.run_to_the_end()
    assert pair.small.scheduler.memory.num_hit_tokens == 32


def ask_now_and_then(monkeypatch):
    """Followers fall behind, and are given several tokens at once."""
    ask, rng = Drafting.ask, random.Random(4)
    monkeypatch.setattr(Drafting, "ask", lambda self, requests: ask(self, requests) if rng.random() < 0.4 else [])


def run_some():
    for seed in range(8):
        pair = make_pair(1)
        request = pair.main.scheduler.add_request([5] * 9, params(seed=seed))
        pair.run_to_the_end()
        assert request.output_token_ids == tokens_alone(request)


def test_followers_may_fall_behind(monkeypatch):
    ask_now_and_then(monkeypatch)
    run_some()


def publish_guesses(monkeypatch):
    monkeypatch.setattr(Request, "num_settled", property(lambda self: self.num_computed))


def take_one_token_too_few_back(monkeypatch):
    follow = Request.follow

    def one_less(self, token_ids, pauses_at, page_size):
        computed = self.num_computed
        follow(self, token_ids, pauses_at, page_size)
        if self.num_computed < computed:
            self.num_computed = self.num_planned = min(self.num_computed + 1, len(self.token_ids) - 1)

    monkeypatch.setattr(Request, "follow", one_less)


@pytest.mark.parametrize("mutation", [publish_guesses, take_one_token_too_few_back])
def test_a_mutation_is_noticed(mutation, monkeypatch):
    ask_now_and_then(monkeypatch)
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        run_some()


def test_tokens_that_are_not_taken_back_are_not_computed_again():
    request = Request(0, params(), 0, [7, 8, 9, 4, 5], 2, ())
    request.num_given, request.num_computed, request.num_planned = 2, 4, 4
    request.follow([7, 8, 9, 6], 8, 4)
    assert (request.token_ids, request.num_computed, request.num_given) == ([7, 8, 9, 6], 3, 4)
    request.num_computed = request.num_planned = 4
    request.token_ids += [1, 2]
    request.num_computed = request.num_planned = 5
    request.follow([7, 8, 9, 6, 1], 9, 4)
    assert (request.token_ids, request.num_computed, request.num_given) == ([7, 8, 9, 6, 1, 2], 5, 5)
    assert not request.is_paused


# -- nobody is kept waiting ------------------------------------------------------------------------------------------


def test_a_request_that_is_too_long_for_the_draft_models_pages_has_no_drafts():
    pair = make_pair(1, draft_tokens=40)
    requests = [pair.main.scheduler.add_request([5] * length, params(30, seed=length)) for length in (9, 60)]
    pair.run_to_the_end()
    assert all(request.output_token_ids == tokens_alone(request) for request in requests)
    assert requests[0].drafter.num_accepted
    assert not requests[1].drafter.num_accepted


def test_followers_that_push_each_other_out_keep_nobody_waiting():
    pair = make_pair(1, memory_tokens=2000, draft_tokens=64, async_scheduling=True)
    requests = [pair.main.scheduler.add_request([i] * 9, params(50, seed=i)) for i in range(5)]
    pair.run_to_the_end()
    assert pair.small.scheduler.num_preemptions
    assert all(request.output_token_ids == tokens_alone(request) for request in requests)


def test_requests_that_push_each_other_out_keep_their_followers():
    pair = make_pair(2, memory_tokens=60, draft_tokens=600, placement="striped")
    requests = [pair.main.scheduler.add_request([i] * 9, params(50, seed=i)) for i in range(5)]
    pair.run_to_the_end()
    assert pair.main.scheduler.num_preemptions
    assert all(request.output_token_ids == tokens_alone(request) for request in requests)


def test_a_request_may_be_cancelled_at_any_moment():
    for num_steps in range(0, 60, 3):
        pair = make_pair(2)
        first, second = (pair.main.scheduler.add_request([i] * 9, params(30, seed=i)) for i in range(2))
        for _ in range(num_steps):
            pair.step()
        pair.main.scheduler.cancel(first)
        pair.run_to_the_end()
        assert first.finish_reason in (FinishReason.ABORT, FinishReason.LENGTH)
        assert second.output_token_ids == tokens_alone(second)


def test_followers_begin_again_on_new_ranks():
    pair = make_pair(2)
    requests = [pair.main.scheduler.add_request([i] * 9, params(60, seed=i)) for i in range(3)]
    while not all(request.num_generated > 20 for request in requests):
        pair.step()
    again = make_pair(2)
    pair.main.crash()
    pair.small = again.small
    pair.drafts.begin_again(again.small.scheduler)
    pair.small.first_plan_id = again.small.scheduler.next_plan_id
    checked = pair.main.scheduler.drafting.num_accepted
    pair.run_to_the_end()
    assert all(request.output_token_ids == tokens_alone(request) for request in requests)
    assert pair.main.scheduler.drafting.num_accepted > checked


def test_a_follower_that_fails_ends_drafts_and_nothing_else(monkeypatch):
    pair = make_pair(1)
    request = pair.main.scheduler.add_request([5] * 9, params())
    while request.num_generated < 20:
        pair.step()
    pair.drafts.scheduler.finish(request.drafter.proposer.guessing, FinishReason.ERROR)
    checked = pair.main.scheduler.drafting.num_drafted
    pair.run_to_the_end()
    assert request.output_token_ids == tokens_alone(request)
    assert pair.main.scheduler.drafting.num_drafted <= checked + 1


# -- what pays -------------------------------------------------------------------------------------------------------


def test_drafts_that_take_too_long_are_not_asked_for(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(fake_ranks, "fake_token", token_of)
    monkeypatch.setattr(Pair, "wrong", 0.0)
    for step_s, pays in ((0.0001, True), (1.0, False)):
        pair = make_pair(1)
        pair.main.rng.uniform = lambda low, high: 0.01
        pair.small.rng.uniform = lambda low, high, step_s=step_s: step_s
        request = pair.main.scheduler.add_request([5] * 9, params(100))
        pair.run_to_the_end()
        assert request.output_token_ids == tokens_alone(request)
        assert (len(pair.main.plans) < 50) == pays
        assert pays or pair.main.scheduler.drafting.num_drafted < 4


def test_drafts_that_took_long_once_are_tried_again(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(fake_ranks, "fake_token", token_of)
    monkeypatch.setattr(Pair, "wrong", 0.0)
    pair = make_pair(1)
    pair.main.rng.uniform = lambda low, high: 0.01
    pair.small.rng.uniform = lambda low, high: 0.03 if len(pair.small.plans) < 5 else 0.0001
    pair.main.scheduler.add_request([5] * 9, params(500))
    pair.run_to_the_end()
    assert len(pair.main.plans) < 350
    assert pair.main.scheduler.drafting.num_accepted > 150


def test_step_time_is_known_with_the_first_step():
    rows = row_time.RowTime()
    assert rows.step_s(1) is None
    rows.learn(1, 0.01)
    assert rows.step_s(1) == pytest.approx(0.01)


def follower(prompt, pauses_at, *windows):
    """Ranks of a draft model, and a request that follows another one's prompt and has guessed up to `pauses_at`."""
    ranks = FakeRanks(
        make_scheduler(make_model(*(windows or (None,))), make_config(1, placement="packed"), 400), random.Random(0)
    )
    request = ranks.scheduler.add_request(prompt, params())
    ranks.scheduler.follow(request, prompt, pauses_at)
    run_until_idle(ranks)
    assert request.is_paused
    return ranks, request


def run_until_idle(ranks):
    ranks.submit_all()
    while ranks.in_flight:
        ranks.complete(ranks.first_plans()[0])
        ranks.check_cached()
        ranks.submit_all()


def test_a_follower_that_is_let_in_again_with_all_its_tokens_cached_waits_to_be_given_more():
    ranks, guessing = follower([5] * 8, 9)
    ranks.scheduler._preempt(guessing)
    ranks.submit_all()
    assert not guessing.in_flight, "it computes nothing in vain"
    ranks.scheduler.follow(guessing, [5] * 8 + [7], 13)
    run_until_idle(ranks)
    assert guessing.is_paused


def test_a_follower_that_has_guessed_far_enough_already_computes_nothing():
    ranks, guessing = follower([5] * 8, 12)
    drafts = DraftModel(ranks.scheduler, MOST)
    proposer = drafts.follow(guessing)
    ranks.scheduler.follow(guessing, guessing.token_ids[:9], 12)
    ranks.submit_all()
    assert guessing.is_paused
    assert not guessing.in_flight
    assert proposer.num_coming == 0, "it has not begun"
    ranks.scheduler.follow(guessing, guessing.token_ids[:10], 12)


@pytest.mark.parametrize("windows", [(None,), (4,)])
def test_a_follower_takes_no_cached_pages_for_its_guesses(windows):
    """They may be taken back, and then it would write to pages that others read."""
    ranks, guessing = follower([5] * 8, 13, *windows)
    ranks.scheduler.add_request([*guessing.token_ids[:12], 9], params(3, seed=8))
    run_until_idle(ranks)
    ranks.scheduler._preempt(guessing)
    run_until_idle(ranks)
    assert guessing.num_cached <= 8
    ranks.scheduler.follow(guessing, [5] * 8 + [(guessing.token_ids[8] + 1) % VOCAB], 14)
    run_until_idle(ranks)
    assert guessing.is_paused
