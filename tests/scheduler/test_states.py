"""Slots of states: promised like pages, moved by plans, kept for others, and found only where pages are found too."""

import random

import pytest
from fake_ranks import FakeRanks, assert_all_free, make_config, make_model

from longspan.scheduler.scheduler import Scheduler
from longspan.types import SamplingParams

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, seed=0)


def make_ranks(num_ranks=1, pages=40, slots=4, **options):
    config = make_config(num_ranks, **{"page_size": 4, "state_snapshot_tokens": 8, **options})
    return FakeRanks(
        Scheduler(make_model(None, has_state=True), config, ((pages, slots),) * num_ranks), random.Random(0)
    )


def run_one(ranks, prompt, params=PARAMS):
    request = ranks.scheduler.add_request(prompt, params)
    ranks.run_to_the_end()
    return request


def states_of(ranks, request):
    return [step for plan in ranks.plans for step in plan.states if step.request_id == request.request_id]


def test_a_request_that_stays_on_its_rank_has_one_slot_all_the_time():
    ranks = make_ranks(enable_prefix_caching=False)
    steps = states_of(ranks, run_one(ranks, list(range(30))))
    assert steps[0].source is None
    assert len({step.target for step in steps}) == 1
    assert all(step.source == step.target for step in steps[1:])
    assert ranks.scheduler.memory.allocators[0][1].peak_used == 1
    assert_all_free(ranks.scheduler)


def test_a_state_is_kept_at_every_multiple_and_at_the_last_full_page_of_a_prompt():
    ranks = make_ranks(slots=20)
    steps = states_of(ranks, run_one(ranks, list(range(30))))
    assert [kept.position for step in steps for kept in step.kept] == [8, 16, 24, 28, 32]


@pytest.mark.parametrize(
    ("prompt", "cached"),
    [
        (list(range(30)), 28),
        (list(range(29)), 28),
        (list(range(28)), 24),
        ([*range(20), 49], 16),
        ([*range(8), 49], 8),
        ([*range(7), 49, 49], 0),
    ],
)
def test_a_hit_is_the_longest_prefix_with_pages_and_a_state(prompt, cached):
    ranks = make_ranks(slots=20)
    run_one(ranks, list(range(30)))
    assert run_one(ranks, prompt).num_cached == cached


def test_no_more_requests_run_than_there_are_slots():
    ranks = make_ranks(slots=2, pages=100)
    requests = [ranks.scheduler.add_request([i] * 5, PARAMS) for i in range(5)]
    ranks.submit_all()
    assert len(ranks.scheduler.running) == 2
    ranks.run_to_the_end()
    assert all(request.num_generated == 6 for request in requests)
    assert_all_free(ranks.scheduler)


def test_the_only_slot_is_not_kept_from_a_request_by_what_others_left():
    ranks = make_ranks(slots=1)
    for i in range(3):
        assert run_one(ranks, [i] * 20).num_generated == 6
    assert_all_free(ranks.scheduler)


def test_a_striped_prompt_hands_its_state_on_and_generated_tokens_stay():
    ranks = make_ranks(3, placement="striped", stripe_size=4)
    steps = states_of(ranks, run_one(ranks, list(range(40)), SamplingParams(max_tokens=30, ignore_eos=True, seed=0)))
    moved = [step for step in steps if step.source is not None and step.source.rank != step.target.rank]
    generated = [step for step in steps if step.source is not None][-28:]
    assert len({step.target.rank for step in generated}) == 1
    assert len(moved) <= len(steps) - len(generated)


def test_a_full_rank_passes_the_state_to_the_next():
    ranks = make_ranks(2, pages=4, placement="spill")
    request = run_one(ranks, list(range(14)), SamplingParams(max_tokens=12, ignore_eos=True, seed=0))
    assert {step.target.rank for step in states_of(ranks, request)} == {0, 1}
    assert_all_free(ranks.scheduler)


def test_a_plan_that_goes_on_is_a_few_bytes_with_states_too():
    ranks = make_ranks(pages=100, page_size=16, stripe_size=16, state_snapshot_tokens=16)
    run_one(ranks, list(range(10)), SamplingParams(max_tokens=20, ignore_eos=True, seed=0))
    assert sum(plan.follows is not None for plan in ranks.plans) >= 15
