"""Proves how long chunks are predicted to take, and that prompts are cut so that no step takes longer than asked."""

import random

import pytest
from fake_ranks import FakeRanks, assert_all_free, check_finished, make_config, make_model
from hypothesis import given
from hypothesis import strategies as st

from longspan.costmodel.step_time import FIRST_FLOPS_PER_S, StepTime
from longspan.kv.layout import KVGroup, KVSpec
from longspan.plan.types import Plan, PlanResult, RankResult, SampledToken
from longspan.scheduler.chunks import ENDING_FACTOR
from longspan.scheduler.scheduler import Scheduler
from longspan.types import AttentionParams, ModelSpec, SamplingParams, Strategy

NUM_PARAMETERS = 1000


def cost_model(*windows: int | None) -> ModelSpec:
    """Two layers per window, keys of 3 and values of 5 elements, 4 query heads."""
    groups = tuple(
        KVGroup((2 * i, 2 * i + 1), KVSpec.uniform(2, 3, 5, "float32", window), 4) for i, window in enumerate(windows)
    )
    params = tuple(AttentionParams(1.0, window=window) for window in windows for _ in range(2))
    return ModelSpec("fake", len(params), 50, None, (1,), groups, params, num_parameters=NUM_PARAMETERS)


def counted_flops(windows: tuple[int | None, ...], start: int, end: int) -> float:
    """Two operations per weight and token, and per element of key and value for every pair that attends."""
    total = 0
    for query in range(start, end):
        total += 2 * NUM_PARAMETERS
        for window in windows:
            keys = sum(window is None or query - key < window for key in range(query + 1))
            total += keys * 2 * 4 * 2 * (3 + 5)  # keys, layers, heads, operations, elements
    return total


lengths = st.integers(0, 70)


@given(st.sampled_from([(None,), (5,), (None, 7), (1, 40), (100, None, 3)]), lengths, lengths)
def test_chunk_flops_equal_those_counted_pair_by_pair(windows, a, b):
    start, end = sorted((a, b))
    assert StepTime(cost_model(*windows), 1).chunk_flops(start, end) == counted_flops(windows, start, end)


@given(st.sampled_from([(None,), (5,), (None, 7)]), st.lists(lengths, min_size=3, max_size=3).map(sorted))
def test_a_chunk_takes_as_much_as_its_parts(windows, cuts):
    a, b, c = cuts
    step_time = StepTime(cost_model(*windows), 1)
    assert step_time.chunk_flops(a, b) + step_time.chunk_flops(b, c) == step_time.chunk_flops(a, c)


def learn_steps(step_time: StepTime, rate: float, overhead_s: float, num_steps: int) -> None:
    """Steps of 1 to 3 Mflops on ranks of some speed."""
    for i in range(num_steps):
        flops = 1e6 * (1 + i % 3)
        step_time.learn(flops, step_s=overhead_s + flops / rate)


@pytest.mark.parametrize(("rate", "overhead_s"), [(1e9, 0.0), (1e9, 0.001), (7e9, 0.0003), (3e7, 0.03)])
def test_rate_and_overhead_are_learnt_in_a_few_steps_and_followed_when_they_change(rate, overhead_s):
    step_time = StepTime(cost_model(None), 4)
    assert step_time.flops_per_s == 4 * FIRST_FLOPS_PER_S
    learn_steps(step_time, rate, overhead_s, 3)
    assert step_time.flops_per_s == pytest.approx(rate, rel=1e-6)
    assert step_time.overhead_s == pytest.approx(overhead_s, abs=1e-9)
    learn_steps(step_time, rate / 5, 2 * overhead_s, 200)
    assert step_time.flops_per_s == pytest.approx(rate / 5, rel=1e-3)
    assert step_time.overhead_s == pytest.approx(2 * overhead_s, abs=1e-5)
    for step_s in (overhead_s * 3 + 0.01, 1.0):
        expected = (step_s - 2 * overhead_s) * rate / 5
        assert step_time.flops_within(step_s) == pytest.approx(expected, rel=1e-2)


def test_steps_of_one_size_teach_what_such_a_step_takes():
    """They cannot tell overhead from rate."""
    step_time = StepTime(cost_model(None), 1)
    for _ in range(50):
        step_time.learn(2e6, 0.01)
    assert step_time.flops_within(0.01) == pytest.approx(2e6)


@given(st.lists(st.tuples(st.floats(1e3, 1e15), st.floats(1e-6, 1e4)), min_size=1, max_size=30))
def test_whatever_steps_took_the_prediction_is_a_positive_number(steps):
    step_time = StepTime(cost_model(None), 1)
    for flops, step_s in steps:
        step_time.learn(flops, step_s)
        assert 0 < step_time.flops_per_s < float("inf")
        assert step_time.overhead_s >= 0
        assert step_time.flops_within(0.2) >= 0.04 * step_time.flops_per_s > 0


