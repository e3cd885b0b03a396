"""Cost parameters of a cluster: links between ranks, and the speed of one rank's kernels.

Holds frozen data that the cost model reads. Must not know how the numbers were found (measured, read from a file, or
published), or their use in predictions.
Read next: `longspan.costmodel.predict`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from longspan.errors import ConfigError


class Link(msgspec.Struct, frozen=True):
    """Cost of moving bytes from one rank to another: `latency_s + bytes / bytes_per_s` for a lone message."""

    latency_s: float
    """Time from the start of a send to the end of its receive, for a message of few bytes."""
    bytes_per_s: float
    """Bandwidth of one rank's long messages in one direction, while its peers send too."""
    short_bytes: int | None = None
    """Most bytes of a message with `latency_s` only; longer ones take another way (another protocol, other threads).
    None: there is one way for all."""
    long_latency_s: float = 0.0
    """Time that a message of more than `short_bytes` takes in addition to `latency_s`."""

    def __post_init__(self) -> None:
        if not 0 <= self.latency_s < math.inf:
            raise ConfigError(f"latency_s: got {self.latency_s!r}, legal is a number from 0 (seconds)")
        if not self.bytes_per_s > 0:
            raise ConfigError(f"bytes_per_s: got {self.bytes_per_s!r}, legal is a number above 0")
        if self.short_bytes is not None and not self.short_bytes >= 0:
            raise ConfigError(f"short_bytes: got {self.short_bytes!r}, legal is None or a number from 0")
        if not 0 <= self.long_latency_s < math.inf:
            raise ConfigError(f"long_latency_s: got {self.long_latency_s!r}, legal is a number from 0 (seconds)")

    def latency_of(self, num_bytes: float) -> float:
        """Seconds that a message takes beside `num_bytes / bytes_per_s`."""
        is_long = self.short_bytes is not None and num_bytes > self.short_bytes
        return self.latency_s + self.long_latency_s if is_long else self.latency_s

    def message_s(self, num_bytes: float) -> float:
        """Seconds of one message."""
        return self.latency_of(num_bytes) + num_bytes / self.bytes_per_s


NO_LINK = Link(0.0, 1e30)
"""Link without a peer: between nodes where there is one node, inside a node of one rank."""


class Topology(msgspec.Struct, frozen=True):
    """Nodes of the ranks, and the links inside a node and between nodes."""

    nodes: tuple[int, ...]
    """Node of each rank, counted from 0."""
    inside: Link
    """Link inside a node."""
    between: Link
    """Link between nodes; unused where there is one node."""
    ranks_per_link: float = 1.0
    """Ranks of a node that share its link to other nodes: a rank that sends alone is faster by this factor."""
    machines: tuple[int, ...] | None = None
    """Machine of each rank, whose devices it shares, where nodes are simulated; None: a machine is a node."""

    def __post_init__(self) -> None:
        if sorted(set(self.nodes)) != list(range(max(self.nodes, default=-1) + 1)):
            raise ConfigError(f"nodes: got {self.nodes!r}, legal is one node per rank, counted from 0 without gaps")
        if self.machines is not None and len(self.machines) != len(self.nodes):
            raise ConfigError(f"machines: got {self.machines!r}, legal is None or one machine per rank")
        if not 1 <= self.ranks_per_link < math.inf:
            raise ConfigError(f"ranks_per_link: got {self.ranks_per_link!r}, legal is a number from 1")

    @property
    def num_ranks(self) -> int:
        return len(self.nodes)

    @property
    def num_nodes(self) -> int:
        return len(set(self.nodes))

    @property
    def ranks_per_node(self) -> tuple[int, ...]:
        """Number of ranks of each node."""
        counts = Counter(self.nodes)
        return tuple(counts[node] for node in range(len(counts)))

    def link(self, a: int, b: int) -> Link:
        """Link between ranks `a` and `b`."""
        return self.inside if self.nodes[a] == self.nodes[b] else self.between


