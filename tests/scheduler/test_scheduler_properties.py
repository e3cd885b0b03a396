"""Attacks the scheduler: hypothesis chooses engine, requests, cancellations and the order in which plans end.

The machine, and what must hold, are in `scheduler_machine`.
"""

import random

import pytest
from fake_ranks import (
    FakeRanks,
    assert_all_free,
    make_config,
    make_model,
    pools_of,
    tokens_alone,
)
from lossy_machines import CrashingMachine, TieredMachine
from scheduler_machine import REACHED, SchedulerMachine, run_machine

from longspan.scheduler.invariants import check_books
from longspan.scheduler.request import Request
from longspan.scheduler.scheduler import Scheduler
from longspan.sharding.capacity import pages_by_group
from longspan.types import FinishReason, SamplingParams

OFTEN = {
    "1 ranks",
    "2 ranks",
    "batch",
    "drafts",
    "evicted pages",
    "hit tokens",
    "local",
    "mixed",
    "preemptions",
    "ran ahead",
    "right drafts",
    "wrong drafts",
}
WITH_TIERS = {"evicted pages", "hit tokens", "pages loaded", "pages stored", "waited for pages"}
WITH_TIERS_IN_MANY = WITH_TIERS | {
    "left while pages were loaded",
    "pages kept in memory",
    "pages loaded from memory",
    "pages not loaded",
    "pages removed",
}
ALWAYS_IN_MANY = OFTEN | {
    "3 ranks",
    "8 ranks",
    "cancelled in flight",
    "ended by a plan that another stood behind",
    "cancelled when preempted",
    "cancelled when waiting",
    "copied pages",
    "drafts beside prompts",
    "drafts on several ranks",
    "gather_kv",
    "hits from states",
    "kept states",
    "moved states",
    "pass_kv",
    "pass_q",
    "refused",
    "refused again",
}


def run_until_reached(wanted: set[str], max_examples: int, base: type[SchedulerMachine], num_steps: int) -> None:
    """Run fixed histories until all of this has happened in them: which ones a number stands for changes with the
    code."""
    missing, number = set(wanted), 0
    while missing and number < 8:
        run_machine(max_examples, is_fixed=True, base=base, num_steps=num_steps, number=number)
        missing, number = {name for name in missing if not REACHED[name]}, number + 1
    assert not missing, "else this proves little"


@pytest.mark.cover
def test_any_history_keeps_every_promise_and_gives_every_request_its_tokens():
    run_until_reached(OFTEN, 8, SchedulerMachine, 30)


@pytest.mark.cover
def test_a_history_with_lost_ranks_keeps_every_promise_too():
    run_until_reached({"crashes with plans in flight"}, 10, CrashingMachine, 12)


@pytest.mark.cover
def test_a_history_with_tiers_keeps_every_promise_too():
    run_until_reached(WITH_TIERS, 6, TieredMachine, 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_history_with_tiers_keeps_every_promise_often():
    run_machine(200, is_fixed=False, base=TieredMachine)
    assert {name for name in WITH_TIERS_IN_MANY if not REACHED[name]} == set()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_history_with_lost_ranks_keeps_every_promise_often():
    run_machine(200, is_fixed=False, base=CrashingMachine)
    wanted = {"crashes with plans in flight", "crashes of cancelled requests", "suspects alone"}
    assert {name for name in wanted if not REACHED[name]} == set()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_history_keeps_every_promise_and_gives_every_request_its_tokens_often():
    run_machine(400, is_fixed=False)
    assert {name for name in ALWAYS_IN_MANY if not REACHED[name]} == set()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_request_that_is_cancelled_after_its_preemption_leaves_nothing_behind(num_ranks):
    ranks = FakeRanks(Scheduler(make_model(None, 6), make_config(num_ranks), [(20, 20)] * num_ranks), random.Random(0))
    scheduler, params = ranks.scheduler, SamplingParams(max_tokens=50, ignore_eos=True, seed=0)
    requests = [scheduler.add_request([i] * 9, params) for i in range(6 * num_ranks)]
    cancelled: list[Request] = []
    while scheduler.has_requests:
        ranks.step()
        for request in [request for request in scheduler.waiting if request.num_preemptions]:
            scheduler.cancel(request)
            cancelled.append(request)
            check_books(ranks.scheduler)
    assert len(cancelled) > num_ranks
    for request in requests:
        assert request.finish_reason is (FinishReason.ABORT if request in cancelled else FinishReason.LENGTH)
        assert request.output_token_ids == tokens_alone(request)[: request.num_generated]
    assert_all_free(scheduler)


def run_small(budget: int, num_decodes: int, prompt_len: int, num_ranks: int = 1) -> tuple[FakeRanks, list[Request]]:
    """Requests that decode, more than one step may compute, then one with a prompt."""
    config = make_config(num_ranks, max_num_batched_tokens=budget, placement="packed" if num_ranks == 1 else "auto")
    ranks = FakeRanks(Scheduler(make_model(None), config, pools_of(config, (400,))), random.Random(0))
    params = SamplingParams(max_tokens=60, ignore_eos=True, seed=0)
    decoding = [ranks.scheduler.add_request([i], params) for i in range(num_decodes)]
    while not all(request.num_generated for request in decoding):
        ranks.step()
    prompt = ranks.scheduler.add_request([9] * prompt_len, params)
    while not prompt.num_generated:
        ranks.step()
    return ranks, decoding


@pytest.mark.parametrize(("budget", "num_decodes"), [(1, 1), (1, 3), (2, 2), (4, 4), (4, 9), (16, 40)])
def test_a_prompt_gets_on_however_many_requests_decode(budget, num_decodes):
    """Also where the decodes alone are more than the token budget of a step."""
    ranks, decoding = run_small(budget, num_decodes, 16)
    assert all(request.finish_reason is None for request in decoding), "the prompt did not wait for their ends"
    tokens = [request.num_generated for request in decoding]
    assert min(tokens) > 1, "nor did they wait for the prompt's end"
    assert max(tokens) <= 2 * min(tokens) + 2, "they take turns"
    ranks.run_to_the_end()
    assert_all_free(ranks.scheduler)


def test_a_request_that_outgrows_a_small_rank_goes_on_on_a_larger_one():
    """Also if it is the only one that is left, so that no other one can make room."""
    config = make_config(4, rank_weights=(1.0, 1.0, 0.5, 0.25), placement="packed", async_scheduling=True)
    model = make_model(None, 20, 3)
    pages = pages_by_group(model, 50, config.page_size, config.max_num_batched_tokens)
    ranks = FakeRanks(Scheduler(model, config, pools_of(config, pages)), random.Random(0))
    requests: list[Request] = []
    for prompt_len, num_steps in ((1, 78), (16, 0)):
        params = [SamplingParams(max_tokens=50, seed=i, ignore_eos=True) for i in range(2)]
        requests += [ranks.scheduler.add_request([i] * prompt_len, one) for i, one in enumerate(params)]
        for _ in range(num_steps):
            ranks.step()
    ranks.run_to_the_end()
    assert ranks.scheduler.num_preemptions
    assert [request.output_token_ids for request in requests] == [tokens_alone(request) for request in requests]
    assert_all_free(ranks.scheduler)
