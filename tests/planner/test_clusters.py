"""Clusters: known GPUs, files described by hand or measured, and everything that is refused in them."""

import json

import msgspec
import pytest
import yaml
from hardware import MEASURED

from longspan.costmodel.gpus import GPUS
from longspan.costmodel.parameters import Costs, KernelRates, Link, Topology
from longspan.costmodel.published import Assumptions
from longspan.costmodel.topology_file import topology_text
from longspan.errors import ConfigError
from longspan.planner.cluster_file import load_cluster
from longspan.planner.clusters import known_cluster
from longspan.quantities import parse_tokens

DESCRIBED = {
    "nodes": 2,
    "devices_per_node": 4,
    "memory_bytes": "96GB",
    "bfloat16_flops_per_s": 8.0e14,
    "read_bytes_per_s": 4.0e12,
    "inside": {"bytes_per_s": 4.0e11},
    "between": {"bytes_per_s": 2.5e10, "latency_s": 3.0e-5},
}


def write(tmp_path, data, name="cluster.yaml"):
    path = tmp_path / name
    path.write_text(json.dumps(data) if name.endswith("json") else yaml.safe_dump(data))
    return str(path)


def without(data, *fields):
    return {key: value for key, value in data.items() if key not in fields}


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("8k", 8192), ("128K", 131072), ("1M", 1048576), ("131072", 131072), (" 1.5k ", 1536), ("0.5M", 524288), ("1", 1)],
)
def test_tokens_are_counted_in_powers_of_two(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-1", "8kb", "8Ki", "1G", "1.0001k", "k", "1e6", "4096M", "٣"])
def test_rejects_what_is_no_number_of_tokens(text):
    with pytest.raises(ConfigError, match=r"context: got .*, legal is a whole number of tokens from 1 to"):
        parse_tokens(text)


# -- known GPUs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GPUS)
def test_every_known_gpu_makes_costs_below_its_published_figures(name):
    cluster, gpu = known_cluster(name, 4, 2), GPUS[name]
    for dtype in ("bfloat16", "float32"):
        costs = cluster.costs(8, 1, dtype)
        assert costs.topology.nodes == (0, 0, 0, 0, 1, 1, 1, 1)
        assert costs.rates.matmul_flops_per_s == pytest.approx(0.7 * cluster.peak_flops_per_s(dtype))
        assert costs.rates.attention_rate(4096) == pytest.approx(0.6 * cluster.peak_flops_per_s(dtype))
        assert costs.rates.attention_rate(1) < costs.rates.attention_rate(64) < costs.rates.attention_rate(128)
        assert costs.rates.read_bytes_per_s == pytest.approx(0.8 * gpu.read_bytes_per_s)
        assert costs.topology.inside.bytes_per_s == pytest.approx(0.8 * gpu.inside_bytes_per_s)
        assert costs.topology.between.bytes_per_s == pytest.approx(0.8 * gpu.between_bytes_per_s)
    assert cluster.peak_flops_per_s("float32") < cluster.peak_flops_per_s("bfloat16")


def test_figures_of_a_gpu_are_plausible():
    for gpu in GPUS.values():
        assert 20e9 <= gpu.memory_bytes < 300e9
        assert 100 < gpu.bfloat16_flops_per_s / gpu.read_bytes_per_s < 500, "flops per byte"
        assert gpu.between_bytes_per_s <= gpu.inside_bytes_per_s < gpu.read_bytes_per_s


def test_ranks_of_several_devices_stay_in_their_node():
    costs = known_cluster("h100", 8, 2).costs(16, 4, "bfloat16")
    assert costs.topology.nodes == (0, 0, 1, 1)


def test_rejects_an_unknown_gpu_and_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"gpu: got 'h300', legal is one of a10, l4, .*, h100, h200, .*rtx4090"):
        known_cluster("h300", 8, 1)
    assert known_cluster("H100", 8, 1).name == "H100 SXM"


@pytest.mark.parametrize(("per_node", "nodes"), [(0, 1), (8, 0), (-1, 1), (2000, 1)])
def test_rejects_illegal_counts_of_devices(per_node, nodes):
    with pytest.raises(ConfigError, match=r"(nodes|devices_per_node): got -?\d+, legal is a whole number from 1 to"):
        known_cluster("h100", per_node, nodes)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster.json"])
