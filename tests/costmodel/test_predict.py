"""Proves what the cost model predicts: worked examples by hand, and that no slower machine is ever predicted faster."""

import random

import msgspec
import pytest
from cp_cases import Cluster, StepCase, attention_time, make_group, random_chunk, random_cluster
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.costmodel.parameters import Costs, KernelRates, Link, Topology, costs_by_bytes
from longspan.errors import ConfigError
from longspan.plan.step_keys import step_keys
from longspan.types import Strategy

GATHER_KV, PASS_KV, PASS_Q = Strategy.GATHER_KV, Strategy.PASS_KV, Strategy.PASS_Q
STRATEGIES = [GATHER_KV, PASS_KV, PASS_Q]
GROUP = make_group([0], query_heads=4, kv_heads=2, k_width=8, v_width=8, dtype="float32")
PAIR_FLOPS = 2 * 4 * (8 + 8)
"""Of one query and one key."""
KEY_BYTES, QUERY_BYTES, PARTIAL_BYTES = 2 * 16 * 4, 4 * 8 * 4, 4 * 8 * 4 + 4 * 4
NO_TIME = float("inf")


def costs_of(
    num_ranks: int = 2, *, nodes: tuple[int, ...] | None = None, link: Link | None = None, **rates: float
) -> Costs:
    """A cluster where nothing takes time but what is named."""
    free = KernelRates(NO_TIME, NO_TIME, NO_TIME, ((1, NO_TIME),), 0.0)
    link = link or Link(0.0, NO_TIME)
    return Costs(Topology(nodes or (0,) * num_ranks, link, link), msgspec.structs.replace(free, **rates))


def striped_step(strategy: Strategy, num_ranks: int, context: int, chunk: int, *, page: int = 4, block_len: int = 2048):
    """A step of one request whose pages go round the ranks."""
    cluster = Cluster(random.Random(0), num_ranks, page, [None], 1, pages_per_rank=4096, owner_style="striped")
    if context:
        cluster.step({0: context})
    runs = sorted(cluster.step({0: chunk}), key=lambda run: run.position)
    return StepCase(strategy, step_keys(runs, cluster.tables[0], GROUP.spec), block_len, cluster.tables[0])


def test_a_lone_decode_is_predicted_by_hand():
    """8 keys on each of 2 ranks, of the query's own rank one is the new one: 9 and 8, or 8 and 9 keys."""
    step = striped_step(PASS_Q, 2, 16, 1)
    rates = {"attention_flops_per_s": ((1, PAIR_FLOPS * 1000.0),)}  # 1 ms per key
    assert attention_time(step, GROUP, costs_of(**rates)) == pytest.approx(9e-3)
    # the query takes 2 ms and meets 8 keys, then the partial takes 2 ms and more by its lse
    link = Link(2e-3, QUERY_BYTES * 1e6)
    prediction = step.predict(GROUP, costs_of(link=link, **rates))
    assert prediction.total_s == pytest.approx(2e-3 + 1e-6 + 8e-3 + 2e-3 + PARTIAL_BYTES / QUERY_BYTES * 1e-6)
    assert prediction.compute_s == pytest.approx(9e-3)
    assert prediction.wait_s == pytest.approx(prediction.total_s - 9e-3)


def test_keys_move_while_the_local_part_is_computed():
    """Two ranks, 4 new tokens each: rank 0 is causal alone, rank 1 sees rank 0's keys as well. Of so few keys a kernel
    computes all, seen or not."""
    rates = {"attention_flops_per_s": ((1, PAIR_FLOPS * 1000.0),)}  # 1 ms per query and key
    for strategy in (GATHER_KV, PASS_KV):
        step = striped_step(strategy, 2, 0, 8)
        assert attention_time(step, GROUP, costs_of(**rates)) == pytest.approx(16e-3 + 16e-3)
        quick = costs_of(link=Link(1e-3, KEY_BYTES * 1000.0), **rates)  # 1 ms, and 1 ms per key
        assert attention_time(step, GROUP, quick) == pytest.approx(16e-3 + 16e-3)
        slow = costs_of(link=Link(15e-3, KEY_BYTES * 1000.0), **rates)
        assert attention_time(step, GROUP, slow) == pytest.approx(15e-3 + 4e-3 + 16e-3)


