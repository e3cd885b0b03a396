"""Proves what the scheduler promises, with simulated ranks that check every plan as they would see it (`fake_ranks`).

Plans finish in random order. No torch.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from fake_ranks import (
    VOCAB,
    FakeRanks,
    assert_all_free,
    check_finished,
    make_config,
    make_model,
    make_scheduler,
    pools_of,
)

from longspan.errors import CapacityError, ConfigError
from longspan.plan.types import SampledBy
from longspan.scheduler.request import Request
from longspan.scheduler.scheduler import Scheduler
from longspan.sharding.capacity import pool_pages
from longspan.types import FinishReason, Phase, SamplingParams


@dataclass
class Scenario:
    """A random engine and a random load for it."""

    seed: int

    def run(self) -> tuple[FakeRanks, list[Request]]:
        rng = random.Random(self.seed)
        num_ranks = rng.choice([1, 2, 3, 4, 5, 8])
        page_size = rng.choice([1, 2, 4, 16])
        config = make_config(
            num_ranks,
            page_size=page_size,
            stripe_size=page_size * rng.choice([1, 2, 4]),
            max_num_batched_tokens=rng.choice([1, 3, 8, 16, 40]),
            max_num_seqs=rng.choice([1, 2, 5, 64]),
            placement=rng.choice(["auto", "auto", "packed", "striped", "spill"]),
            strategy=rng.choice(["auto", "pass_q", "pass_kv", "gather_kv"]),
            max_step_ms=rng.choice([None, None, 1, 100]),
            enable_prefix_caching=rng.random() < 0.8,
            async_scheduling=rng.random() < 0.5,
        )
        windows = rng.choice([[None], [None], [None, 5], [None, 20, 3], [7], [1, 30]])
        model = make_model(*windows)
        needed = max(64, *(w + 2 * config.max_num_batched_tokens + 4 * page_size for w in windows if w), 0)
        scheduler = make_scheduler(model, config, rng.choice([needed, needed, 2 * needed, 600]))
        ranks = FakeRanks(scheduler, rng)
        requests: list[Request] = []
        texts = [[rng.randrange(VOCAB) for _ in range(200)] for _ in range(3)]  # prompts start alike
        left = 16
        while left or scheduler.has_requests:
            while left and rng.random() < 0.6:
                left -= 1
                params = SamplingParams(
                    max_tokens=(max_tokens := rng.choice([1, 1, 2, 9, 30, 60])),
                    min_tokens=rng.choice([0, 0, min(2, max_tokens)]),
                    seed=rng.randrange(1000),
                    ignore_eos=rng.random() < 0.3,
                    stop_token_ids=rng.choice([(), (3, 4)]),
                    prompt_logprobs=rng.choice([None, None, 0]),
                )
                length = rng.choice([1, 2, 5, 16, 17, rng.randint(1, 150)])
                prompt = rng.choice(texts)[:length]
                prompt[rng.randrange(length) :] = [rng.randrange(VOCAB) for _ in range(rng.choice([0, 1, 7]))] or [7]
                try:
                    requests.append(scheduler.add_request(prompt, params))
                except CapacityError:
                    continue
            if scheduler.has_requests:
                ranks.step()
            if rng.random() < 0.03 and requests:
                scheduler.cancel(rng.choice(requests))
        ranks.end_the_rest()
        return ranks, requests


@pytest.mark.parametrize("seed", [*range(40), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(40, 120))])
def test_random_loads_keep_every_promise_and_end(seed):
    ranks, requests = Scenario(seed).run()
    for request in requests:
        if request.finish_reason is not FinishReason.ABORT:
            check_finished(request)
    assert_all_free(ranks.scheduler)


@pytest.mark.parametrize("seed", range(0, 120, 12))
def test_the_same_calls_give_the_same_plans(seed):
    first, _ = Scenario(seed).run()
    second, _ = Scenario(seed).run()
    assert first.plans == second.plans


@pytest.mark.cover
def test_the_scenarios_reach_what_they_are_meant_to_reach():
    """Else the tests above prove little: several ranks, spills, replaced tables, parallel plans, holes, waiting."""
    reached = set()
    for seed in range(40):
        ranks, requests = Scenario(seed).run()
        for plan in ranks.plans:
            reached.add(f"{len(plan.ranks)} ranks")
            reached |= {step.strategy.value for step in plan.groups}
            reached |= {"replace" for delta in plan.table_deltas if delta.replace and delta.added[0].page_idx == 0}
            reached |= {
                "late replace" for d in plan.table_deltas if d.replace and sum(r.num_pages for r in d.added) > 9
            }
            reached |= {"hole" for delta in plan.table_deltas if delta.freed_before}
            if plan.released:
                reached.add("released")
            if len({run.request_id for run in plan.query_runs}) > 1:
                reached.add("batch")
            if plan.phase is Phase.PREFILL and any(run.num_tokens == 1 for run in plan.query_runs):
                reached.add("mixed")
            reached |= {"copy" for copy in plan.page_copies if copy.source.rank != copy.target.rank}
        for request in requests:
            reached |= {"scores"} if request.prompt_logprobs else set()
            reached |= {"hit"} if request.num_cached else set()
            reached |= {"cancelled"} if request.finish_reason is FinishReason.ABORT else set()
        if any(a.num_evicted for allocators in ranks.scheduler.memory.allocators for a in allocators):
            reached.add("evicted")
    expected = {f"{n} ranks" for n in (1, 2, 3, 4, 5, 8)} | {"local", "gather_kv", "pass_kv", "pass_q"}
    expected |= {"replace", "late replace", "hole", "released", "batch", "mixed", "scores"}
    expected |= {"hit", "copy", "evicted", "cancelled"}
    assert expected <= reached, expected - reached


# -- preemption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("windows", [(None,), (None, 6)])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_requests_that_outgrow_the_memory_are_computed_again_and_lose_nothing(num_ranks, windows, caching):
    config = make_config(num_ranks, enable_prefix_caching=caching)
    scheduler = make_scheduler(make_model(*windows), config, 80)
    ranks = FakeRanks(scheduler, random.Random(0))
    params = SamplingParams(max_tokens=50, ignore_eos=True, seed=0)
    prompts = [[i] * (3 + i) for i in range(4 * num_ranks)]
    requests = [scheduler.add_request(prompt, params) for prompt in prompts]
    ranks.run_to_the_end()
    assert requests[0].num_preemptions == 0, "the oldest is never preempted"
    assert sum(request.num_preemptions for request in requests) == scheduler.num_preemptions > 0
    alone = make_scheduler(make_model(*windows), config, 800)
    others = FakeRanks(alone, random.Random(0))
    expected = [alone.add_request(prompt, params) for prompt in prompts]
    others.run_to_the_end()
    assert alone.num_preemptions == 0
    assert [r.token_ids for r in requests] == [r.token_ids for r in expected]
    assert_all_free(scheduler)


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize(("num_ranks", "memory_tokens"), [(1, 100), (1, 200), (2, 100), (4, 100)])
def test_preemption_and_readmission_do_not_chase_each_other(num_ranks, memory_tokens, caching):
    """Memory for one request per rank, 32 want it: tokens computed twice stay fewer than those computed once."""
    scheduler = make_scheduler(make_model(None), make_config(num_ranks, enable_prefix_caching=caching), memory_tokens)
    ranks = FakeRanks(scheduler, random.Random(0))
    params = SamplingParams(max_tokens=70, ignore_eos=True, seed=0)
    for i in range(32):
        scheduler.add_request([i] * 9, params)
    ranks.run_to_the_end()
    assert scheduler.num_preemptions > 0
    assert sum(run.num_tokens for plan in ranks.plans for run in plan.query_runs) <= 2 * 32 * (9 + 70 - 1)


# -- ends before the end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_requests_that_are_ended_early_give_everything_back(seed):
    """While waiting, in the middle of a prefill, in the middle of decode."""
    rng = random.Random(seed)
    config = make_config(3, placement=rng.choice(["auto", "striped", "spill"]), max_num_seqs=4)
    scheduler = make_scheduler(make_model(None, 6), config, 150)
    ranks = FakeRanks(scheduler, rng)
    params = SamplingParams(max_tokens=20, ignore_eos=True, seed=1)
    alive = [scheduler.add_request([5] * rng.randint(1, 200), params) for _ in range(10)]
    while scheduler.has_requests:
        ranks.step()
        for request in alive:
            if request.finish_reason is None and not request.in_flight and rng.random() < 0.05:
                scheduler.finish(request, FinishReason.STOP)
                scheduler.memory.check_integrity()
    assert all(request.finish_reason is not None for request in alive)
    assert_all_free(scheduler)


def test_ranks_forget_what_was_released():
    config = make_config(2, placement="striped")
    scheduler = make_scheduler(make_model(None), config, 200)
    ranks = FakeRanks(scheduler, random.Random(0))
    for _ in range(3):
        scheduler.add_request([5] * 40, SamplingParams(max_tokens=2, ignore_eos=True, seed=0))
        ranks.run_to_the_end()
    assert [sorted(tables) for mirror in ranks.mirrors for tables in mirror] == [[2], [2]]


# -- fairness --------------------------------------------------------------------------------------------------------


def feed(ranks: FakeRanks, watched: Request, prompt_len: int, max_tokens: int, placement_ranks: int) -> int:
    """Keep short requests waiting all the time; count the plans until the watched request ends."""
    scheduler = ranks.scheduler
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=0)
    before = len(ranks.plans)
    while watched.finish_reason is None:
        while len(scheduler.waiting) < 2 * placement_ranks:
            scheduler.add_request([5] * prompt_len, params)
        ranks.step()
        assert len(ranks.plans) - before < 4000, "starved"
    return len(ranks.plans) - before


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(16, 1), (3, 1), (5, 4), (16, 30)])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_striped_request_is_not_starved_by_packed_ones(prompt_len, max_tokens, num_ranks):
    """In prefill and in decode, however many short requests wait: it has its turn after a few plans of each rank."""
    scheduler = make_scheduler(make_model(None), make_config(num_ranks, max_num_seqs=8), 400)
    ranks = FakeRanks(scheduler, random.Random(0))
    watched = scheduler.add_request([5] * 160, SamplingParams(max_tokens=20, ignore_eos=True, seed=0))
    num_plans = feed(ranks, watched, prompt_len, max_tokens, num_ranks)
    assert watched.allocation.ranks == set(range(num_ranks))
    own = [plan for plan in ranks.plans if any(run.request_id == watched.request_id for run in plan.query_runs)]
    assert num_plans <= len(own) * (1 + 4 * num_ranks)


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_a_decoding_request_is_not_starved_by_prefills_on_its_rank(max_tokens):
    scheduler = make_scheduler(make_model(None), make_config(1, max_num_seqs=8), 400)
    ranks = FakeRanks(scheduler, random.Random(0))
    watched = scheduler.add_request([5] * 4, SamplingParams(max_tokens=20, ignore_eos=True, seed=0))
    assert feed(ranks, watched, 16, max_tokens, 1) <= 20 * 3


def test_a_long_prefill_does_not_stop_the_decode_of_others():
    """Between two chunks of a long prompt, the requests that decode on its rank get a token each."""
    scheduler = make_scheduler(make_model(None), make_config(1), 800)
    ranks = FakeRanks(scheduler, random.Random(0))
    decoding = [scheduler.add_request([5], SamplingParams(max_tokens=15, ignore_eos=True, seed=0)) for _ in range(3)]
    ranks.step()
    long = scheduler.add_request([5] * 160, SamplingParams(max_tokens=1, seed=0))
    while long.num_computed < 160:
        ranks.step()
    assert all(request.num_generated >= 9 for request in decoding)
    ranks.run_to_the_end()


def test_a_burst_of_prompts_lets_a_token_through_with_every_chunk():
    scheduler = make_scheduler(make_model(None), make_config(1), 800)
    ranks = FakeRanks(scheduler, random.Random(0))
    for _ in range(8):
        scheduler.add_request([5] * 16, SamplingParams(max_tokens=12, ignore_eos=True, seed=0))
    ranks.run_to_the_end()
    sampled = [[row.request_id for row in plan.samples] for plan in ranks.plans]
    first = [next(i for i, ids in enumerate(sampled) if request_id in ids) for request_id in range(8)]
    assert first == sorted(first), "prompts are computed in the order they came"
    for request_id in range(8):
        assert all(request_id in ids for ids in sampled[first[request_id] : first[request_id] + 12])


def test_requests_are_admitted_in_the_order_they_came():
    """A long one at the head is not overtaken by short ones that would fit."""
    scheduler = make_scheduler(make_model(None), make_config(2), 64)
    ranks = FakeRanks(scheduler, random.Random(0))
    params = SamplingParams(max_tokens=1, seed=0)
    order = [scheduler.add_request([5] * length, params) for length in (60, 120, 4, 4)]
    seen: list[int] = []
    while scheduler.has_requests:
        ranks.submit_all()
        seen += [r.request_id for r in scheduler.running if r.request_id not in seen]
        ranks.step()
    assert seen == [request.request_id for request in order]


def test_plans_on_other_ranks_do_not_wait_for_a_long_prefill():
    scheduler = make_scheduler(make_model(None), make_config(2, placement="packed"), 200)
    ranks = FakeRanks(scheduler, random.Random(0))
    scheduler.add_request([5] * 100, SamplingParams(max_tokens=1, seed=0))
    short = scheduler.add_request([5] * 4, SamplingParams(max_tokens=8, ignore_eos=True, seed=0))
    ranks.submit_all()
    (long_plan,) = [plan for plan in ranks.in_flight.values() if plan.query_runs[0].request_id == 0]
    while short.finish_reason is None:
        (other,) = [plan for plan in ranks.in_flight.values() if plan is not long_plan]
        ranks.complete(other)
        ranks.submit_all()
    assert long_plan.plan_id in ranks.in_flight


# -- placement in motion ---------------------------------------------------------------------------------------------


def test_a_spill_tells_the_rank_that_joins_later_the_whole_table():
    """Rank 1 joins when the home rank is full; plans before that name rank 0 alone."""
    scheduler = make_scheduler(make_model(None), make_config(2, placement="spill"), 40)
    ranks = FakeRanks(scheduler, random.Random(0))
    scheduler.add_request([5] * 60, SamplingParams(max_tokens=5, ignore_eos=True, seed=0))
    ranks.run_to_the_end()
    alone = [plan for plan in ranks.plans if plan.ranks == (0,)]
    assert [run.end for plan in alone for run in plan.query_runs] == [16, 32]
    joined = ranks.plans[len(alone)]
    assert joined.ranks == (0, 1)
    (delta,) = joined.table_deltas
    assert delta.replace
    assert sum(run.num_pages for run in delta.added) * 4 >= 40
    assert not any(d.replace for plan in ranks.plans[len(alone) + 1 :] for d in plan.table_deltas)


@pytest.mark.parametrize("budget", [4, 8, 16, 64])
def test_every_step_of_a_striped_prefill_keeps_all_ranks_busy(budget):
    """Also where a rank's budget is smaller than a stripe."""
    config = make_config(4, page_size=2, stripe_size=16, max_num_batched_tokens=budget, placement="striped")
    scheduler = make_scheduler(make_model(None), config, 2000)
    ranks = FakeRanks(scheduler, random.Random(0))
    scheduler.add_request([5] * 512, SamplingParams(max_tokens=1, seed=0))
    ranks.run_to_the_end()
    for plan in ranks.plans:
        tokens = [sum(run.num_tokens for run in plan.query_runs if run.compute_rank == rank) for rank in range(4)]
        assert tokens == [budget] * 4
    assert len(ranks.plans) == 512 // (4 * budget)


