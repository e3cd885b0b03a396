"""Cluster to plan with: published figures and assumptions, or measured rates.

Holds a user's description, its checks, and its conversion to costs. Must not know files, models or predictions.
Read next: `longspan.costmodel.gpus`, the known devices; `longspan.planner.cluster_file`;
`longspan.costmodel.model_time`.

Note [Devices and ranks]
    A rank of context parallelism is `tensor_parallel_size` devices, neighbours of one node; each holds its part of the
    heads and weights. Rates and links are those of one device: a device sends the keys of its heads to the same part of
    other ranks over its own link. So a group of N devices is N / tensor_parallel_size ranks, each as fast as one
    device, of a model whose heads and weights are divided.
"""

import msgspec

from longspan.config import MAX_RANKS
from longspan.costmodel.gpus import GPUS
from longspan.costmodel.parameters import Costs, KernelRates, Link, Topology
from longspan.costmodel.published import Assumptions, Figures, check_number, published_costs
from longspan.costmodel.shapes import PlannedDType
from longspan.errors import ConfigError

MAX_DEVICES = 65536
MAX_DEVICES_PER_NODE = 1024


def check_count(name: str, value: object, most: int) -> None:
    """Raise ConfigError unless a value is a whole number from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ConfigError(f"{name}: got {value!r}, legal is a whole number from 1 to {most}")


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """Equal nodes of equal devices.

    Raises:
        ConfigError: a value is illegal.
    """

    name: str
    num_nodes: int
    devices_per_node: int
    memory_bytes: float
    """Memory of one device."""
    bfloat16_flops_per_s: float | None
    """Published dense flops of one device; None where rates are measured, or the figure is not known."""
    float32_flops_per_s: float | None
    read_bytes_per_s: float
    """Published memory bandwidth of one device; measured if `rates` is given."""
    inside: Link
    """Link inside a node, efficiency not applied; measured if `rates` is given."""
    between: Link
    """Link between nodes, efficiency not applied; measured if `rates` is given."""
    assumptions: Assumptions = Assumptions()
    rates: KernelRates | None = None
    """Rates measured with `rates_dtype`, efficiencies included; None for published figures."""
    rates_dtype: str | None = None
    topology: Topology | None = None
    """Topology of the ranks that measured `rates`."""

    def __post_init__(self) -> None:
        check_count("nodes", self.num_nodes, MAX_DEVICES)
        check_count("devices_per_node", self.devices_per_node, MAX_DEVICES_PER_NODE)
        check_number("memory_bytes", self.memory_bytes)
        check_number("read_bytes_per_s", self.read_bytes_per_s)
        for name in ("bfloat16_flops_per_s", "float32_flops_per_s"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    def check_parallel(self, tensor_parallel_size: int) -> None:
        """Refuse a `tensor_parallel_size` that this cluster cannot be divided by.

        Raises:
            ConfigError: a rank would span nodes, or there would be too many ranks.
        """
        check_count("tensor_parallel_size", tensor_parallel_size, MAX_DEVICES_PER_NODE)
        if self.devices_per_node % tensor_parallel_size:
            raise ConfigError(
                f"tensor_parallel_size: got {tensor_parallel_size} with {self.devices_per_node} devices per node, "
                f"legal is a divisor of {self.devices_per_node}"
            )
        num_ranks = self.num_devices // tensor_parallel_size
        if num_ranks > MAX_RANKS:
            raise ConfigError(
                f"nodes: got {self.num_nodes} with {self.devices_per_node} devices per node and tensor_parallel_size "
                f"{tensor_parallel_size}, which is {num_ranks} ranks; legal is at most {MAX_RANKS} ranks"
            )

    def peak_flops_per_s(self, dtype: PlannedDType) -> float:
        """Peak rate of one device: published, or the measured rate of matrix products.

        Raises:
            ConfigError: the cluster has no rate for this dtype.
        """
        if self.rates is not None:
            if self.rates_dtype not in (None, dtype):
                raise ConfigError(
                    f"dtype: got {dtype!r}, legal with these measured rates is {self.rates_dtype}, in which they were "
                    "measured"
                )
            return self.rates.matmul_flops_per_s
        flops = self.bfloat16_flops_per_s if dtype == "bfloat16" else self.float32_flops_per_s
        if flops is None:
            raise ConfigError(f"dtype: got {dtype!r}, legal is one of which the cluster names {dtype}_flops_per_s")
        return flops

    def costs(self, num_devices: int, tensor_parallel_size: int, dtype: PlannedDType) -> Costs:
        """Costs of the first `num_devices` devices, for the cost model."""
        nodes = tuple(first // self.devices_per_node for first in range(0, num_devices, tensor_parallel_size))
        if self.rates is not None:
            self.peak_flops_per_s(dtype)
            assert self.topology is not None
            if nodes == self.topology.nodes:
                return Costs(self.topology, self.rates)
            return Costs(msgspec.structs.replace(self.topology, nodes=nodes, machines=None), self.rates)
        figures = Figures(self.peak_flops_per_s(dtype), self.read_bytes_per_s, self.inside, self.between)
        return published_costs(nodes, figures, self.assumptions)


def known_cluster(gpu: str, devices_per_node: int, num_nodes: int) -> Cluster:
    """A cluster of known GPUs.

    Raises:
        ConfigError: the GPU is not known, or a number is illegal.
    """
    device = GPUS.get(gpu.lower())
    if device is None:
        raise ConfigError(f"gpu: got {gpu!r}, legal is one of {', '.join(GPUS)}; others are described in a file")
    assumptions = Assumptions()
    return Cluster(
        name=device.name,
        num_nodes=num_nodes,
        devices_per_node=devices_per_node,
        memory_bytes=device.memory_bytes,
        bfloat16_flops_per_s=device.bfloat16_flops_per_s,
        float32_flops_per_s=device.float32_flops_per_s,
        read_bytes_per_s=device.read_bytes_per_s,
        inside=Link(assumptions.inside_latency_s, device.inside_bytes_per_s),
        between=Link(assumptions.between_latency_s, device.between_bytes_per_s),
        assumptions=assumptions,
    )
