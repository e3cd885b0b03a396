"""Proves where the numbers of the cost model come from: files that are checked, a cache that is keyed by everything
that matters, ranks that measure."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import torch
import yaml
from hardware import cores, gpus

from longspan.attention.measure import QUERY_LENS, measure_kernels
from longspan.attention.select import make_backend
from longspan.comm import measure as comm_measure
from longspan.comm.base import Communicator
from longspan.comm.measure import barrier, measure_links
from longspan.comm.threads import thread_group
from longspan.config import EngineConfig
from longspan.costmodel.measured import LinkMeasurement, RankMeasurement, combine
from longspan.costmodel.parameters import KernelRates, Link
from longspan.costmodel.topology_file import load_topology, topology_text
from longspan.engine import cost_parameters
from longspan.engine.cost_parameters import (
    MeasuredOn,
    file_costs,
    find_costs,
    gpu_costs,
    nodes_of,
    striped_from,
    weights_of,
)
from longspan.errors import ConfigError
from longspan.kv.layout import KVGroup, KVSpec
from longspan.planner.clusters import known_cluster
from longspan.scheduler.scheduler import Scheduler
from longspan.types import AttentionParams, ModelSpec, SamplingParams

GROUP = KVGroup((0, 1), KVSpec.uniform(2, 8, 8, "float32"), 4)
MODEL = ModelSpec("Test", 2, 100, None, (), (GROUP,), (AttentionParams(0.3),) * 2, num_parameters=10_000)

# -- files -----------------------------------------------------------------------------------------------------------


def saved(path: Path, costs=None, **changes) -> str:
    """A file of 4 ranks on 2 nodes, with changes: {"rates.call_s": value}; None removes."""
    text = topology_text(costs or gpus(2, 2), name="test", dtype="float32", memory_bytes=2**30)
    data = yaml.safe_load(text)
    for name, value in changes.items():
        *parents, last = name.split(".")
        place = data
        for parent in parents:
            place = place[parent]
        if value is None:
            place.pop(last)
        else:
            place[last] = value
    path.write_text(yaml.safe_dump(data))
    return str(path)


UNEQUAL = msgspec.structs.replace(gpus(2, 2), speeds=(2.0, 1.0, 1.0, 1.5))


@pytest.mark.parametrize("costs", [gpus(2, 2), cores(4), gpus(4, 1), UNEQUAL])
def test_a_file_gives_back_what_was_saved(tmp_path, costs):
    assert load_topology(saved(tmp_path / "t.yaml", costs), 4, "float32") == costs


def test_a_file_may_be_json_and_name_one_link_where_there_is_one_node(tmp_path):
    costs = cores(2)
    data = {"topology": {"nodes": [0, 0], "inside": costs.topology.inside}, "rates": costs.rates}
    (tmp_path / "t.json").write_bytes(msgspec.json.encode(data))
    assert load_topology(str(tmp_path / "t.json"), 2, "bfloat16") == costs


def test_numbers_without_a_point_or_sign_are_numbers(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(Path(saved(path)).read_text().replace("600000000000000.0", "6e14"))
    assert "6e14" in path.read_text()
    assert load_topology(str(path), 4, "float32") == gpus(2, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rates": None}, "rates"),
        ({"rates.call_s": None}, "call_s"),
        ({"rates.call_s": -1}, "call_s"),
        ({"rates.call_s": "soon"}, "call_s"),
        ({"rates.speed": 1}, "'speed'"),
        ({"rates.attention_flops_per_s": [[16, 1.0], [1, 1.0]]}, "attention_flops_per_s"),
        ({"rates": [1]}, "rates"),
        ({"topology.between": None}, "between"),
        ({"topology.inside.bytes_per_s": 0}, "bytes_per_s"),
        ({"topology.inside.latency_s": None}, "latency_s"),
        ({"topology.inside.speed": 1}, "'speed'"),
        ({"topology.inside": 7}, "inside"),
        ({"topology.nodes": [0, 0, 2, 2]}, "nodes"),
        ({"topology.nodes": [0, 0, 1]}, "3 ranks"),
        ({"topology.color": "red"}, "'color'"),
        ({"color": "red"}, "'color'"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"speeds": [1, 2, 3]}, "speeds: got .* one number above 0 per rank"),
        ({"speeds": [1, 2, 3, 0]}, "speeds"),
        ({"speeds": "fast"}, "speeds"),
    ],
)
def test_rejects_files_in_one_line_that_names_the_field(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        load_topology(saved(tmp_path / "t.yaml", **changes), 4, "float32")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("data", [b"a: [", b"\xff\xfe", b"just text", b""])
def test_rejects_files_that_are_no_mapping(tmp_path, data):
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(ConfigError, match="topology"):
        load_topology(str(tmp_path / "t"), 2, "float32")
    with pytest.raises(ConfigError, match="No such file"):
        load_topology(str(tmp_path / "missing"), 2, "float32")


def test_rejects_nodes_that_contradict_the_file(tmp_path):
    path = saved(tmp_path / "t.yaml")
    config = EngineConfig(model="recall", context_parallel_size=4, topology=path)
    assert file_costs(config, MODEL) == gpus(2, 2)
    same = msgspec.structs.replace(config, nodes=(0, 0, 1, 1))
    assert file_costs(same, MODEL) == gpus(2, 2)
    with pytest.raises(ConfigError, match="nodes"):
        file_costs(msgspec.structs.replace(config, nodes=(0, 1, 2, 3)), MODEL)
    with pytest.raises(ConfigError, match="nodes"):
        file_costs(msgspec.structs.replace(config, simulated_links="nodes=0,1,0,1 latency_us=1"), MODEL)
    with pytest.raises(ConfigError, match=r"nodes: got \(0, 1\) with simulated_links that say \(0, 0\)"):
        EngineConfig(model="recall", context_parallel_size=2, nodes=(0, 1), simulated_links="nodes=0,0 latency_us=1")
    assert file_costs(msgspec.structs.replace(config, topology=None), MODEL) is None


# -- the cache -------------------------------------------------------------------------------------------------------


class FakeRanks:
    """Counts how often it is asked to measure."""

    def __init__(self, hosts=("a", "a")):
        self.hosts, self.num_asked = hosts, 0

    def measure(self, nodes, machines):
        self.num_asked += 1
        self.machines = machines
        rates = cores(2).rates
        links = LinkMeasurement(Link(1e-5, 1e9), None, None, 1e-6 * self.num_asked, 0.0)
        return [RankMeasurement(rank, rates, links) for rank in range(len(nodes))]


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """Starts measure, into a cache of the test's own."""
    monkeypatch.delenv(cost_parameters.MEASURE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return EngineConfig(model="recall", context_parallel_size=2)


def costs_for(config, ranks, hosts=("a", "a"), model=MODEL):
    return find_costs(config, model, ranks, hosts)


def test_ranks_measure_once_and_later_starts_know(measuring):
    ranks = FakeRanks()
    first = costs_for(measuring, ranks)
    assert first is not None
    assert first.topology.nodes == ranks.machines == (0, 0)
    assert costs_for(measuring, ranks) == first
    assert ranks.num_asked == 1
    again = costs_for(msgspec.structs.replace(measuring, measure="again"), ranks)
    assert again != first
    assert costs_for(measuring, ranks) == again, "what was measured again replaces what was known"
    assert ranks.num_asked == 2


def test_every_difference_that_matters_is_measured_apart(measuring):
    ranks = FakeRanks()
    links = "nodes=0,1 latency_us=100"
    wide = msgspec.structs.replace(MODEL, kv_groups=(msgspec.structs.replace(GROUP, num_query_heads=8),))
    costs_for(measuring, ranks)
    costs_for(measuring, ranks, hosts=("a", "b"))
    costs_for(measuring, ranks, model=wide)
    costs_for(msgspec.structs.replace(measuring, nodes=(0, 1)), ranks)
    costs_for(msgspec.structs.replace(measuring, simulated_links=links), ranks)
    costs_for(msgspec.structs.replace(measuring, simulated_links=links.replace("100", "200")), ranks)
    costs_for(msgspec.structs.replace(measuring, threads_per_rank=7), ranks)
    costs_for(msgspec.structs.replace(measuring, attention_backend="reference"), ranks)
    rounded = msgspec.structs.replace(GROUP, float32_partials=True, spec=KVSpec.uniform(2, 8, 8, "bfloat16"))
    costs_for(measuring, ranks, model=msgspec.structs.replace(MODEL, kv_groups=(rounded,)))
    kept = msgspec.structs.replace(rounded, float32_partials=False)
    costs_for(measuring, ranks, model=msgspec.structs.replace(MODEL, kv_groups=(kept,)))
    costs_for(msgspec.structs.replace(measuring, quantization="int8"), ranks)
    costs_for(measuring, ranks, model=msgspec.structs.replace(MODEL, weight_bytes=MODEL.weight_bytes + 1))
    assert ranks.num_asked == 12


def test_the_keys_of_the_cache_differ_in_every_field():
    base = MeasuredOn(("a",), (0,), "cpu", 2, 1, 1, "heads", 5, "none 20", None, "ray eth0", True, ("1",))
    others = {
        "hosts": ("b",),
        "nodes": (1,),
        "cpu": "other",
        "num_cores": 3,
        "num_threads": 2,
        "tensor_parallel_size": 2,
        "attention": "other",
        "num_parameters": 6,
        "quantization": "int8 5",
        "simulated_links": "x",
        "executor": "ray ib0",
        "are_equal": False,
        "versions": ("2",),
    }
    assert set(others) == set(MeasuredOn.__struct_fields__)
    paths = {msgspec.structs.replace(base, **{name: value}).path for name, value in others.items()}
    assert len(paths | {base.path}) == len(others) + 1


@pytest.mark.parametrize("damage", [b"", b"{", b"{}", b'{"measured_on": 1, "costs": 2}'])
def test_a_damaged_cache_is_measured_again(measuring, tmp_path, damage):
    ranks = FakeRanks()
    costs_for(measuring, ranks)
    (path,) = (tmp_path / "longspan").iterdir()
    path.write_bytes(damage)
    assert costs_for(measuring, ranks) is not None
    assert ranks.num_asked == 2
    assert [p.name for p in (tmp_path / "longspan").iterdir()] == [path.name], "nothing else is left behind"


def test_a_cache_that_cannot_be_written_is_no_error(measuring, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert costs_for(measuring, FakeRanks()) is not None


def test_a_cache_that_cannot_take_its_place_leaves_nothing_behind(measuring, tmp_path):
    costs_for(measuring, FakeRanks())
    (path,) = (tmp_path / "longspan").iterdir()
    path.unlink()
    path.mkdir()
    assert costs_for(measuring, FakeRanks()) is not None
    assert list((tmp_path / "longspan").iterdir()) == [path]


def test_a_cached_topology_of_other_nodes_is_not_believed(measuring, tmp_path):
    ranks = FakeRanks()
    costs_for(measuring, ranks)
    (path,) = (tmp_path / "longspan").iterdir()
    cached = msgspec.json.decode(path.read_bytes())
    cached["costs"]["topology"]["nodes"] = [0, 0, 0]
    cached["costs"]["topology"]["machines"] = None
    path.write_bytes(msgspec.json.encode(cached))
    assert costs_for(measuring, ranks).topology.nodes == (0, 0)
    assert ranks.num_asked == 2


def test_nobody_measures_where_it_would_be_of_no_use(measuring, monkeypatch):
    ranks = FakeRanks()
    replace = msgspec.structs.replace
    assert costs_for(replace(measuring, measure="never"), ranks) is None
    assert costs_for(replace(measuring, executor="threads"), ranks) is None
    assert costs_for(replace(measuring, context_parallel_size=1), ranks, hosts=("a",)) is None
    monkeypatch.setenv(cost_parameters.MEASURE, "never")
    assert costs_for(measuring, ranks) is None
    assert ranks.num_asked == 0
    assert costs_for(replace(measuring, measure="again"), ranks) is not None, (
        "an option counts more than the environment"
    )


def test_nodes_are_hosts_unless_the_user_says_otherwise():
    config = EngineConfig(model="recall", context_parallel_size=4)
    assert nodes_of(config, ("a", "b", "a", "c")) == (0, 1, 0, 2)
    assert nodes_of(msgspec.structs.replace(config, nodes=(0, 0, 1, 1)), ("a",) * 4) == (0, 0, 1, 1)
    simulated = msgspec.structs.replace(config, simulated_links="nodes=0,1,1,0 latency_us=9")
    assert nodes_of(simulated, ("a",) * 4) == (0, 1, 1, 0)


def test_measured_costs_set_strategies_and_striped_prompts_of_a_scheduler():
    config = EngineConfig(model="recall", context_parallel_size=2, measure="never")
    scheduler = Scheduler(MODEL, config, [(64,)] * 2)
    assert scheduler.memory.placer.striped_from == config.striped_from
    found = striped_from(config, MODEL, cores(2), 16, [(64,)] * 2)
    scheduler.use_costs(cores(2), found)
    assert scheduler.writer.costs == cores(2)
    assert scheduler.memory.placer.striped_from == found != config.striped_from
    forced = msgspec.structs.replace(config, min_striped_len=77)
    assert striped_from(forced, MODEL, cores(2), 16, [(64,)] * 2) is None
    assert (
        striped_from(msgspec.structs.replace(config, context_parallel_size=1), MODEL, cores(1), 16, [(64,)] * 2) is None
    )
    scheduler = Scheduler(MODEL, forced, [(64,)] * 2)
    scheduler.use_costs(cores(2), None)
    assert scheduler.memory.placer.striped_from == 77


# -- measuring -------------------------------------------------------------------------------------------------------


def on_ranks(size, call):
    """`call(comm)` on thread ranks, all at once."""
    comms = thread_group(size, timeout_s=30.0)
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(call, comms))


@pytest.mark.parametrize(
    ("nodes", "inside", "between", "lone"),
    [
        ((0, 0), [True, True], [False, False], [False, False]),
        ((0, 0, 0), [True, True, False], [False] * 3, [False] * 3),
        ((0, 1, 2, 2), [False, False, True, True], [True, True, False, False], [True, True, True, False]),
        ((0, 1), [False, False], [True, True], [True, True]),
        ((0, 0, 1, 1), [True] * 4, [True] * 4, [True, False, True, False]),
        ((0, 1, 0, 1), [True] * 4, [True] * 4, [True, True, False, False]),
        ((0, 0, 1), [True, True, False], [True, False, True], [True, False, True]),
    ],
)
def test_every_rank_measures_the_links_that_it_has(monkeypatch, nodes, inside, between, lone):
    monkeypatch.setattr(comm_measure, "SIZES", tuple((16 << i, 5) for i in range(7)))
    monkeypatch.setattr(comm_measure, "MAX_BUSY_S", 1e-3)
    monkeypatch.setattr(comm_measure, "OVERLAP_BYTES", 1024)
    found = on_ranks(len(nodes), lambda comm: measure_links(comm, nodes))
    assert [links.inside is not None for links in found] == inside
    assert [links.between is not None for links in found] == between
    assert [links.lone_bytes_per_s is not None for links in found] == lone
    for links in found:
        for link in (links.inside, links.between):
            assert link is None or (link.latency_s > 0 and link.bytes_per_s > 0)
        assert min(links.exchange_s, links.moved_byte_s) >= 0


def test_a_link_is_fitted_to_what_messages_took():
    def times(latency_s, bytes_per_s, long_latency_s=0.0, short_bytes=32768):
        sizes = [size for size, _ in comm_measure.SIZES]
        found = [(n, latency_s + n / bytes_per_s + (long_latency_s if n > short_bytes else 0.0)) for n in sizes]
        return comm_measure.RingTimes(found, 0.0)

    plain = comm_measure.fitted_link(times(1e-3, 1e8))
    assert (plain.short_bytes, plain.long_latency_s) == (None, 0.0)
    assert plain.bytes_per_s == pytest.approx(1e8)
    assert plain.latency_s == pytest.approx(1e-3, rel=0.05)
    two_ways = comm_measure.fitted_link(times(2e-5, 2e9, 3e-4))
    assert two_ways.short_bytes == 32768
    assert two_ways.long_latency_s == pytest.approx(3e-4, rel=0.1)
    assert two_ways.message_s(10_000) < 1e-4 < 3e-4 < two_ways.message_s(100_000)


def test_a_barrier_lets_nobody_through_before_all_have_come():
    arrived = []

    def run(comm: Communicator) -> int:
        for _ in range(random.Random(comm.rank).randrange(2000)):
            torch.zeros(10).sum()
        arrived.append(comm.rank)
        barrier(comm)
        return len(arrived)

    assert on_ranks(4, run) == [4, 4, 4, 4]


@pytest.mark.parametrize("sharing", [1.0, 2.0])
def test_kernels_are_measured_at_the_models_shapes(monkeypatch, sharing):
    for name, value in {
        "MOST_KEYS": 64,
        "FEWEST_KEYS": 8,
        "READ_BYTES": 4096,
        "MATMUL_ROWS": 8,
        "SHARED_S": 1e-3,
    }.items():
        monkeypatch.setattr(f"longspan.attention.measure.{name}", value)
    synced = []
    rates = measure_kernels(
        make_backend("reference", "cpu"),
        GROUP,
        AttentionParams(0.3),
        ranks_per_device=sharing,
        sync=lambda: synced.append(1),
        device=torch.device("cpu"),
    )
    assert [num_queries for num_queries, _ in rates.attention_flops_per_s] == list(QUERY_LENS)
    assert (rates.ranks_per_device, rates.exchange_s, rates.layer_s) == (sharing, 0.0, 0.0)
    assert min(rates.call_s, rates.merge_s) > 0
    assert len(synced) >= len(QUERY_LENS)


def test_long_calls_of_large_models_are_left_out(monkeypatch):
    monkeypatch.setattr("longspan.attention.measure.MOST_FLOPS", 1e4)
    monkeypatch.setattr("longspan.attention.measure.FEWEST_KEYS", 16)
    rates = measure_kernels(
        make_backend("reference", "cpu"),
        GROUP,
        AttentionParams(0.3),
        ranks_per_device=1.0,
        sync=lambda: None,
        device=torch.device("cpu"),
    )
    assert [num_queries for num_queries, _ in rates.attention_flops_per_s] == [1, 16, 64]


def test_the_slowest_rank_counts_number_by_number():
    rates = [
        KernelRates(10.0, 20.0, 30.0, ((1, 5.0), (16, 9.0)), 1.0, layer_s=0.1, merge_s=3.0),
        KernelRates(11.0, 19.0, 30.0, ((1, 6.0), (16, 8.0)), 2.0, layer_s=0.0, merge_s=1.0),
    ]
    links = [
        LinkMeasurement(Link(1e-6, 5e9), Link(1e-3, 1e8), 3e8, 1e-6, 0.0),
        LinkMeasurement(Link(2e-6, 4e9, 1024, 1e-5), None, None, 2e-6, 1e-9),
    ]
    costs = combine([RankMeasurement(i, *pair) for i, pair in enumerate(zip(rates, links, strict=True))], (0, 0))
    assert costs.topology.inside == Link(2e-6, 4e9, 1024, 1e-5)
    assert costs.topology.between == Link(1e-3, 1e8)
    assert costs.topology.ranks_per_link == pytest.approx(3.0)
    shared = [msgspec.structs.replace(rate, ranks_per_device=1.5, exchange_s=1e-6) for rate in rates]
    both = combine([RankMeasurement(i, *pair) for i, pair in enumerate(zip(shared, links, strict=True))], (0, 0))
    assert both.rates.exchange_s == pytest.approx(1e-6 + 1.5 * 2e-6), "half of the ranks waited when it was measured"
    assert costs.rates == KernelRates(
        10.0, 19.0, 30.0, ((1, 5.0), (16, 8.0)), 2.0, 2e-6, layer_s=0.1, merge_s=3.0, moved_byte_s=1e-9
    )


# -- unequal ranks -----------------------------------------------------------------------------------------------------


def measured_as(*speeds: float) -> list[RankMeasurement]:
    """Ranks that are so fast in all that they compute."""
    base, links = cores(2).rates, LinkMeasurement(Link(1e-6, 5e9), None, None, 1e-6, 0.0)
    return [
        RankMeasurement(
            rank,
            msgspec.structs.replace(
                base,
                matmul_flops_per_s=base.matmul_flops_per_s * speed,
                attention_flops_per_s=tuple((n, rate * speed) for n, rate in base.attention_flops_per_s),
            ),
            links,
        )
        for rank, speed in enumerate(speeds)
    ]


def test_speeds_are_relative_to_the_slowest_rank_and_noise_is_no_difference():
    nodes = (0, 0, 0)
    assert combine(measured_as(2.0, 1.0, 1.5), nodes).speeds is None, "ranks are equal unless the user says otherwise"
    found = combine(measured_as(2.0, 1.0, 1.5), nodes, are_equal=False).speeds
    assert found == pytest.approx((2.0, 1.0, 1.5))
    assert combine(measured_as(1.05, 1.0, 1.08), nodes, are_equal=False).speeds == (1.0, 1.0, 1.0)


def test_auto_weights_are_measured_speeds_and_a_rank_far_slower_has_one_page_of_a_chunk():
    config = EngineConfig(model="recall", context_parallel_size=3, rank_weights="auto")
    assert weights_of(config, None) is None
    assert weights_of(config, cores(3)) is None, "nothing was measured"
    costs = msgspec.structs.replace(cores(3), speeds=(3.0, 1.0, 1.5))
    assert weights_of(config, costs) == (3.0, 1.0, 1.5)
    assert weights_of(msgspec.structs.replace(config, rank_weights=(1, 2, 3)), costs) == (1, 2, 3)
    assert weights_of(msgspec.structs.replace(config, rank_weights=None), costs) is None
    slow = msgspec.structs.replace(cores(3), speeds=(1000.0, 1.0, 900.0))
    scheduler = Scheduler(MODEL, config, [(64,)] * 3)
    scheduler.use_costs(slow, None, weights_of(config, slow))
    assert scheduler.memory.placer.geometry.shares == (128, 1, 115)


def test_auto_weights_change_how_prompts_are_cut(measuring):
    config = msgspec.structs.replace(measuring, rank_weights="auto")
    scheduler = Scheduler(MODEL, config, [(640,)] * 2)
    ranks = FakeRanks()
    ranks.measure = lambda nodes, machines: measured_as(2.0, 1.0)
    costs = costs_for(config, ranks)
    assert costs.speeds == pytest.approx((2.0, 1.0))
    shortest = striped_from(config, MODEL, costs, 16, [(640,)] * 2)
    scheduler.use_costs(costs, shortest, weights_of(config, costs))
    assert scheduler.memory.placer.geometry.tokens_per_rank == (2048, 1024)
    request = scheduler.add_request([3] * 6144, SamplingParams(max_tokens=1))
    plan = scheduler.schedule()
    assert sum(run.num_tokens for run in plan.query_runs if run.compute_rank == 0) == 2048
    assert sum(run.num_tokens for run in plan.query_runs) == 3072 < len(request.token_ids)


def test_ranks_on_known_gpus_choose_by_their_published_figures():
    """Of which the planner's are the same."""
    config = EngineConfig(model="m", context_parallel_size=4, device="cuda")
    costs = gpu_costs(config, MODEL, ["NVIDIA H200"] * 4)
    assert costs == known_cluster("h200", 4, 1).costs(4, 1, "float32")
    assert costs.topology.inside.bytes_per_s < 450e9
    slow = gpu_costs(config, MODEL, ["NVIDIA L4"] * 4)
    assert slow.rates.read_bytes_per_s < costs.rates.read_bytes_per_s
    nodes = msgspec.structs.replace(config, nodes=(0, 0, 1, 1))
    assert gpu_costs(nodes, MODEL, ["NVIDIA L4"] * 4).topology.nodes == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["NVIDIA H200", "NVIDIA L4"]),
        ({}, ["NVIDIA H200", "Some other GPU"]),
        ({}, ["NVIDIA H100 PCIe"] * 2),
        ({}, []),
        ({}, ["NVIDIA H200"]),
        ({"measure": "never"}, ["NVIDIA H200"] * 2),
        ({"device": "cpu"}, []),
    ],
)
def test_ranks_on_other_gpus_count_bytes(options, names):
    config = EngineConfig(model="m", **{"context_parallel_size": 2, "device": "cuda", **options})
    assert gpu_costs(config, MODEL, names) is None