def test_short_requests_stay_on_one_rank_each_and_long_ones_go_over_all():
    scheduler = make_scheduler(make_model(None), make_config(4), 400)
    params = SamplingParams(max_tokens=1, seed=0)
    shorts = [scheduler.add_request([5] * 20, params) for _ in range(4)]
    long = scheduler.add_request([5] * 200, params)
    FakeRanks(scheduler, random.Random(0)).submit_all()
    assert sorted(request.allocation.page_ranks[0][0] for request in shorts) == [0, 1, 2, 3]
    assert all(len(request.allocation.page_ranks) == 1 for request in shorts)
    assert long.allocation.ranks == {0, 1, 2, 3}


def test_a_request_uses_all_memory_of_all_ranks_but_not_a_page_more():
    config = make_config(3)
    scheduler = make_scheduler(make_model(None), config, 40)
    ranks = FakeRanks(scheduler, random.Random(0))
    request = scheduler.add_request([5] * 118, SamplingParams(max_tokens=3, ignore_eos=True, seed=0))
    ranks.run_to_the_end()
    check_finished(request)
    with pytest.raises(CapacityError):
        scheduler.add_request([5] * 119, SamplingParams(max_tokens=3))
    assert_all_free(scheduler)


# -- refusals --------------------------------------------------------------------------------------------------------