def test_a_described_cluster_is_read_from_yaml_and_json(tmp_path, name):
    cluster = load_cluster(write(tmp_path, DESCRIBED | {"assumptions": {"matmul_efficiency": 0.5}}, name))
    assert (cluster.num_devices, cluster.devices_per_node, cluster.memory_bytes) == (8, 4, 96e9)
    assert cluster.inside == Link(Assumptions().inside_latency_s, 4e11)
    assert cluster.between == Link(3e-5, 2.5e10)
    assert cluster.costs(8, 1, "bfloat16").rates.matmul_flops_per_s == pytest.approx(4e14)
    with pytest.raises(ConfigError, match="dtype: got 'float32', legal is one of which the cluster names float32"):
        cluster.peak_flops_per_s("float32")


def test_a_known_gpu_may_be_the_start_of_a_description(tmp_path):
    path = write(tmp_path, {"gpu": "h200", "nodes": 2, "devices_per_node": 8, "between": {"bytes_per_s": 1e10}})
    cluster, known = load_cluster(path), known_cluster("h200", 8, 2)
    assert cluster.between.bytes_per_s == 1e10
    assert msgspec.structs.replace(cluster, between=known.between) == known


def test_numbers_may_be_written_as_people_write_them(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "nodes: 1\ndevices_per_node: 1\nmemory_bytes: 8e10\nbfloat16_flops_per_s: 9.89e14\nread_bytes_per_s: 3.35e12\n"
    )
    cluster = load_cluster(str(path))
    assert (cluster.memory_bytes, cluster.bfloat16_flops_per_s, cluster.read_bytes_per_s) == (8e10, 9.89e14, 3.35e12)


def test_measured_rates_are_used_as_they_are(tmp_path):
    cluster = load_cluster(write(tmp_path, MEASURED))
    topology = msgspec.convert(MEASURED["topology"], Topology)
    rates = msgspec.convert(MEASURED["rates"], KernelRates)
    assert cluster.costs(4, 1, "float32") == Costs(topology, rates)
    assert cluster.peak_flops_per_s("float32") == 8e10
    assert (cluster.num_nodes, cluster.devices_per_node, cluster.memory_bytes) == (2, 2, 4 * 2**30)
    with pytest.raises(ConfigError, match="dtype: got 'bfloat16', legal with these measured rates is float32"):
        cluster.peak_flops_per_s("bfloat16")