def test_noise_about_a_steady_time_stays_noise():
    """However noise falls, a step as long as those seen is predicted to do what they did, give or take."""
    for seed in range(50):
        rng, step_time = random.Random(seed), StepTime(cost_model(None), 1)
        for _ in range(40):
            flops = rng.uniform(1e6, 2e6)
            step_time.learn(flops, flops / 1e8 * rng.uniform(0.8, 1.4))
        assert 0.5e6 < step_time.flops_within(0.015) < 3e6


def test_steps_that_say_nothing_about_the_rate_do_not_change_it():
    step_time = StepTime(cost_model(None), 1)
    step_time.learn(0.0, 1.0)
    step_time.learn(1.0, 0.0)
    assert step_time.flops_per_s == FIRST_FLOPS_PER_S


# -- chunks ----------------------------------------------------------------------------------------------------------

RATE = 1e8
"""Flops per second of the ranks below."""

LIMIT = 0.1 * RATE * (1 + 1e-9)
"""Flops in 100 ms."""


class TimedRanks(FakeRanks):
    """Ranks that take as long for a step as the one with most to compute needs at a steady rate."""

    def __init__(self, scheduler: Scheduler, rng: random.Random, rate: float) -> None:
        super().__init__(scheduler, rng)
        self.rate = rate
        self._flops: dict[int, list[float]] = {}  # by plan id

    def submit(self, plan: Plan) -> None:
        super().submit(plan)
        self._flops[plan.plan_id] = self._count(plan)

    def flops(self, plan: Plan) -> list[float]:
        """Of every rank."""
        return self._flops[plan.plan_id]

    def _count(self, plan: Plan) -> list[float]:
        """Weights where tokens are computed; attention where the strategy brings queries and keys together."""
        num_ranks, groups = self.scheduler.config.context_parallel_size, self.scheduler.model.kv_groups
        flops = [0.0] * num_ranks
        requests = {request.request_id: request for request in self.scheduler.running}
        for run in plan.query_runs:
            flops[run.compute_rank] += run.num_tokens * self.scheduler.step_time.token_flops
            for i, (group, step) in enumerate(zip(groups, plan.groups, strict=True)):
                table, window = requests[run.request_id].allocation.tables[i], group.spec.window
                pair_flops = len(group.layers) * group.pair_flops()
                for query in range(run.position, run.end):
                    first = 0 if window is None else max(0, query - window + 1)
                    for key_rank in range(num_ranks):
                        rank = key_rank if step.strategy in (Strategy.PASS_Q, Strategy.TREE) else run.compute_rank
                        flops[rank] += table.count_on(key_rank, first, query + 1) * pair_flops
        return flops

    def complete(self, plan: Plan):
        del self.in_flight[plan.plan_id]
        step_s = max(self.flops(plan)) / self.rate
        owner = {
            (run.request_id, position): run.compute_rank
            for run in plan.query_runs
            for position in range(run.position, run.end)
        }
        return self.scheduler.update(
            PlanResult(
                plan.plan_id,
                tuple(
                    RankResult(
                        plan.plan_id,
                        rank,
                        tuple(
                            SampledToken(row.request_id, row.position + 1, 5, None)
                            for row in plan.samples
                            if owner[row.request_id, row.position] == rank
                        ),
                        (),
                        0,
                        0,
                        step_s=step_s,
                    )
                    for rank in plan.ranks
                ),
            )
        )


@pytest.fixture
def ends_are_cut(monkeypatch):
    """Prompts that end in a step make it no longer than others: most tests look at how prompts are cut."""
    monkeypatch.setattr("longspan.scheduler.chunks.ENDING_FACTOR", 1)


cut = pytest.mark.usefixtures("ends_are_cut")


def timed_ranks(num_ranks: int, windows=(None,), rate=RATE, **options) -> TimedRanks:
    config = make_config(
        num_ranks, **{"max_num_batched_tokens": 256, "max_step_ms": 100, "max_num_seqs": 64, **options}
    )
    scheduler = Scheduler(cost_model(*windows), config, [(2000,) * len(windows)] * num_ranks)
    scheduler.step_time.flops_per_s = rate
    return TimedRanks(scheduler, random.Random(0), rate=rate)


