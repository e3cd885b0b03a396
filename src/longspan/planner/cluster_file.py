"""Cluster file in YAML or JSON: a cluster described by hand, or measured.

Holds the two formats and their checks. Must not know predictions.
Read next: `longspan.planner.clusters`; `longspan.costmodel.topology_file`, the measured part.

Described:                                   Measured (`topology` and `rates`, from `longspan.costmodel.parameters`):

    gpu: h100          # optional: a known      dtype: float32
                       # GPU to start from      memory_bytes: 8GiB        # of one rank
    nodes: 2                                    topology: {nodes: [0, 0], inside: {...}, between: {...}}
    devices_per_node: 8                         rates: {matmul_flops_per_s: 8.0e+10, ...}
    memory_bytes: 96GB
    bfloat16_flops_per_s: 8.0e+14
    inside: {bytes_per_s: 4.5e+11, latency_s: 1.0e-5}
    assumptions: {matmul_efficiency: 0.65}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.costmodel.parameters import NO_LINK, Link
from longspan.costmodel.published import Assumptions, check_number
from longspan.costmodel.topology_file import parse_costs, read_mapping
from longspan.errors import ConfigError
from longspan.planner.clusters import Cluster, known_cluster
from longspan.quantities import parse_size

DESCRIBED_FIELDS = (
    "name",
    "gpu",
    "nodes",
    "devices_per_node",
    "memory_bytes",
    "bfloat16_flops_per_s",
    "float32_flops_per_s",
    "read_bytes_per_s",
    "inside",
    "between",
    "assumptions",
)
MEASURED_FIELDS = ("name", "dtype", "memory_bytes", "topology", "rates", "assumptions")

LINK_FIELDS = ("latency_s", "bytes_per_s")


def load_cluster(path: str, *, memory_bytes: int | None = None) -> Cluster:
    """Read a cluster.

    Args:
        path: a YAML or JSON file.
        memory_bytes: memory of one device, in place of the file's; None takes the file's.

    Raises:
        ConfigError: the file cannot be read, a field is unknown or missing, or a value is illegal.
    """
    data = read_mapping("cluster", path)
    if not isinstance(data, dict):
        raise ConfigError(f"cluster: got {path!r} with a {type(data).__name__}, legal is a mapping of fields")
    data = dict(data)
    if memory_bytes is not None:
        data["memory_bytes"] = memory_bytes
    name = str(data.get("name", Path(path).name))
    if "topology" in data or "rates" in data:
        return _measured(data, name)
    return _described(data, name)


def _described(data: Mapping[str, Any], name: str) -> Cluster:
    """A cluster described by hand."""
    _check_fields("cluster", data, DESCRIBED_FIELDS)
    _require("cluster", data, ("nodes", "devices_per_node"))
    num_nodes, devices_per_node = data["nodes"], data["devices_per_node"]
    assumptions = _assumptions(data)
    base = None
    if "gpu" in data:
        base = known_cluster(str(data["gpu"]), devices_per_node, num_nodes)
    else:
        needed = ["memory_bytes", "read_bytes_per_s"]
        needed += ["inside"] if devices_per_node != 1 else []
        needed += ["between"] if num_nodes != 1 else []
        _require("cluster", data, needed, " (or gpu, to start from a known one)")
        if "bfloat16_flops_per_s" not in data and "float32_flops_per_s" not in data:
            raise ConfigError("cluster: lacks bfloat16_flops_per_s and float32_flops_per_s, legal is at least one")

    def number(field: str) -> Any:
        value = data[field] if field in data else getattr(base, field, None)
        if field in data:
            value = _number(value)
            check_number(field, value)
        return value

    def link(field: str, latency_s: float) -> Link:
        known = NO_LINK if base is None else getattr(base, field)
        given = data.get(field, {})
        if not isinstance(given, dict):
            raise ConfigError(f"{field}: got {given!r}, legal is a mapping with bytes_per_s and latency_s")
        _check_fields(field, given, LINK_FIELDS)
        if field in data and base is None:
            _require(field, given, ("bytes_per_s",))
        values: dict[str, Any] = {"latency_s": latency_s, "bytes_per_s": known.bytes_per_s}
        for key in given:
            values[key] = _number(given[key])
            check_number(f"{field}.{key}", values[key], zero=key == "latency_s")
        return Link(values["latency_s"], values["bytes_per_s"])

    return Cluster(
        name=name if base is None or "name" in data else base.name,
        num_nodes=num_nodes,
        devices_per_node=devices_per_node,
        memory_bytes=_memory(data) if "memory_bytes" in data else number("memory_bytes"),
        bfloat16_flops_per_s=number("bfloat16_flops_per_s"),
        float32_flops_per_s=number("float32_flops_per_s"),
        read_bytes_per_s=number("read_bytes_per_s"),
        inside=link("inside", assumptions.inside_latency_s),
        between=link("between", assumptions.between_latency_s),
        assumptions=assumptions,
    )


def _measured(data: Mapping[str, Any], name: str) -> Cluster:
    """A cluster whose rates were measured."""
    _check_fields("cluster with measured rates", data, MEASURED_FIELDS)
    if "memory_bytes" not in data:
        raise ConfigError(
            "memory_bytes: the file does not say, legal is a field memory_bytes or --memory SIZE, per rank"
        )
    _require("cluster with measured rates", data, ("topology", "rates"))
    costs = parse_costs(data["topology"], data["rates"])
    topology, rates = costs.topology, costs.rates
    per_node = topology.ranks_per_node
    if len(set(per_node)) != 1 or list(topology.nodes) != sorted(topology.nodes):
        raise ConfigError(
            f"topology.nodes: got {list(topology.nodes)}, legal for planning are equal nodes, the ranks of one after "
            "those of another"
        )
    dtype = data.get("dtype")
    if dtype not in (None, "bfloat16", "float32"):
        raise ConfigError(f"dtype: got {dtype!r}, legal is bfloat16 or float32")
    return Cluster(
        name=name,
        num_nodes=topology.num_nodes,
        devices_per_node=per_node[0],
        memory_bytes=_memory(data),
        bfloat16_flops_per_s=None,
        float32_flops_per_s=None,
        read_bytes_per_s=rates.read_bytes_per_s,
        inside=topology.inside,
        between=topology.between,
        assumptions=_assumptions(data),
        rates=rates,
        rates_dtype=dtype,
        topology=topology,
    )


def _assumptions(data: Mapping[str, Any]) -> Assumptions:
    given = data.get("assumptions", {})
    if not isinstance(given, dict):
        raise ConfigError(f"assumptions: got {given!r}, legal is a mapping")
    _check_fields("assumptions", given, Assumptions.__struct_fields__)
    return Assumptions(**{key: _number(value) for key, value in given.items()})


def _check_fields(what: str, data: Mapping[Any, Any], legal: tuple[str, ...]) -> None:
    unknown = sorted(str(key) for key in data if key not in legal)
    if unknown:
        raise ConfigError(f"{what}: got the unknown field {unknown[0]!r}, legal is {', '.join(legal)}")


def _require(what: str, data: Mapping[str, Any], fields: Any, otherwise: str = "") -> None:
    missing = [field for field in fields if field not in data]
    if missing:
        raise ConfigError(f"{what}: lacks {', '.join(missing)}{otherwise}")


def _number(value: Any) -> Any:
    """A value as a number, also one that YAML takes for text (`9.89e14`); anything else unchanged."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _memory(data: Mapping[str, Any]) -> float:
    value = data["memory_bytes"]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return float(parse_size(value, "memory_bytes"))
    check_number("memory_bytes", value)
    return float(value)
