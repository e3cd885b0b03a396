"""Topology file: a cluster's nodes, links and rates, read and written.

Holds the format and its checks. Must not know how the numbers are found or used.
Read next: `longspan.costmodel.parameters`, whose fields these are.

    name: two hosts with two ranks each
    dtype: float32                      # of weights, activations and KV
    topology:
      nodes: [0, 0, 1, 1]               # per rank, its node
      inside: {latency_s: 2.0e-5, bytes_per_s: 2.0e+9}
      between: {latency_s: 2.0e-4, bytes_per_s: 1.2e+8}
    rates:
      matmul_flops_per_s: 1.0e+11
      read_bytes_per_s: 1.0e+10
      copy_bytes_per_s: 1.0e+10
      attention_flops_per_s: [[1, 2.0e+10], [64, 8.0e+10]]
      call_s: 3.0e-5
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from longspan.costmodel.parameters import Costs, KernelRates, Link, Topology
from longspan.errors import ConfigError

FIELDS = ("name", "dtype", "memory_bytes", "topology", "rates", "speeds")
"""Legal fields of a file; `memory_bytes`, of one rank, is for planning with the file."""

_Struct = TypeVar("_Struct", Topology, KernelRates, Link)


def load_topology(path: str, num_ranks: int, dtype: str) -> Costs:
    """Read a cluster's costs for a run.

    Args:
        path: a YAML or JSON file.
        num_ranks: ranks of the run.
        dtype: dtype of the run's weights, activations and KV.

    Raises:
        ConfigError: the file cannot be read, a field is unknown or missing, a value is illegal, or the file is about
            another number of ranks or another dtype.
    """
    data = read_mapping("topology", path)
    _check_fields(f"topology {path!r}", data, FIELDS, ("topology", "rates"))
    if data.get("dtype", dtype) != dtype:
        raise ConfigError(f"topology {path!r}: got rates for dtype {data['dtype']!r}, legal with this run is {dtype!r}")
    costs = parse_costs(data["topology"], data["rates"], data.get("speeds"))
    if costs.topology.num_ranks != num_ranks:
        raise ConfigError(
            f"topology.nodes: got {costs.topology.num_ranks} ranks in {path!r}, legal is context_parallel_size "
            f"({num_ranks})"
        )
    return costs


def parse_costs(links: Any, rates: Any, speeds: Any = None) -> Costs:
    """Costs from a file's fields `topology` and `rates`, and `speeds` where ranks are not equally fast.

    Raises:
        ConfigError: a field is unknown or missing, or a value is illegal.
    """
    _check_fields("topology", links, Topology.__struct_fields__, ("nodes", "inside"))
    has_between = "between" in links
    links = {"between": links["inside"], **links}
    for name in ("inside", "between"):
        _check_fields(f"topology.{name}", links[name], Link.__struct_fields__, ("latency_s", "bytes_per_s"))
    topology = _convert("topology", links, Topology)
    if topology.num_nodes > 1 and not has_between:
        raise ConfigError("topology.between: the file does not say, legal is a link, as there are several nodes")
    required = ("matmul_flops_per_s", "read_bytes_per_s", "copy_bytes_per_s", "attention_flops_per_s", "call_s")
    _check_fields("rates", rates, KernelRates.__struct_fields__, required)
    try:
        known_speeds = msgspec.convert(speeds, tuple[float, ...] | None, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"speeds: {error}") from error
    return Costs(topology, _convert("rates", rates, KernelRates), known_speeds)


def topology_text(costs: Costs, *, name: str, dtype: str, memory_bytes: int) -> str:
    """Text of a file that `load_topology` reads, in YAML."""
    numbers = {field: value for field, value in msgspec.to_builtins(costs).items() if value is not None}
    data = {"name": name, "dtype": dtype, "memory_bytes": memory_bytes, **numbers}
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120)


def read_mapping(what: str, path: str) -> Any:
    """Content of a YAML or JSON file, not checked to be a mapping.

    Args:
        what: the option that names the file, for the error.
        path: the file.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML, but takes 1e9 for text
    except OSError as error:
        raise ConfigError(f"{what}: got {path!r}, legal is a file that can be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what}: got {path!r}, legal is UTF-8 text") from error
    except (yaml.YAMLError, RecursionError) as error:  # the latter from thousands of brackets
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{what}: got {path!r}, legal is YAML or JSON: {reason}") from error


def _check_fields(what: str, data: object, legal: Sequence[str], required: Sequence[str]) -> None:
    if not isinstance(data, dict):
        raise ConfigError(f"{what}: got {data!r}, legal is a mapping with {', '.join(required)}")
    unknown = [str(name) for name in data if name not in legal]
    if unknown:
        raise ConfigError(f"{what}: got the field {unknown[0]!r}, legal is {', '.join(legal)}")
    missing = [name for name in required if name not in data]
    if missing:
        raise ConfigError(f"{what}: got no {missing[0]}, legal is to name {', '.join(required)}")


def _convert(what: str, data: Mapping[str, Any], kind: type[_Struct]) -> _Struct:
    """Convert to a type, and check types and values; not strictly, as YAML takes `1e9` for text."""
    try:
        return msgspec.convert(data, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{what}: {error}") from error