def chunks_of(ranks: FakeRanks, request_id: int) -> list[tuple[Plan, int, int]]:
    """(plan, start, end) of what a request's prompt was cut into."""
    chunks = []
    for plan in ranks.plans:
        runs = [run for run in plan.query_runs if run.request_id == request_id]
        if runs and runs[0].tokens.token_ids != (5,):
            chunks.append((plan, runs[0].position, runs[-1].end))
    return chunks


@cut
@pytest.mark.parametrize("windows", [(None,), (None, 9), (30,)])
@pytest.mark.parametrize(
    ("num_ranks", "placement"), [(1, "auto"), (2, "striped"), (3, "striped"), (4, "auto"), (2, "spill"), (3, "packed")]
)
def test_no_chunk_is_predicted_to_take_longer_than_asked_unless_it_is_one_page(num_ranks, placement, windows):
    """On the rank with most to compute, also where a prompt has pages on ranks that this chunk leaves alone."""
    ranks = timed_ranks(num_ranks, windows, placement=placement)
    ranks.scheduler.add_request([6] * 1500, SamplingParams(max_tokens=3, ignore_eos=True, seed=0))
    ranks.run_to_the_end()
    chunks = chunks_of(ranks, 0)
    assert [end for _, _, end in chunks[:-1]] == [start for _, start, _ in chunks[1:]]
    assert len(chunks) > 1
    for plan, start, end in chunks:
        assert max(ranks.flops(plan)) <= LIMIT or end - start <= 4
    assert_all_free(ranks.scheduler)


@cut
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_prompt_behind_a_prefix_on_one_rank_is_cut_by_what_the_others_compute(num_ranks):
    """Its first pages lie on another rank than this chunk's: that rank does not share the work."""
    ranks = timed_ranks(num_ranks, stripe_size=64, max_num_batched_tokens=64)
    ranks.scheduler.add_request([6] * 200, SamplingParams(max_tokens=1, ignore_eos=True, seed=0))
    ranks.run_to_the_end()
    request = ranks.scheduler.add_request([6] * 900, SamplingParams(max_tokens=1, ignore_eos=True, seed=0))
    ranks.run_to_the_end()
    assert request.num_cached > 0
    for plan, start, end in chunks_of(ranks, request.request_id):
        assert max(ranks.flops(plan)) <= LIMIT or end - start <= 4