def test_memory_may_be_given_beside_the_file(tmp_path):
    path = write(tmp_path, without(MEASURED, "memory_bytes"))
    assert load_cluster(path, memory_bytes=10**9).memory_bytes == 10**9
    with pytest.raises(ConfigError, match="memory_bytes: the file does not say, legal is a field memory_bytes or"):
        load_cluster(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DESCRIBED | {"gpus": 8}, "cluster: got the unknown field 'gpus', legal is name, gpu, nodes, devices_per_node"),
        (DESCRIBED | {"assumptions": {"luck": 1}}, "assumptions: got the unknown field 'luck', legal is matmul_effic"),
        (
            DESCRIBED | {"inside": {"speed": 1}},
            "inside: got the unknown field 'speed', legal is latency_s, byt",
        ),
        (DESCRIBED | {"inside": 5}, "inside: got 5, legal is a mapping"),
        (DESCRIBED | {"inside": {"latency_s": 1e-5}}, "inside: lacks bytes_per_s"),
        (
            DESCRIBED | {"assumptions": {"matmul_efficiency": 1.5}},
            "assumptions.matmul_efficiency: got 1.5, legal",
        ),
        (DESCRIBED | {"assumptions": {"layer_s": -1}}, "assumptions.layer_s: got -1, legal is a number from 0"),
        (DESCRIBED | {"assumptions": [1]}, "assumptions: got .1., legal is a mapping"),
        (DESCRIBED | {"read_bytes_per_s": "fast"}, "read_bytes_per_s: got 'fast', legal is a number above 0"),
        (DESCRIBED | {"read_bytes_per_s": True}, "read_bytes_per_s: got True"),
        (DESCRIBED | {"memory_bytes": "lots"}, "memory_bytes: got 'lots'"),
        (DESCRIBED | {"memory_bytes": 0}, "memory_bytes: got 0"),
        (DESCRIBED | {"nodes": 1.5}, "nodes: got 1.5, legal is a whole number"),
        (DESCRIBED | {"gpu": "h300"}, "gpu: got 'h300'"),
        (without(DESCRIBED, "nodes"), "cluster: lacks nodes"),
        (without(DESCRIBED, "inside", "memory_bytes"), "cluster: lacks memory_bytes, inside .or gpu, to start from"),
        (without(DESCRIBED, "bfloat16_flops_per_s"), "lacks bfloat16_flops_per_s and float32_flops_per_s, legal is at"),
        (MEASURED | {"nodes": 2}, "cluster with measured rates: got the unknown field 'nodes', legal is name, dtype"),
        (without(MEASURED, "rates"), "cluster with measured rates: lacks rates"),
        (MEASURED | {"rates": {"matmul": 1}}, "rates: got the field 'matmul', legal is matmul_flops_per_s"),
        (MEASURED | {"rates": {"call_s": 1}}, "rates: got no matmul_flops_per_s, legal is to name"),
        (
            MEASURED | {"topology": without(MEASURED["topology"], "between")},
            "topology.between: the file does not say, legal is a link",
        ),
        (MEASURED | {"rates": 7}, "rates: got 7, legal is a mapping"),
        (MEASURED | {"dtype": "int4"}, "dtype: got 'int4', legal is bfloat16 or float32"),
        (
            MEASURED | {"topology": MEASURED["topology"] | {"nodes": [0, 0, 1]}},
            "topology.nodes: got .*, legal for planning are equal nodes",
        ),
        (
            MEASURED | {"topology": MEASURED["topology"] | {"inside": {"latency_s": -1, "bytes_per_s": 1}}},
            "latency_s: got -1",
        ),
        ([1, 2], "cluster: got .* with a list, legal is a mapping of fields"),
        ("text", "cluster: got .* with a str, legal is a mapping of fields"),
    ],
)
def test_rejects_files_that_say_something_else(tmp_path, data, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_cluster(write(tmp_path, data))
    assert "\n" not in str(error.value)


@pytest.mark.cover
def test_rejects_a_file_of_brackets_in_one_line(tmp_path):
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    with pytest.raises(ConfigError, match="legal is YAML or JSON"):
        load_cluster(str(tmp_path / "deep.yaml"))


def test_rejects_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cluster: got .*, legal is a file that can be read: No such file"):
        load_cluster(str(tmp_path / "none.yaml"))
    path = tmp_path / "cluster.yaml"
    path.write_text("nodes: [1")
    with pytest.raises(ConfigError, match=r"cluster: got .*, legal is YAML or JSON: "):
        load_cluster(str(path))
    path.write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="legal is UTF-8 text"):
        load_cluster(str(path))


def test_no_object_is_made_of_a_yaml_tag(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("nodes: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="legal is YAML or JSON"):
        load_cluster(str(path))


def test_what_ranks_measured_is_saved_and_planned_with(tmp_path):
    """The file that `longspan topology --save` writes, with every field of the cost model."""
    link = Link(2e-5, 1.5e9, short_bytes=65536, long_latency_s=3e-4)
    rates = KernelRates(1e11, 1e10, 5e9, ((1, 2e10), (256, 9e10)), 2e-5, 1e-5, 3e-4, 1e-5, 4e-6, 1e-10, 2.0)
    costs = Costs(Topology((0, 0, 1, 1), link, Link(1e-4, 1e8), 2.0, (0, 0, 0, 0)), rates)
    path = tmp_path / "measured.yaml"
    path.write_text(topology_text(costs, name="two hosts", dtype="float32", memory_bytes=4 * 2**30))
    cluster = load_cluster(str(path))
    assert cluster.name == "two hosts"
    assert cluster.memory_bytes == 4 * 2**30
    assert cluster.costs(4, 1, "float32") == costs
    half = cluster.costs(2, 1, "float32").topology
    assert (half.nodes, half.machines, half.ranks_per_link) == ((0, 0), None, 2.0)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_rejects_illegal_times_of_tokens(value):
    with pytest.raises(ConfigError, match=r"token_s: got .*, legal is a number from 0 .seconds. or none"):
        KernelRates(1e11, 1e10, 5e9, ((1, 1e9),), 0.0, token_s=value)
