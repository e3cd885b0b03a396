"""Costs from published figures of devices and links, and assumptions on what programs reach of them.

Holds the assumptions and the conversion. Must not know which devices there are, or files.
Read next: `longspan.costmodel.gpus`, the figures of known GPUs; `longspan.costmodel.parameters`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from longspan.costmodel.gpus import GPU, gpu_named
from longspan.costmodel.parameters import Costs, KernelRates, Link, Topology
from longspan.errors import ConfigError

FULL_RATE_LEN = 128
"""Query tokens from which an attention kernel is assumed to reach its full rate."""

FEW_ROWS_SHARE = 1 / 16
"""Share of its full rate that an attention kernel is assumed to reach with one query token, whose heads fill so much of
a tile."""


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


class Figures(NamedTuple):
    """Published figures of one device and its links, efficiencies not applied."""

    flops_per_s: float
    """Dense, in the dtype of the model."""
    read_bytes_per_s: float
    inside: Link
    between: Link


def published_costs(nodes: Sequence[int], figures: Figures, assumptions: Assumptions) -> Costs:
    """Costs of equal ranks by published figures.

    Args:
        nodes: node of every rank.
        figures: figures of one rank's device.
        assumptions: what programs reach of them.
    """
    a, peak = assumptions, figures.flops_per_s
    read, attention = figures.read_bytes_per_s * a.read_efficiency, peak * a.attention_efficiency

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
    return Costs(Topology(tuple(nodes), link(figures.inside), link(figures.between)), rates)


def known_costs(nodes: Sequence[int], names: Sequence[str], dtype: str) -> Costs | None:
    """Costs of ranks on GPUs of one known kind; None for several kinds, or one that is not known.

    Args:
        nodes: node of every rank.
        names: name of every rank's GPU, as CUDA reports it.
        dtype: dtype of computation.
    """
    found: set[GPU | None] = {gpu_named(name) for name in names}
    gpu = found.pop() if len(found) == 1 else None
    if gpu is None:
        return None
    assumptions = Assumptions()
    flops = gpu.float32_flops_per_s if dtype == "float32" else gpu.bfloat16_flops_per_s
    inside = Link(assumptions.inside_latency_s, gpu.inside_bytes_per_s)
    between = Link(assumptions.between_latency_s, gpu.between_bytes_per_s)
    return published_costs(nodes, Figures(flops, gpu.read_bytes_per_s, inside, between), assumptions)
