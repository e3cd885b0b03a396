"""The planner predicts the steps that the scheduler makes, its memory is the engine's, and its answers are monotone."""

import itertools
import random

import msgspec
import pytest
from fake_ranks import FakeRanks, make_config, make_model, make_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import make_cluster, make_shape

from longspan.config import EngineConfig
from longspan.costmodel.model_time import (
    StepOptions,
    decode_bytes,
    predict_decode,
    predict_step,
    prefill_flops,
    step_runs,
    striped_table,
)
from longspan.costmodel.parameters import Costs, costs_by_bytes
from longspan.costmodel.prompt_time import interpolation_weights, predict_prefill
from longspan.errors import ConfigError
from longspan.planner.memory_fit import cluster_sizes, fit, fits, needed_bytes, request_kv_bytes, smallest_cluster
from longspan.planner.report import make_plan
from longspan.scheduler.scheduler import Scheduler
from longspan.sharding.capacity import pool_bytes, pool_pages, window_pages
from longspan.sharding.placement import snake_rank
from longspan.types import Phase, SamplingParams, Strategy

OPTIONS = StepOptions(step_s=2e-3)


def costs_of(num_devices: int, tensor_parallel_size: int = 1) -> Costs:
    return make_cluster(num_devices).costs(num_devices, tensor_parallel_size, "bfloat16")


# -- the scheduler's steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("prompt_len", [1, 5, 31, 64, 257, 1000])
@pytest.mark.parametrize("windows", [(None,), (40,), (None, 24)])
def test_steps_and_strategies_are_those_of_the_scheduler(num_ranks, prompt_len, windows):
    """Every step of a lone request: the same runs on the same ranks, the same strategies, the same bytes."""
    model = make_model(*windows)
    config = make_config(num_ranks, placement="striped")
    scheduler = make_scheduler(model, config, 4000)
    scheduler.add_request([3] * prompt_len, SamplingParams(max_tokens=2, ignore_eos=True))
    ranks = FakeRanks(scheduler, random.Random(0))
    ranks.run_to_the_end()
    *prefill, decode = ranks.plans
    assert decode.phase is Phase.DECODE

    options = StepOptions(page_size=4, stripe_size=8, max_num_batched_tokens=16)
    geometry = options.geometry(num_ranks)
    chunk, table = geometry.chunk_len, striped_table(prompt_len, geometry)
    starts = range(0, prompt_len, chunk)
    assert len(starts) == len(prefill)
    spans = [(start, min(prompt_len, start + chunk)) for start in starts] + [(prompt_len, prompt_len + 1)]
    shape = msgspec.structs.replace(make_shape(), spec=msgspec.structs.replace(model, num_parameters=100))
    for plan, (start, end) in zip(ranks.plans, spans, strict=True):
        ours = [(run.position, run.end, run.compute_rank) for run in step_runs(table, start, end)]
        assert [(run.position, run.end, run.compute_rank) for run in plan.query_runs] == ours
        step = predict_step(shape, table, start, end, costs_by_bytes((0,) * num_ranks), options)
        assert step.strategies == tuple(group.strategy for group in plan.groups)