def refuse(scheduler: Scheduler, prompt: Sequence[int], **params) -> str:
    with pytest.raises(ConfigError) as error:
        scheduler.add_request(prompt, SamplingParams(**params))
    assert not scheduler.has_requests
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rejects_an_empty_prompt():
    message = refuse(make_scheduler(make_model(None), make_config(), 64), [])
    assert message == "prompt: got no tokens, legal is at least one"


@pytest.mark.parametrize("token_id", [-1, VOCAB, 10**9])
def test_rejects_token_ids_that_the_model_does_not_know(token_id):
    scheduler = make_scheduler(make_model(None), make_config(), 64)
    assert refuse(scheduler, [3, token_id, 4]) == f"token id: got {token_id}, legal is 0 to {VOCAB - 1}"
    if token_id >= 0:
        assert refuse(scheduler, [3], stop_token_ids=(token_id,)).startswith(f"token id: got {token_id}")
    scheduler.add_request([0, VOCAB - 1], SamplingParams())


def test_rejects_more_positions_than_the_model_has():
    scheduler = make_scheduler(make_model(None, max_position=30), make_config(), 64)
    message = refuse(scheduler, [5] * 25, max_tokens=6)
    assert "got 25 + 6 = 31 tokens, legal is at most 30" in message
    scheduler.add_request([5] * 25, SamplingParams(max_tokens=5))