def test_the_ring_pays_the_latency_of_every_hop_and_round():
    for num_ranks, block_len, hops in ((2, 64, 1), (4, 64, 3), (4, 4, 6), (5, 8, 4)):
        step = striped_step(PASS_KV, num_ranks, 8 * num_ranks, num_ranks, page=1, block_len=block_len)
        (ring,) = step.exchanges
        assert -(-max(ring.num_rows) // block_len) * (num_ranks - 1) >= hops
        rounds = -(-max(ring.num_rows) // block_len)
        time_s = attention_time(step, GROUP, costs_of(num_ranks, link=Link(1e-3, NO_TIME)))
        assert time_s == pytest.approx(rounds * (num_ranks - 1) * 1e-3)


def test_equal_rounds_are_reckoned_once_and_count_as_often_as_they_are():
    times = []
    for length in (64, 128, 256):
        step = striped_step(PASS_KV, 2, length, 2, page=1, block_len=4)
        times.append(attention_time(step, GROUP, costs_of(link=Link(1e-3, 1e9), call_s=1e-4)))
    assert times[1] / times[0] == pytest.approx(2, rel=0.1)
    assert times[2] / times[1] == pytest.approx(2, rel=0.1)


def test_messages_to_several_peers_leave_one_after_the_other():
    """A decode on 4 ranks: three queries leave rank 0, and three partials come home."""
    step = striped_step(PASS_Q, 4, 16, 1)
    time_s = attention_time(step, GROUP, costs_of(4, link=Link(0.0, QUERY_BYTES * 1000.0)))
    assert time_s == pytest.approx(3e-3 + 3e-3 * PARTIAL_BYTES / QUERY_BYTES)


def test_links_between_nodes_have_their_own_speed():
    step = striped_step(PASS_Q, 2, 16, 1)
    for nodes, latency_s in (((0, 0), 1e-3), ((0, 1), 7e-3)):
        costs = costs_of(nodes=nodes)
        topology = msgspec.structs.replace(costs.topology, inside=Link(1e-3, NO_TIME), between=Link(7e-3, NO_TIME))
        costs = msgspec.structs.replace(costs, topology=topology)
        assert attention_time(step, GROUP, costs) == pytest.approx(2 * latency_s)


def test_fixed_times_are_counted_per_call_message_and_merge():
    step = striped_step(PASS_Q, 4, 16, 1)
    assert attention_time(step, GROUP, costs_of(4, call_s=1e-3)) == pytest.approx(1e-3)
    assert attention_time(step, GROUP, costs_of(4, merge_s=1e-3)) == pytest.approx(3e-3)
    # home sends three queries, a peer takes one in and sends a partial, home takes three in
    assert attention_time(step, GROUP, costs_of(4, exchange_s=1e-3)) == pytest.approx(8e-3)


def test_a_rank_that_computes_alone_has_the_shared_device_to_itself():
    step = striped_step(GATHER_KV, 2, 16, 1)
    rates = {"attention_flops_per_s": ((1, PAIR_FLOPS * 1000.0),)}
    assert attention_time(step, GROUP, costs_of(**rates)) == pytest.approx(17e-3)
    assert attention_time(step, GROUP, costs_of(ranks_per_device=2, **rates)) == pytest.approx(8.5e-3)
    even = striped_step(PASS_Q, 2, 15, 1)
    assert attention_time(even, GROUP, costs_of(ranks_per_device=2, **rates)) == pytest.approx(8e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_slow_rank_takes_longer_for_all_that_it_does_itself(strategy):
    """17 keys of a lone decode on its rank, or 9 and 8 on both; rank 0 has the query."""
    step = striped_step(strategy, 2, 16, 1)
    rates = {"attention_flops_per_s": ((1, PAIR_FLOPS * 1000.0),)}
    times = {}
    for speeds in (None, (1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (1.0, 0.5), (2.0, 2.0)):
        costs = msgspec.structs.replace(costs_of(**rates), speeds=speeds)
        times[speeds] = attention_time(step, GROUP, costs)
    assert times[None] == times[1.0, 1.0]
    assert times[2.0, 2.0] == pytest.approx(times[None] / 2)
    home, other = (9e-3, 8e-3) if strategy is PASS_Q else (17e-3, 0.0)
    for speeds in ((2.0, 1.0), (1.0, 2.0), (1.0, 0.5)):
        assert times[speeds] == pytest.approx(max(home / speeds[0], other / speeds[1]))


def test_moving_bytes_may_take_from_the_ranks_own_compute():
    step = striped_step(PASS_KV, 2, 0, 8)
    assert attention_time(step, GROUP, costs_of(moved_byte_s=1e-3 / KEY_BYTES)) == pytest.approx(4e-3)


def test_reading_keys_bounds_a_call_from_below():
    step = striped_step(PASS_Q, 2, 16, 1)
    assert attention_time(step, GROUP, costs_of(read_bytes_per_s=KEY_BYTES * 1000.0)) == pytest.approx(9e-3)


def test_rates_are_interpolated_between_query_lengths():
    rates = KernelRates(1.0, 1.0, 1.0, ((1, 10.0), (11, 30.0), (100, 20.0)), 0.0)
    for num_queries, rate in ((1, 10.0), (6, 20.0), (11, 30.0), (100, 20.0), (10**6, 20.0)):
        assert rates.attention_rate(num_queries) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("matmul_flops_per_s", 0.0),
        ("read_bytes_per_s", -1.0),
        ("copy_bytes_per_s", float("nan")),
        ("call_s", -1e-9),
        ("moved_byte_s", float("nan")),
        ("ranks_per_device", 0.5),
        ("attention_flops_per_s", ()),
        ("attention_flops_per_s", ((0, 1.0),)),
        ("attention_flops_per_s", ((16, 1.0), (1, 1.0))),
        ("attention_flops_per_s", ((1, 0.0),)),
    ],
)
def test_rejects_rates_that_no_machine_has(field, value):
    with pytest.raises(ConfigError, match=field):
        costs_of(**{field: value})


# -- any step --------------------------------------------------------------------------------------------------------

SLOWER = {
    "matmul_flops_per_s": lambda rates: rates.matmul_flops_per_s,  # not attention's business
    "read_bytes_per_s": lambda rates: rates.read_bytes_per_s / 3,
    "copy_bytes_per_s": lambda rates: rates.copy_bytes_per_s / 3,
    "attention_flops_per_s": lambda rates: tuple((n, rate / 3) for n, rate in rates.attention_flops_per_s),
    "call_s": lambda rates: rates.call_s + 1e-4,
    "exchange_s": lambda rates: rates.exchange_s + 1e-4,
    "merge_s": lambda rates: rates.merge_s + 1e-4,
    "moved_byte_s": lambda rates: rates.moved_byte_s + 1e-9,
}


def random_step(seed: int, strategy: Strategy):
    rng = random.Random(seed)
    cluster = random_cluster(rng)
    cluster.step(random_chunk(rng, cluster))
    runs = cluster.step(random_chunk(rng, cluster))
    group = make_group([0], query_heads=4, kv_heads=2, k_width=8, v_width=8, window=cluster.windows[0])
    step = StepCase(strategy, step_keys(runs, cluster.tables[0], group.spec), rng.choice([2, 5, 2048]))
    nodes = [0]
    for _ in range(cluster.num_ranks - 1):
        nodes.append(nodes[-1] + rng.choice([0, 1]))
    topology = Topology(tuple(nodes), Link(1e-5, 1e9), Link(5e-5, 1e8))
    rates = KernelRates(
        1e11, 1e10, 5e9, ((1, 1e9), (64, 5e10)), 1e-5, 5e-6, 0.0, 2e-5, 1e-11, rng.choice([1.0, 1.5, 2])
    )
    return step, group, Costs(topology, rates)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(STRATEGIES), st.sampled_from(sorted(SLOWER)))
def test_slower_kernels_never_make_a_prediction_smaller(seed, strategy, field):
    step, group, costs = random_step(seed, strategy)
    slower = msgspec.structs.replace(costs.rates, **{field: SLOWER[field](costs.rates)})
    before = attention_time(step, group, costs)
    assert attention_time(step, group, Costs(costs.topology, slower)) >= before * (1 - 1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(STRATEGIES), st.sampled_from(["inside", "between"]), st.booleans())
def test_slower_links_never_make_a_prediction_smaller(seed, strategy, which, by_latency):
    step, group, costs = random_step(seed, strategy)
    link = getattr(costs.topology, which)
    slower = Link(link.latency_s * 4, link.bytes_per_s) if by_latency else Link(link.latency_s, link.bytes_per_s / 4)
    topology = msgspec.structs.replace(costs.topology, **{which: slower})
    before = attention_time(step, group, costs)
    assert attention_time(step, group, Costs(topology, costs.rates)) >= before * (1 - 1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(STRATEGIES))
def test_the_parts_of_a_prediction_are_times_and_sum_up(seed, strategy):
    step, group, costs = random_step(seed, strategy)
    prediction = step.predict(group, costs)
    assert prediction.strategy is step.strategy
    assert min(prediction.compute_s, prediction.copy_s, prediction.wait_s) >= 0
    parts_s = prediction.compute_s + prediction.copy_s + prediction.wait_s
    assert parts_s == pytest.approx(prediction.total_s) or parts_s > prediction.total_s > 0.5 * parts_s


def test_without_measured_costs_a_time_is_bytes():
    step = striped_step(GATHER_KV, 2, 0, 8)
    assert attention_time(step, GROUP, costs_by_bytes((0, 0))) == 4 * KEY_BYTES
