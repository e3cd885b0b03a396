"""Cluster to plan with: published figures and assumptions, or measured rates.

Holds a user's description, its checks, and its conversion to costs. Must not know files, models or predictions.
Read next: `longspan.planner.gpus`, the known devices; `longspan.planner.cluster_file`; `longspan.costmodel.model_time`.

Note [Devices and ranks]
    A rank of context parallelism is `tensor_parallel_size` devices, neighbours of one node; each holds its part of the
    heads and weights. Rates and links are those of one device: a device sends the keys of its heads to the same part of
    other ranks over its own link. So a group of N devices is N / tensor_parallel_size ranks, each as fast as one
    device, of a model whose heads and weights are divided.
"""

import math

import msgspec

from longspan.config import MAX_RANKS
from longspan.costmodel.parameters import Costs, KernelRates, Link, Topology
from longspan.costmodel.shapes import PlannedDType
from longspan.errors import ConfigError
from longspan.planner.gpus import GPUS

MAX_DEVICES = 65536
MAX_DEVICES_PER_NODE = 1024

FULL_RATE_LEN = 128
"""Query tokens from which an attention kernel is assumed to reach its full rate."""

FEW_ROWS_SHARE = 1 / 16
"""Share of its full rate that an attention kernel is assumed to reach with one query token, whose heads fill so much of
a tile."""


def check_count(name: str, value: object, most: int) -> None:
    """Raise ConfigError unless a value is a whole number from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ConfigError(f"{name}: got {value!r}, legal is a whole number from 1 to {most}")


def check_number(name: str, value: object, *, most: float | None = None, zero: bool = False) -> None:
    """Raise ConfigError unless a value is a number above 0 (from 0, if `zero`) and up to `most`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and (value > 0 or (zero and value == 0)) and (most is None or value <= most):  # type: ignore[operator]
        return
    rule = "a number from 0" if zero else "a number above 0"
    raise ConfigError(f"{name}: got {value!r}, legal is {rule}" + (f" and up to {most:g}" if most is not None else ""))


class Assumptions(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers that no vendor publishes: shares of published figures that programs reach, and fixed times."""

    matmul_efficiency: float = 0.7
    """Share of the published flops that matrix products with weights reach."""
    attention_efficiency: float = 0.6
    """Share of the published flops that attention kernels with many queries reach."""
    read_efficiency: float = 0.8
    """Share of the memory's bandwidth that is reached."""
    link_efficiency: float = 0.8
    """Share of a link's bandwidth that is reached."""
    inside_latency_s: float = 10e-6
    """Latency of a message inside a node, unless the cluster has its own."""
    between_latency_s: float = 20e-6
    """Latency of a message between nodes, unless the cluster has its own."""
    call_s: float = 10e-6
    """Fixed time of an attention kernel call."""
    exchange_s: float = 5e-6
    """Fixed time of starting and ending a message."""
    layer_s: float = 50e-6
    """Fixed time of a layer outside attention."""
    step_s: float = 2e-3
    """Fixed time of a step outside its layers: scheduling, messages to the workers, sampling."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            is_share = name.endswith("_efficiency")
            check_number(f"assumptions.{name}", getattr(self, name), most=1.0 if is_share else None, zero=not is_share)


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
        a, peak = self.assumptions, self.peak_flops_per_s(dtype)
        read, attention = self.read_bytes_per_s * a.read_efficiency, peak * a.attention_efficiency

        def link(link: Link) -> Link:
            return Link(link.latency_s, link.bytes_per_s * a.link_efficiency)

        rates = KernelRates(
            matmul_flops_per_s=peak * a.matmul_efficiency,
            read_bytes_per_s=read,
            copy_bytes_per_s=read / 2,  # every byte written is read first
            attention_flops_per_s=((1, attention * FEW_ROWS_SHARE), (FULL_RATE_LEN, attention)),
            call_s=a.call_s,
            exchange_s=a.exchange_s,
            layer_s=a.layer_s,
        )
        return Costs(Topology(nodes, link(self.inside), link(self.between)), rates)


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