@pytest.mark.parametrize("weights", [(2, 1), (1, 2, 1), (1, 4, 2, 3)])
@pytest.mark.parametrize("prompt_len", [31, 257, 1000])
def test_steps_of_unequal_ranks_are_those_of_the_scheduler(weights, prompt_len):
    num_ranks = len(weights)
    model, config = make_model(None), make_config(num_ranks, placement="striped", rank_weights=weights)
    scheduler = make_scheduler(model, config, 4000)
    scheduler.add_request([3] * prompt_len, SamplingParams(max_tokens=2, ignore_eos=True))
    ranks = FakeRanks(scheduler, random.Random(0))
    ranks.run_to_the_end()
    options = StepOptions(page_size=4, stripe_size=8, max_num_batched_tokens=16, rank_weights=weights)
    geometry = options.geometry(num_ranks)
    home = max(range(num_ranks), key=lambda rank: (weights[rank], -rank))  # the planner starts at rank 0
    stripes = geometry.stripes(-(-prompt_len // 4), 0, home)
    spans = [(start, min(prompt_len, start + geometry.chunk_len)) for start in range(0, prompt_len, geometry.chunk_len)]
    planned = [run for plan in ranks.plans[:-1] for run in plan.query_runs]
    assert len(ranks.plans) == len(spans) + 1
    assert [(plan.query_runs[0].position, plan.query_runs[-1].end) for plan in ranks.plans[:-1]] == spans
    for rank in range(num_ranks):
        pages = sum(count for i, count in enumerate(stripes) if snake_rank(i, home, num_ranks) == rank)
        tokens = sum(run.num_tokens for run in planned if run.compute_rank == rank)
        assert 4 * pages - 3 <= tokens <= 4 * pages


def test_unequal_ranks_are_planned_as_fast_and_as_large_as_they_are():
    shape, cluster = make_shape(), make_cluster(4)
    even = make_plan(shape, cluster, [131072], model="x")
    same = make_plan(shape, cluster, [131072], model="x", rank_weights=(3, 3, 3, 3))
    assert same.contexts[0].prefill.total_s == pytest.approx(even.contexts[0].prefill.total_s)
    uneven = make_plan(shape, cluster, [131072], model="x", rank_weights=(2, 1, 1, 2))
    assert uneven.fit.tokens_per_rank[1] == pytest.approx(even.fit.tokens_per_rank[1] / 2, rel=0.001)
    assert uneven.fit.num_tokens == pytest.approx(0.75 * even.fit.num_tokens, rel=0.001)
    # Three quarters of the devices, and work that follows them: four thirds of the time.
    ratio = uneven.contexts[0].prefill.dense_s / even.contexts[0].prefill.dense_s
    assert ratio == pytest.approx(4 / 3, rel=0.03)
    assert uneven.contexts[0].prefill_floor_s == pytest.approx(even.contexts[0].prefill_floor_s * 4 / 3)
    assert uneven.contexts[0].memory_bytes > even.contexts[0].memory_bytes


@pytest.mark.parametrize("weights", [(1, 2), (1, 1, 1, 0)])
def test_rejects_weights_that_are_not_one_per_rank(weights):
    with pytest.raises(
        ConfigError, match=r"^rank_weights: got \(1, .*\), legal is one number above 0 for each of the "
    ):
        make_plan(make_shape(), make_cluster(4), [4096], model="x", rank_weights=weights)


def test_defaults_are_the_engines():
    engine, options = EngineConfig(model="recall"), StepOptions()
    assert options.page_size == engine.page_size
    assert options.stripe_size == engine.stripe_size
    assert options.max_num_batched_tokens == engine.max_num_batched_tokens


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.cover
@given(
    windows=st.sampled_from([(None,), (512,), (None, 1024), (None, 4096, 300)]),
    num_ranks=st.integers(1, 12),
    kv_memory=st.integers(2 * 10**8, 2 * 10**10),
    budget=st.sampled_from([64, 2048]),
)
@settings(max_examples=40, deadline=None)
def test_what_fits_is_what_the_engine_allocates_and_admits(windows, num_ranks, kv_memory, budget):
    shape = make_shape(*windows, layers=2)
    options = StepOptions(max_num_batched_tokens=budget)
    found = fit(shape, num_ranks, shape.weight_bytes + kv_memory, 1.0, options)
    assert found.num_pages == pool_pages(shape.spec, kv_memory, options.page_size, budget)
    config = EngineConfig(
        model="x", context_parallel_size=num_ranks, placement="striped", max_num_batched_tokens=budget
    )
    placer = Scheduler(shape.spec, config, [found.num_pages] * num_ranks).memory.placer
    if found.longest_request is None:
        assert windows == (512,)
        placer.check_fits(10**7, 1)
        return
    assert found.longest_request == placer.max_request_len
    placer.check_fits(found.longest_request - 1, 1)
    assert fits(found, found.longest_request)
    assert not fits(found, found.longest_request + 1)


@given(
    windows=st.sampled_from([(None,), (None, 1024)]),
    num_ranks=st.integers(1, 12),
    num_tokens=st.integers(2, 3_000_000),
)
@settings(max_examples=60, deadline=None)
def test_the_memory_that_a_refusal_names_is_enough_and_no_less_is(windows, num_ranks, num_tokens):
    shape = make_shape(*windows, layers=2)
    needed = needed_bytes(shape, num_tokens, num_ranks, 0.9, OPTIONS)
    assert fits(fit(shape, num_ranks, needed + 16, 0.9, OPTIONS), num_tokens)
    assert not fits(fit(shape, num_ranks, needed - 1000, 0.9, OPTIONS), num_tokens)


def test_memory_of_a_request_is_its_pages_on_the_fullest_rank():
    shape = make_shape(None, 100, layers=3)
    full, windowed = shape.spec.kv_groups
    options = StepOptions(max_num_batched_tokens=64)
    assert request_kv_bytes(shape, 16 * 9 + 1, 4, options) == 3 * 16 * (full.token_bytes + windowed.token_bytes)
    held = window_pages(100, 16, 64)
    long = request_kv_bytes(shape, 16 * 4000, 4, options)
    assert long == 16 * (1000 * full.token_bytes + held * windowed.token_bytes)
    assert long < pool_bytes(shape.spec, 1000, 16, 64)


def test_weights_that_do_not_fit_leave_no_room_for_tokens():
    shape = make_shape()
    found = fit(shape, 4, shape.weight_bytes, 0.9, OPTIONS)
    assert (found.num_tokens, found.longest_request) == (0, 0)
    assert found.kv_bytes < 0
    assert not fits(found, 1)


def test_more_ranks_never_hold_less_and_parts_of_a_node_come_before_nodes():
    shape, cluster = make_shape(), make_cluster(8)
    sizes = list(cluster_sizes(cluster, 2))
    assert sizes[:6] == [2, 4, 6, 8, 16, 24]
    assert sizes[-1] == 256
    longest = [
        fit(shape.divided(2), size // 2, cluster.memory_bytes, 0.9, OPTIONS).longest_request or 0 for size in sizes
    ]
    assert all(a < b for a, b in itertools.pairwise(longest))


@pytest.mark.parametrize("num_tokens", [1000, 900_000, 5_000_000, 80_000_000])
def test_the_smallest_cluster_fits_and_the_next_smaller_does_not(num_tokens):
    shape, cluster = make_shape(), make_cluster(8)
    found = smallest_cluster(shape, cluster, 1, num_tokens, 0.9, OPTIONS)
    assert found is not None
    sizes = list(cluster_sizes(cluster, 1))
    for size in sizes:
        is_held = fits(fit(shape, size, cluster.memory_bytes, 0.9, OPTIONS), num_tokens)
        assert is_held == (size >= found)


def test_no_cluster_is_named_where_none_is_large_enough():
    assert smallest_cluster(make_shape(), make_cluster(8), 1, 10**9, 0.9, OPTIONS) is None


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_devices", [1, 3, 8, 16])
def test_more_context_never_takes_less_time(num_devices):
    shape, costs = make_shape(), costs_of(num_devices)
    lengths = [1, 16, 100, 1000, 4096, 8192, 20_000, 65_536, 131_072, 300_000, 1_048_576]
    first = [predict_prefill(shape, length, costs, OPTIONS).total_s for length in lengths]
    assert all(a <= b for a, b in itertools.pairwise(first))
    each = [predict_decode(shape, length, costs, OPTIONS).total_s for length in lengths if length >= 1000]
    assert all(a <= b * 1.0001 for a, b in itertools.pairwise(each))


@pytest.mark.cover
def test_no_prediction_is_below_the_floor_and_long_prompts_come_near_it():
    shape = make_shape()
    for num_devices, length in itertools.product([1, 8, 32], [2048, 131_072, 1_048_576]):
        cluster = make_cluster(num_devices)
        costs = cluster.costs(num_devices, 1, "bfloat16")
        peak = cluster.peak_flops_per_s("bfloat16") * num_devices
        floor_s = prefill_flops(shape, length) / peak
        prefill = predict_prefill(shape, length, costs, OPTIONS)
        assert floor_s < prefill.total_s
        if length == 1_048_576:
            assert prefill.total_s < 2.2 * floor_s
        decode = predict_decode(shape, length, costs, OPTIONS)
        assert decode_bytes(shape, length) / (cluster.read_bytes_per_s * num_devices) < decode.total_s


def test_parts_add_up_to_the_whole():
    prefill = predict_prefill(make_shape(None, 4096), 200_000, costs_of(16, 2), OPTIONS, tensor_parallel_size=2)
    parts = prefill.dense_s + prefill.attention_s + prefill.sums_s + prefill.recurrence_s + prefill.fixed_s
    assert prefill.total_s == pytest.approx(parts)
    assert min(prefill.dense_s, prefill.attention_s, prefill.sums_s, prefill.fixed_s) > 0
    assert prefill.fixed_s == pytest.approx(prefill.num_steps * (2e-3 + 32 * 50e-6))


@pytest.mark.parametrize(("num_devices", "length"), [(1, 200_000), (4, 300_000), (8, 500_001)])
def test_sampled_steps_are_within_a_percent_of_all_steps(num_devices, length):
    shape, costs = make_shape(), costs_of(num_devices)
    geometry = OPTIONS.geometry(num_devices)
    table, chunk = striped_table(length, geometry), geometry.chunk_len
    every = [
        predict_step(shape, table, start, min(length, start + chunk), costs, OPTIONS)
        for start in range(0, length, chunk)
    ]
    found = predict_prefill(shape, length, costs, OPTIONS)
    assert found.num_steps == len(every) > 12
    assert found.total_s == pytest.approx(sum(step.total_s for step in every), rel=0.01)
    changes = [0] + [i for i in range(1, len(every)) if every[i].strategies != every[i - 1].strategies]
    assert [change.position for change in found.changes] == [i * chunk for i in changes]
    assert found.changes[-1].strategies == every[-1].strategies


def test_interpolated_steps_count_once_each():
    assert interpolation_weights([0, 1, 2]) == {0: 1, 1: 1, 2: 1}
    assert interpolation_weights([0, 4, 6]) == {0: 2.5, 4: 3.0, 6: 1.5}
    assert sum(interpolation_weights([0, 9, 30]).values()) == 31


def test_attention_is_local_on_one_device_and_moves_something_on_several():
    alone = predict_prefill(make_shape(), 100_000, costs_of(1), OPTIONS)
    assert [change.strategies for change in alone.changes] == [(Strategy.LOCAL,)]
    several = predict_prefill(make_shape(), 100_000, costs_of(8), OPTIONS)
    assert all(Strategy.LOCAL not in change.strategies for change in several.changes)
    assert predict_decode(make_shape(), 100_000, costs_of(8), OPTIONS).strategies == (Strategy.PASS_Q,)
    far = predict_decode(make_shape(), 100_000, costs_of(32), OPTIONS)
    assert far.strategies == (Strategy.TREE,)


def test_eight_devices_prefill_a_long_prompt_nearly_eight_times_as_fast():
    one, eight = (predict_prefill(make_shape(), 1_048_576, costs_of(n), OPTIONS).total_s for n in (1, 8))
    assert 6 < one / eight < 8.01


def test_tensor_parallelism_divides_weights_and_adds_sums():
    shape = make_shape()
    whole, part = shape, shape.divided(8)
    assert part.weight_bytes == whole.weight_bytes / 8
    assert part.kv_token_bytes == whole.kv_token_bytes // 8
    alone = predict_decode(whole, 50_000, costs_of(1), OPTIONS)
    shared = predict_decode(part, 50_000, costs_of(8, 8), OPTIONS, tensor_parallel_size=8)
    assert shared.dense_s == pytest.approx(alone.dense_s / 8, rel=0.02)
    assert alone.sums_s == 0 < shared.sums_s
    assert shared.total_s < alone.total_s


def test_kv_heads_are_kept_where_devices_outnumber_them():
    part = make_shape(kv_heads=2).divided(8)
    (group,) = part.spec.kv_groups
    assert (group.spec.layout.num_kv_heads, group.num_query_heads) == (1, 4)


@pytest.mark.parametrize("size", [3, 5, 64])
def test_rejects_heads_that_cannot_be_divided(size):
    with pytest.raises(ConfigError, match=f"tensor_parallel_size: got {size} with 32 query and 8 KV heads, legal is"):
        make_shape().divided(size)
    assert not make_shape().is_divisible(size)


def test_ranks_that_share_a_core_decode_faster_alone():
    shape, costs = make_shape(), costs_of(4)
    shared = Costs(costs.topology, msgspec.structs.replace(costs.rates, ranks_per_device=2.0))
    assert predict_decode(shape, 1000, shared, OPTIONS).dense_s == pytest.approx(
        predict_decode(shape, 1000, costs, OPTIONS).dense_s / 2
    )
    table = striped_table(8192, OPTIONS.geometry(4))
    assert predict_step(shape, table, 0, 8192, shared, OPTIONS).dense_s == pytest.approx(
        predict_step(shape, table, 0, 8192, costs, OPTIONS).dense_s
    )


@pytest.mark.parametrize(("prompt_len", "published_s"), [(128_000, 3.8), (1_000_000, 77.0)])
def test_published_times_of_a_large_cluster_are_predicted_within_a_quarter(prompt_len, published_s):
    """Llama 3 405B on 16 nodes of 8 H100, arXiv 2411.01783 (with 8-bit weights there, so memory is not compared)."""
    shape = make_shape(layers=126, query_heads=128, hidden_size=16384, inner=53248).divided(8)
    found = predict_prefill(shape, prompt_len, costs_of(128, 8), OPTIONS, tensor_parallel_size=8)
    assert found.total_s == pytest.approx(published_s, rel=0.25)


def test_what_tokens_take_beside_products_is_measured_or_reckoned_by_bytes():
    shape, costs = make_shape(), costs_of(1)
    measured = Costs(costs.topology, msgspec.structs.replace(costs.rates, token_s=1e-3))
    table = striped_table(100, OPTIONS.geometry(1))
    reckoned_s, measured_s = (predict_step(shape, table, 0, 100, c, OPTIONS).dense_s for c in (costs, measured))
    assert measured_s - reckoned_s == pytest.approx(100 * 16 * 1e-3, rel=0.01)
    # one token's is in what a layer takes
    assert predict_decode(shape, 100, measured, OPTIONS).dense_s < predict_decode(shape, 100, costs, OPTIONS).dense_s


def test_floors_are_counted_pair_by_pair_and_byte_by_byte():
    shape = make_shape(None, 7, layers=1)
    inner, last = shape.spec.kv_groups  # of the last layer's attention and MLP nobody reads the prompt's rows
    assert last.layers == (1,)
    width = 4096 * (32 + 2 * 8) * 128
    assert shape.unread_weights() == shape.spec.num_parameters / 2 - width
    expected = 2 * (shape.spec.num_parameters / 2 + width) * 20 + 2 * shape.num_logit_weights
    expected += 4 * 32 * 128 * sum(i + 1 if inner.spec.window is None else min(i + 1, 7) for i in range(20))
    assert prefill_flops(shape, 20) == expected
    weights = 2 * (shape.spec.num_parameters + shape.num_logit_weights)
    assert decode_bytes(shape, 20) == weights + (21 + 7) * 2 * 8 * 128 * 2


@pytest.mark.cover
def test_128_ranks_are_planned_from_few_steps():
    """Not a matter of time here: the number of predicted steps and of their segments is bounded."""
    shape, costs = make_shape(layers=1), costs_of(128)
    found = predict_prefill(shape, 1_048_576, costs, OPTIONS)
    assert found.num_steps == 4
    assert found.changes[0].position == 0


# -- the report --------------------------------------------------------------------------------------------------------


def test_a_report_answers_for_every_context():
    report = make_plan(make_shape(), make_cluster(8), [8192, 10**9], model="made")
    held, too_long = report.contexts
    assert held.fits
    assert held.prefill is not None
    assert held.decode is not None
    assert (held.smallest_devices, held.fitting_tensor_parallel_size) == (1, None)
    assert (too_long.fits, too_long.prefill, too_long.decode, too_long.smallest_devices) == (False, None, None, None)
    assert too_long.needed_device_bytes > report.cluster.memory_bytes
    assert report.fit.longest_request is not None
    assert msgspec.json.decode(msgspec.json.encode(report))["contexts"][0]["prefill"]["changes"]


def test_a_larger_tensor_parallel_size_is_named_where_it_helps():
    shape = make_shape(layers=126, query_heads=128, hidden_size=16384, inner=53248)
    report = make_plan(shape, make_cluster(16, memory_bytes=141e9), [8192], model="made")
    assert report.contexts[0].fitting_tensor_parallel_size == 8
    again = make_plan(shape, report.cluster, [8192], model="made", tensor_parallel_size=8)
    assert again.contexts[0].fits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size: got 3 with 8 devices per node"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size: got 0"),
        ({"memory_utilization": 0.0}, "memory_utilization: got 0.0"),
        ({"memory_utilization": 1.1}, "memory_utilization: got 1.1, legal is a number above 0 and up to 1"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens: got 0"),
    ],
)
def test_rejects_illegal_options(options, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(make_shape(), make_cluster(8), [8192], model="made", **options)


def test_rejects_more_ranks_than_the_engine_has():
    with pytest.raises(ConfigError, match="which is 136 ranks; legal is at most 128 ranks"):
        make_plan(make_shape(), make_cluster(136), [8192], model="made")