@pytest.mark.parametrize("placement", ["auto", "packed", "striped", "spill"])
@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("windows", [[None], [None, 4], [3]])
def test_rejects_a_request_that_never_fits_with_the_numbers_and_ways_out_that_work(placement, num_ranks, windows):
    config = make_config(num_ranks, placement=placement)
    model = make_model(*windows)
    scheduler = make_scheduler(model, config, 40)
    if windows == [3]:  # what a window needs fits: then nothing is too long
        scheduler.add_request([5] * 1000, SamplingParams(max_tokens=10))
        return
    message = refuse(scheduler, [5] * 990, max_tokens=11)
    assert "got 990 + 11 = 1001 tokens" in message
    (limit,) = map(int, re.findall(r"legal is at most (\d+)", message))
    scheduler.add_request([5] * (limit - 3), SamplingParams(max_tokens=3))
    (num_bytes,) = map(int, re.findall(r"kv_cache_memory of at least (\d+) bytes", message))
    num_pages = pool_pages(model, num_bytes, config.page_size, config.max_num_batched_tokens)
    Scheduler(model, config, pools_of(config, num_pages)).add_request([5] * 990, SamplingParams(max_tokens=11))
    (more_ranks,) = map(int, re.findall(r"context_parallel_size of at least (\d+)", message))
    wider = make_config(more_ranks, placement="striped" if placement == "packed" else placement)
    make_scheduler(model, wider, 40).add_request([5] * 990, SamplingParams(max_tokens=11))