@cut
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_chunks_cut_by_time_end_where_snake_order_has_come_round(num_ranks):
    """So that the ranks share the work of every chunk: each of them has as many tokens, as dear."""
    ranks = timed_ranks(num_ranks, placement="striped", stripe_size=4)
    unit = 2 * num_ranks * 4
    ranks.scheduler.add_request([6] * (80 * unit), SamplingParams(max_tokens=1, seed=0))
    ranks.run_to_the_end()
    chunks = chunks_of(ranks, 0)
    budgets = [256 // 8 * 8 * num_ranks]
    assert any(end - start not in budgets for _, start, end in chunks[:-1]), "some are cut by time"
    for plan, _, end in chunks:
        assert end % unit == 0
        work = ranks.flops(plan)
        assert max(work) == pytest.approx(min(work))


@cut
@pytest.mark.cover
@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_short_chunk_behind_a_long_context_is_cut_by_what_its_strategy_lets_each_rank_compute(num_ranks):
    """Its tokens have one owner. Where queries move, that rank computes its share of the keys and not all of them."""
    num_chunks = {}
    for strategy in ("pass_q", "pass_kv"):
        ranks = timed_ranks(num_ranks, placement="striped", stripe_size=64, max_step_ms=300, strategy=strategy)
        ranks.scheduler.add_request([6] * 4000, SamplingParams(max_tokens=1, seed=0))
        ranks.run_to_the_end()
        late = [(plan, start, end) for plan, start, end in chunks_of(ranks, 0) if start >= 2500]
        assert max(max(ranks.flops(plan)) / RATE for plan, _, _ in late) <= 0.33
        num_chunks[strategy] = len(late)
    assert num_chunks["pass_q"] < 0.8 * num_chunks["pass_kv"]


@cut
def test_a_limit_that_no_page_keeps_is_one_page_per_step():
    ranks = timed_ranks(2, max_step_ms=1, placement="striped", stripe_size=4, rate=RATE / 100)
    request = ranks.scheduler.add_request([6] * 103, SamplingParams(max_tokens=3, ignore_eos=True, seed=0))
    ranks.run_to_the_end()
    assert [end - start for _, start, end in chunks_of(ranks, 0)] == [4] * 25 + [3]
    assert len(request.output_token_ids) == 3


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_prompts_cut_by_time_all_get_on_beside_many_decodes(num_ranks):
    """Decodes alone take longer than the limit: each prompt in its turn still gets a page per step."""
    ranks = timed_ranks(num_ranks, max_step_ms=5, rate=RATE / 100)
    params = SamplingParams(max_tokens=400, ignore_eos=True, seed=0)
    decoding = [ranks.scheduler.add_request([6], params) for _ in range(20)]
    while not all(request.num_generated for request in decoding):
        ranks.step()
    prompts = [ranks.scheduler.add_request([6 + i] * 40, SamplingParams(max_tokens=1, seed=0)) for i in range(4)]
    before = len(ranks.plans)
    while any(request.finish_reason is None for request in prompts):
        ranks.step()
    assert len(ranks.plans) - before <= 4 * 10 * num_ranks + 20
    assert all(request.finish_reason is None for request in decoding)


@cut
def test_in_one_step_the_chunks_of_several_prompts_share_the_time():
    ranks = timed_ranks(1)
    for i in range(6):
        ranks.scheduler.add_request([6 + i] * 30, SamplingParams(max_tokens=1, seed=0))
    ranks.run_to_the_end()
    several = [plan for plan in ranks.plans if len({run.request_id for run in plan.query_runs}) > 1]
    assert several
    assert all(max(ranks.flops(plan)) <= LIMIT for plan in several)


@cut
@pytest.mark.cover
def test_the_learnt_rate_cuts_the_next_chunks():
    """The first guess is far too high; a few steps later every chunk takes about as long as asked."""
    ranks = timed_ranks(2, placement="striped", max_num_batched_tokens=640)
    ranks.scheduler.step_time.flops_per_s = 20 * RATE
    ranks.scheduler.add_request([6] * 3000, SamplingParams(max_tokens=1, seed=0))
    ranks.run_to_the_end()
    seconds = [max(ranks.flops(plan)) / RATE for plan, _, _ in chunks_of(ranks, 0)]
    assert max(seconds[:3]) > 0.2
    assert max(seconds[6:]) <= 0.11


def prompts_beside(ranks: TimedRanks, num_decoding: int) -> list[Plan]:
    """Plans with the prompts of 12 requests, begun when some others decode."""
    params = SamplingParams(max_tokens=200, ignore_eos=True, seed=0)
    decoding = [ranks.scheduler.add_request([6], params) for _ in range(num_decoding)]
    while not all(request.num_generated for request in decoding):
        ranks.step()
    requests = [ranks.scheduler.add_request([6 + i] * 200, SamplingParams(max_tokens=1, seed=0)) for i in range(12)]
    ids = {request.request_id for request in requests}
    while any(request.finish_reason is None for request in requests):
        ranks.step()
    return [plan for plan in ranks.plans if ids & {run.request_id for run in plan.query_runs}]


def test_prompts_that_end_in_a_step_share_a_longer_one_while_no_request_decodes():
    """Each step reads all weights, and steps of the longest time would read them several times as often."""
    ranks = timed_ranks(1, max_num_batched_tokens=4000)
    times = [max(ranks.flops(plan)) / LIMIT for plan in prompts_beside(ranks, 0)]
    assert 1 < max(times) <= ENDING_FACTOR
    beside = timed_ranks(1, max_num_batched_tokens=4000)
    shorter = [max(beside.flops(plan)) / LIMIT for plan in prompts_beside(beside, 1)]
    assert max(shorter) <= 1.05, "decodes wait no longer"
    assert len(times) < len(shorter)


def test_a_prompt_that_does_not_end_is_cut_by_the_longest_time_beside_prompts_that_do():
    ranks = timed_ranks(1, max_num_batched_tokens=700)
    long = ranks.scheduler.add_request([6] * 1500, SamplingParams(max_tokens=1, seed=0))
    for i in range(4):
        ranks.scheduler.add_request([7 + i] * 30, SamplingParams(max_tokens=1, seed=0))
    ranks.run_to_the_end()
    for _, start, end in chunks_of(ranks, long.request_id):
        if end < 1500:
            assert ranks.scheduler.step_time.chunk_flops(start, end) <= LIMIT


def test_without_a_limit_chunks_are_cut_by_tokens_alone_and_nothing_is_learnt():
    ranks = timed_ranks(1, max_step_ms=None)
    request = ranks.scheduler.add_request([6] * 1000, SamplingParams(max_tokens=2, ignore_eos=True, seed=0))
    ranks.run_to_the_end()
    assert [end - start for _, start, end in chunks_of(ranks, 0)] == [256] * 3 + [232]
    assert ranks.scheduler.step_time.flops_per_s == RATE
    check_finished(request)


def test_models_of_unknown_size_are_cut_by_attention_alone():
    assert StepTime(make_model(None), 1).token_flops == 2.0
