"""Proves what the policy chooses from the numbers of named hardware, and that the original request's rule follows from
them: a ring within one node, a tree across nodes, normal attention where one device is enough."""

import msgspec
import pytest
from hardware import cores, gpus

from longspan.config import EngineConfig
from longspan.costmodel.choose import plan_group
from longspan.costmodel.grid import predict_grid, predict_step_choice
from longspan.costmodel.model_time import StepOptions, step_runs, striped_table
from longspan.costmodel.parameters import Costs, KernelRates, Link, Topology
from longspan.costmodel.placement_choice import on_one_rank, request_s, shortest_striped_len
from longspan.costmodel.shapes import ModelShape
from longspan.kv.layout import KVGroup, KVSpec
from longspan.types import AttentionParams, ModelSpec, Phase, Strategy

LOCAL, GATHER_KV, PASS_KV, PASS_Q, TREE = Strategy
LARGE = KVGroup(tuple(range(32)), KVSpec.uniform(8, 128, 128, "bfloat16"), 32)
"""Heads of a model of 8 billion parameters."""
SMALL = KVGroup(tuple(range(8)), KVSpec.uniform(2, 64, 64, "float32"), 8)
OPTIONS = StepOptions(page_size=64)


def chosen(costs, chunk, context, group=LARGE):
    return predict_step_choice(group, 0, chunk, context, costs, OPTIONS).strategy


def shape_of(group, num_parameters, hidden_size):
    params = (AttentionParams(0.1),) * len(group.layers)
    spec = ModelSpec("Test", len(group.layers), 128_000, None, (), (group,), params, num_parameters)
    return ModelShape(
        spec=spec,
        dtype=group.spec.compute_dtype,
        hidden_size=hidden_size,
        intermediate_size=4.0 * hidden_size,
        num_weights=num_parameters,
        num_logit_weights=hidden_size * 128_000,
    )


@pytest.mark.parametrize(
    ("costs", "chunk", "context", "expected"),
    [
        # one node of 8 GPUs
        (gpus(1), 2048, 0, PASS_KV),
        (gpus(1), 16384, 0, PASS_KV),
        (gpus(1), 16384, 131072, PASS_Q),
        (gpus(1), 512, 131072, PASS_Q),
        (gpus(1), 1, 1024, PASS_Q),
        (gpus(1), 1, 1 << 20, PASS_Q),
        # two nodes: a home deals with 15 peers, or with 8 and its leader with 7; a lone token has too few bytes
        (gpus(2), 1, 1024, PASS_Q),
        (gpus(2), 16, 131072, TREE),
        (gpus(2), 512, 131072, TREE),
        # many nodes: a decode that reached for every rank itself would wait for 127 messages in each direction
        (gpus(16), 1, 131072, TREE),
        (gpus(16), 128, 131072, TREE),
    ],
)
def test_the_policy_chooses_on_gpus(costs, chunk, context, expected):
    assert chosen(costs, chunk, context) is expected


@pytest.mark.parametrize(
    ("num_ranks", "chunk", "context", "expected"),
    [
        (2, 1, 4096, PASS_Q),
        (4, 1, 131072, PASS_Q),
        (4, 16, 131072, PASS_Q),
        (2, 4096, 0, GATHER_KV),
        (1, 4096, 0, LOCAL),
        (1, 1, 131072, LOCAL),
    ],
)
def test_the_policy_chooses_on_cores_of_one_machine(num_ranks, chunk, context, expected):
    assert chosen(cores(num_ranks), chunk, context, SMALL) is expected


# -- the original request's rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_gpus", [4, 6, 8])
def test_rule_ring_within_one_node_of_more_than_two_devices_for_a_long_new_prompt(num_gpus):
    """The prompt's first step, at the default of `max_num_batched_tokens` per rank. Later ones have more keys to
    move than queries."""
    assert chosen(gpus(1, num_gpus), num_gpus * EngineConfig(model="recall").max_num_batched_tokens, 0) is PASS_KV


@pytest.mark.parametrize(
    ("num_nodes", "chunk"), [(2, 16), (2, 128), (4, 1), (4, 16), (4, 128), (16, 1), (16, 16), (16, 128)]
)
@pytest.mark.parametrize("context", [8192, 131072, 1 << 20])
def test_rule_tree_across_nodes_for_decode_and_short_chunks(num_nodes, chunk, context):
    """On two nodes from some rows on; on more for a lone token as well."""
    assert chosen(gpus(num_nodes), chunk, context) is TREE