def test_rejects_one_token_more_than_fits_and_accepts_one_less():
    scheduler = make_scheduler(make_model(None), make_config(2), 40)
    message = refuse(scheduler, [5] * 79, max_tokens=3)
    assert "legal is at most 81 (2 ranks x 10 pages x 4 tokens, and one that needs no page)" in message
    scheduler.add_request([5] * 78, SamplingParams(max_tokens=3))


def test_a_request_that_fits_packed_only_elsewhere_names_the_placement_that_fits():
    scheduler = make_scheduler(make_model(None), make_config(2, placement="packed"), 40)
    assert "placement striped or spill" in refuse(scheduler, [5] * 60, max_tokens=1)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize(("stripe_size", "budget"), [(8, 16), (8, 24), (8, 30), (16, 100), (12, 30), (64, 20)])
def test_every_chunk_of_a_striped_prompt_is_balanced(num_ranks, stripe_size, budget):
    config = make_config(num_ranks, placement="striped", stripe_size=stripe_size, max_num_batched_tokens=budget)
    scheduler = make_scheduler(make_model(None), config, 4000)
    scheduler.add_request([5] * 1600, SamplingParams(max_tokens=1))
    ranks = FakeRanks(scheduler, random.Random(0))
    ranks.run_to_the_end()
    chunks = [plan for plan in ranks.plans if plan.phase is Phase.PREFILL]
    for plan in chunks[:-1]:
        tokens = [
            sum(run.num_tokens for run in plan.query_runs if run.compute_rank == rank) for rank in range(num_ranks)
        ]
        assert len(set(tokens)) == 1, "same number of tokens"
        per_stripe = min(stripe_size, budget // 4 * 4)
        if tokens[0] // per_stripe % 2 == 0:  # snake order comes round: same attention work too
            work = [
                sum(t for run in plan.query_runs if run.compute_rank == rank for t in range(run.position, run.end))
                for rank in range(num_ranks)
            ]
            assert len(set(work)) == 1


def test_spill_goes_on_to_the_next_rank_where_every_group_has_a_window():
    config = make_config(2, placement="spill", max_num_batched_tokens=64)
    model = make_model(64)
    scheduler = Scheduler(model, config, [(20,)] * 2)  # 80 tokens: less than one window and one step
    request = scheduler.add_request([5] * 100, SamplingParams(max_tokens=5))
    FakeRanks(scheduler, random.Random(0)).run_to_the_end()
    assert request.finish_reason is not None
    assert request.allocation.ranks == {0, 1}


def test_ended_requests_are_reported_only_to_ranks_that_knew_them():
    config = make_config(4, placement="packed")
    scheduler = make_scheduler(make_model(None), config, 64)
    ranks = FakeRanks(scheduler, random.Random(0))
    for _ in range(20):
        scheduler.add_request([5] * 5, SamplingParams(max_tokens=2))
        ranks.run_to_the_end()
    assert [len(scheduler._unreported[rank]) for rank in range(4)] == [1, 0, 0, 0]


def test_the_ways_out_of_a_refusal_are_themselves_legal():
    config = make_config(2, strategy="local", stripe_size=12, page_size=12)
    message = refuse(Scheduler(make_model(None), config, [(1,)] * 2), [5] * 20, max_tokens=1)
    assert "placement striped or spill, and another strategy than local" in message
    assert "page_size 6" not in message or 12 % 6 == 0
    config = make_config(1, stripe_size=50, page_size=50, kv_cache_memory=8 * 100)
    message = refuse(make_scheduler(make_model(None), config, 100), [5] * 101, max_tokens=1)
    assert all(50 % int(size) == 0 for size in re.findall(r"page_size (\d+)", message))


# -- running ahead ---------------------------------------------------------------------------------------------------


def run_ahead(num_ranks: int = 1, memory_tokens: int = 200, **options) -> FakeRanks:
    config = make_config(num_ranks, async_scheduling=True, **options)
    return FakeRanks(make_scheduler(make_model(None), config, memory_tokens), random.Random(0))


def ahead(ranks: FakeRanks) -> list[bool]:
    """Per plan, whether its tokens are sampled by the one before."""
    return [isinstance(plan.query_runs[0].tokens, SampledBy) for plan in ranks.plans]


def test_decodes_run_one_step_ahead_of_their_tokens_and_no_step_too_many():
    ranks = run_ahead()
    params = SamplingParams(max_tokens=6, ignore_eos=True, seed=0)
    requests = [ranks.scheduler.add_request([i] * 4, params) for i in range(3)]
    ranks.step()
    ranks.submit_all()
    assert len(ranks.in_flight) == 2
    ranks.run_to_the_end()
    assert ahead(ranks) == [False, False, True, True, True, True]
    for request in requests:
        check_finished(request)


def test_a_request_that_ends_while_the_next_step_runs_leaves_its_pages_at_once():
    ranks = run_ahead()
    request = ranks.scheduler.add_request([5] * 4, SamplingParams(max_tokens=40, ignore_eos=True, seed=0))
    ranks.step()
    ranks.submit_all()
    first, second = ranks.in_flight.values()
    assert ranks.complete(first) == [request]
    ranks.scheduler.finish(request, FinishReason.STOP)  # its text holds a stop string
    assert all(allocator.num_used == 0 for allocator in ranks.scheduler.memory.allocators[0])
    other = ranks.scheduler.add_request([7] * 4, SamplingParams(max_tokens=4, ignore_eos=True, seed=0))
    ranks.submit_all()
    assert list(ranks.in_flight.values()) == [second], "a rank has one plan behind another at most"
    assert ranks.complete(second) == []
    assert request.num_generated == 2
    ranks.run_to_the_end()
    check_finished(other)


@pytest.mark.parametrize(
    "params",
    [{"presence_penalty": 0.5}, {"frequency_penalty": 0.5}, {"repetition_penalty": 1.5}, {"min_tokens": 5}],
)
def test_nothing_runs_ahead_where_the_next_row_depends_on_a_token_that_is_not_known(params):
    ranks = run_ahead()
    plain = SamplingParams(max_tokens=5, ignore_eos=True, seed=0)
    special = ranks.scheduler.add_request([5] * 4, SamplingParams(max_tokens=5, ignore_eos=True, seed=0, **params))
    beside = ranks.scheduler.add_request([6] * 4, plain)
    ranks.run_to_the_end()
    assert not any(ahead(ranks)), "nor does one request overtake another"
    check_finished(special)
    check_finished(beside)


def test_nothing_runs_ahead_while_a_request_waits_for_the_rank():
    ranks = run_ahead(max_num_batched_tokens=8)
    scheduler = ranks.scheduler
    scheduler.add_request([5] * 4, SamplingParams(max_tokens=20, ignore_eos=True, seed=0))
    ranks.step()
    plan = scheduler.schedule()
    ranks.submit(plan)
    prompt = scheduler.add_request([6] * 30, SamplingParams(max_tokens=1, seed=0))
    assert scheduler.schedule() is None
    ranks.complete(plan)
    assert scheduler.schedule().phase is Phase.PREFILL
    assert prompt.in_flight


def test_a_token_that_another_rank_computes_is_waited_for():
    """It is known where it was sampled, and nowhere else."""
    ranks = run_ahead(2, placement="striped", page_size=2, stripe_size=4)
    request = ranks.scheduler.add_request([5] * 16, SamplingParams(max_tokens=17, ignore_eos=True, seed=0))
    ranks.run_to_the_end()
    check_finished(request)
    decodes = [plan.query_runs[0] for plan in ranks.plans if plan.phase is Phase.DECODE]
    owners = [run.compute_rank for run in decodes]
    assert len(set(owners)) == 2
    changes = [i > 0 and owners[i] != owners[i - 1] for i in range(len(owners))]
    assert [isinstance(run.tokens, SampledBy) for run in decodes[1:]] == [not changed for changed in changes[1:]]