class KernelRates(msgspec.Struct, frozen=True):
    """Speed of one rank while all ranks of its node compute."""

    matmul_flops_per_s: float
    """Rate of large matrix products with weights."""
    read_bytes_per_s: float
    """Rate of reading weights and KV in kernels that memory bandwidth bounds."""
    copy_bytes_per_s: float
    """Rate of packing and merging rows, in bytes written."""
    attention_flops_per_s: tuple[tuple[int, float], ...]
    """Pairs (query tokens of one kernel call, flops per second against many keys), ascending in tokens; 4 flops per
    query head, key and head element. Rates are interpolated between entries, and constant beyond the ends."""
    call_s: float
    """Fixed time of one attention kernel call."""
    exchange_s: float = 0.0
    """Fixed time that a rank itself spends on starting and ending one message, beside the link's latency."""
    layer_s: float = 0.0
    """Fixed time of one layer outside attention (Python, launches)."""
    token_s: float | None = None
    """Time of one token in one layer outside attention and matrix products (norms, activations) where a step has many
    tokens; None where it was not measured."""
    merge_s: float = 0.0
    """Fixed time of merging one partial, beside the copy of its rows."""
    moved_byte_s: float = 0.0
    """Time that a byte sent or received takes from the rank's own compute; 0 where other hardware moves it."""
    ranks_per_device: float = 1.0
    """Ranks that share one device's compute: a rank that computes alone is faster than these rates by this factor."""

    def __post_init__(self) -> None:
        for name in ("matmul_flops_per_s", "read_bytes_per_s", "copy_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, legal is a number above 0")
        for name in ("call_s", "exchange_s", "layer_s", "merge_s", "moved_byte_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, legal is a number from 0 (seconds)")
        if self.token_s is not None and not 0 <= self.token_s < math.inf:
            raise ConfigError(f"token_s: got {self.token_s!r}, legal is a number from 0 (seconds) or none")
        if not 1 <= self.ranks_per_device < math.inf:
            raise ConfigError(f"ranks_per_device: got {self.ranks_per_device!r}, legal is a number from 1")
        tokens = [num_tokens for num_tokens, _ in self.attention_flops_per_s]
        if not tokens or tokens[0] < 1 or any(a >= b for a, b in pairwise(tokens)):
            raise ConfigError(
                f"attention_flops_per_s: got rates at {tokens} query tokens, legal is 1 or more, ascending"
            )
        if not all(rate > 0 for _, rate in self.attention_flops_per_s):
            raise ConfigError("attention_flops_per_s: got a rate that is not above 0, legal are numbers above 0")

    def attention_rate(self, num_queries: int) -> float:
        """Flops per second of a kernel call with `num_queries` query tokens."""
        before: tuple[int, float] | None = None
        for point in self.attention_flops_per_s:
            if num_queries <= point[0]:
                if before is None:
                    return point[1]
                return before[1] + (point[1] - before[1]) * (num_queries - before[0]) / (point[0] - before[0])
            before = point
        assert before is not None
        return before[1]


class Costs(msgspec.Struct, frozen=True):
    """Everything that the cost model knows of a cluster."""

    topology: Topology
    rates: KernelRates
    speeds: tuple[float, ...] | None = None
    """Speed of each rank relative to `rates`, in all that it does itself; None where all are equally fast."""

    def __post_init__(self) -> None:
        if self.speeds is None:
            return
        if len(self.speeds) != self.topology.num_ranks or not all(0 < speed < math.inf for speed in self.speeds):
            raise ConfigError(f"speeds: got {self.speeds!r}, legal is none or one number above 0 per rank")

    @property
    def are_measured(self) -> bool:
        """Whether predicted times are seconds, not bytes as those of `costs_by_bytes`."""
        return self.rates.read_bytes_per_s < math.inf

    def speed(self, rank: int) -> float:
        """Speed of a rank relative to `rates`."""
        return 1.0 if self.speeds is None else self.speeds[rank]


def costs_by_bytes(nodes: Sequence[int]) -> Costs:
    """Costs assumed where nothing was measured: a byte on a link takes one second, everything else no time.

    Predicted times are then bytes: for each exchange, the most that one rank sends or receives.

    Args:
        nodes: node of each rank.
    """
    free = KernelRates(math.inf, math.inf, math.inf, ((1, math.inf),), 0.0)
    link = Link(0.0, 1.0)
    return Costs(Topology(tuple(nodes), link, link), free)