@pytest.mark.parametrize(
    ("shape", "costs", "short", "long"),
    [
        (shape_of(LARGE, 7_500_000_000, 4096), gpus(1), 1024, 65536),
        (shape_of(LARGE, 7_500_000_000, 4096), gpus(2), 1024, 65536),
        (shape_of(SMALL, 22_000_000, 512), cores(2), 64, 8192),
    ],
    ids=["8 GPUs", "2 nodes of 8 GPUs", "2 cores"],
)
def test_rule_normal_attention_where_one_device_holds_a_short_input(shape, costs, short, long):
    """Below the length that is returned a lone request is predicted to end sooner packed on one rank, where its
    attention is `local`; above it striped."""
    striped_from = shortest_striped_len(shape, costs, OPTIONS)
    assert striped_from is not None
    assert short < striped_from <= long
    assert striped_from % OPTIONS.page_size == 0
    packed = on_one_rank(costs)
    for prompt_len, is_striped in ((short, False), (striped_from, True), (long, True)):
        times = [request_s(shape, prompt_len, one, OPTIONS) for one in (packed, costs)]
        assert (times[1] < times[0]) == is_striped, (prompt_len, times)
    assert chosen(packed, short, 0, shape.spec.kv_groups[0]) is LOCAL
    assert chosen(packed, 1, short, shape.spec.kv_groups[0]) is LOCAL


def test_links_that_are_too_slow_leave_every_prompt_on_one_rank():
    fast = cores(2)
    slow = Costs(Topology((0, 1), Link(1.0, 1e3), Link(1.0, 1e3)), fast.rates)
    shape = shape_of(SMALL, 22_000_000, 512)
    assert shortest_striped_len(shape, slow, StepOptions(page_size=4096, stripe_size=4096)) is None


def test_a_rank_whose_peers_are_idle_has_the_shared_device_to_itself():
    rates = KernelRates(1.0, 2.0, 3.0, ((1, 4.0),), 0.5, ranks_per_device=2.0)
    alone = on_one_rank(Costs(Topology((0, 0), Link(0, 1.0), Link(0, 1.0)), rates))
    assert (alone.topology.nodes, alone.rates.ranks_per_device) == ((0,), 1.0)
    assert (alone.rates.matmul_flops_per_s, alone.rates.attention_flops_per_s) == (2.0, ((1, 8.0),))
    assert alone.rates.call_s == 0.5


def test_tree_is_a_candidate_only_where_it_is_something_else_than_pass_q():
    costs = gpus(2, 2)
    for nodes, is_candidate in (
        ((0, 0, 0, 0), False),
        ((0, 1, 2, 3), False),
        ((0, 0, 1, 1), True),
        ((0, 1, 2, 2), True),
    ):
        topology = msgspec.structs.replace(costs.topology, nodes=nodes)
        choice = predict_step_choice(LARGE, 0, 1, 4096, Costs(topology, costs.rates), OPTIONS)
        assert (TREE in choice.predicted_s) == is_candidate


# -- the table of typical steps --------------------------------------------------------------------------------------


def test_the_table_of_typical_steps_says_what_a_plan_would_do():
    window = KVGroup((8,), KVSpec.uniform(2, 64, 64, "float32", window=512), 8)
    costs = cores(3)
    choices = predict_grid([SMALL, window], costs, StepOptions())
    assert {choice.phase for choice in choices} == {Phase.PREFILL, Phase.DECODE}
    assert {choice.group_idx for choice in choices} == {0, 1}
    for choice in choices:
        group = (SMALL, window)[choice.group_idx]
        table = striped_table(choice.context + choice.chunk, StepOptions().geometry(3))
        runs = step_runs(table, choice.context, choice.context + choice.chunk)
        assert plan_group(runs, {0: table}, group, costs).strategy is choice.strategy
        if choice.predicted_s:
            assert choice.predicted_s[choice.strategy] == min(choice.predicted_s.values())
            assert TREE not in choice.predicted_s, "one node"
        else:
            assert choice.strategy is LOCAL


@pytest.mark.parametrize(("chunk", "context"), [(1, 1000), (1, 100_000), (300, 5000), (4096, 0)])
def test_leaving_out_what_cannot_win_changes_no_choice(chunk, context):
    for costs in (gpus(1), gpus(2), cores(4)):
        whole = predict_step_choice(LARGE, 0, chunk, context, costs, OPTIONS).strategy
        table = striped_table(context + chunk, OPTIONS.geometry(costs.topology.num_ranks))
        runs = step_runs(table, context, context + chunk)
        assert plan_group(runs, {0: table}, LARGE, costs).strategy is whole
