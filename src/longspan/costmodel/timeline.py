"""Clocks of the ranks of a step in one layer, which every phase of a strategy advances.

Holds the times of work and of messages, and what ranks share, as arrays over ranks. Must not know strategies.
Read next: `longspan.costmodel.predict`, which runs strategies on these clocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longspan.costmodel.parameters import Costs, Link
from longspan.costmodel.work import Floats
from longspan.plan.step_keys import Counts


def latencies(link: Link, num_bytes: NDArray[Any]) -> Floats:
    """Latency of messages of some sizes, in seconds; `Link.latency_of` of each."""
    found = np.full(num_bytes.shape, link.latency_s, dtype=np.float64)
    if link.short_bytes is not None:
        found[num_bytes > link.short_bytes] = link.latency_s + link.long_latency_s
    return found


@dataclass(frozen=True, eq=False)
class Messages:
    """M messages, each from one rank to another, those of lower senders first."""

    source: Counts
    """[M] sender, as an index of the clocks' ranks."""
    target: Counts
    """[M] receiver."""
    num_bytes: Floats
    """[M] bytes."""
    num_ranks: int
    """P."""

    @classmethod
    def of(cls, num_rows: Counts, row_bytes: int) -> "Messages":
        """Messages of an exchange, from the rows [P, P] that rank i sends to rank j."""
        source, target = np.nonzero(num_rows)
        num_bytes: Floats = num_rows[source, target].astype(np.float64) * row_bytes
        return cls(source, target, num_bytes, len(num_rows))

    def per_source(self, values: Floats | None = None) -> Floats:
        """[P] sum of values [M], or the number of messages, by sender."""
        found: NDArray[Any] = np.bincount(self.source, values, self.num_ranks) * 1.0
        return found

    def per_target(self, values: Floats | None = None) -> Floats:
        """[P] sum of values [M], or the number of messages, by receiver."""
        found: NDArray[Any] = np.bincount(self.target, values, self.num_ranks) * 1.0
        return found


class Clocks:
    """Seconds since the layer began, [P] by rank, and their parts for compute and copies; the rest is waits."""

    def __init__(self, ranks: Sequence[int], costs: Costs) -> None:
        self.costs, self._ranks = costs, ranks
        self.now = np.zeros(len(ranks))
        self.compute_s = np.zeros(len(ranks))
        self.copy_s = np.zeros(len(ranks))
        self._has_one_node = costs.topology.num_nodes == 1
        self._is_shared = costs.rates.ranks_per_device > 1
        self.slowness = np.array([1 / costs.speed(rank) for rank in ranks])
        """[P] seconds that each rank takes for a second of work at `costs.rates`."""
        self._are_alike = costs.speeds is None and not self._is_shared
        self._machine_sizes = np.bincount(costs.topology.machines or costs.topology.nodes).astype(np.float64)
        self._busy_s = np.zeros(len(self._machine_sizes))  # by machine: loads of all its ranks

    @cached_property
    def _nodes(self) -> Counts:
        """[P] node of each rank."""
        nodes = self.costs.topology.nodes
        return np.array([nodes[rank] for rank in self._ranks], dtype=np.int64)

    @cached_property
    def _machines(self) -> Counts:
        """[P] machine of each rank."""
        machines = self.costs.topology.machines or self.costs.topology.nodes
        return np.array([machines[rank] for rank in self._ranks], dtype=np.int64)

    @property
    def end_s(self) -> float:
        """Seconds until the last rank is done."""
        end_s = float(self.now.max(initial=0.0))
        if self._is_shared:
            # What ranks of a machine do at different times still takes its devices' time.
            end_s = max(end_s, float((self._busy_s / self._machine_sizes).max(initial=0.0)))
        return end_s

    # -- work --------------------------------------------------------------------------------------------------------

    def run(self, compute_s: Floats | float, copy_s: Floats | float, moved: Messages | None = None) -> None:
        """Advance every rank by its load, while the messages `moved` are on their way."""
        byte_s = self.costs.rates.moved_byte_s
        load_s = compute_s + copy_s
        if byte_s and moved is not None:
            load_s = load_s + (moved.per_source(moved.num_bytes) + moved.per_target(moved.num_bytes)) * byte_s
        if self._are_alike:
            self.now += load_s
            self.compute_s += compute_s
            self.copy_s += copy_s
            return
        load_s = load_s + np.zeros_like(self.now)
        time_s = self.together(load_s)
        self.now += time_s
        stretched = np.divide(time_s, load_s, out=np.zeros_like(load_s), where=load_s > 0)
        self.compute_s += compute_s * stretched
        self.copy_s += copy_s * stretched

    def together(self, loads_s: Floats) -> Floats:
        """Seconds that each rank takes for its load if all start together, slow ranks longer, devices shared.

        Args:
            loads_s: [..., P] loads; rows are one after the other.
        """
        sharing = self.costs.rates.ranks_per_device
        if self.costs.speeds is not None:
            loads_s = loads_s * self.slowness
        if not self._is_shared:
            return loads_s
        members = self._machines[:, None] == np.arange(len(self._machine_sizes))
        per_machine = loads_s @ members  # [..., machines]
        self._busy_s += per_machine.reshape(-1, len(self._machine_sizes)).sum(axis=0)
        even_s = (per_machine / self._machine_sizes)[..., self._machines]  # if its devices are busy to the end
        found: Floats = np.minimum(loads_s, np.maximum(loads_s / sharing, even_s))
        return found

    def wait(self, until: Floats) -> None:
        """Hold ranks back until their times in `until`."""
        np.maximum(self.now, until, out=self.now)

    # -- messages ----------------------------------------------------------------------------------------------------

    def sending_s(self, messages: Messages) -> Floats:
        """Seconds in which each rank packs and sends its messages."""
        rates = self.costs.rates
        return messages.per_source(rates.exchange_s + messages.num_bytes / rates.copy_bytes_per_s)

    def receiving_s(self, messages: Messages) -> Floats:
        """Seconds in which each rank receives its messages."""
        return messages.per_target() * self.costs.rates.exchange_s

    def queues_s(self, messages: Messages) -> Floats:
        """Seconds that each message's link is busy with all messages of the same sender or receiver."""
        topology, source, target, num_bytes = self.costs.topology, messages.source, messages.target, messages.num_bytes
        if self._has_one_node:
            sent, received = messages.per_source(num_bytes), messages.per_target(num_bytes)
            inside_s: Floats = np.maximum(sent[source], received[target]) / topology.inside.bytes_per_s
            return inside_s
        inside = self._nodes[source] == self._nodes[target]
        near, far = np.where(inside, num_bytes, 0.0), np.where(inside, 0.0, num_bytes)
        longer = np.where(
            inside,
            np.maximum(messages.per_source(near)[source], messages.per_target(near)[target]),
            np.maximum(messages.per_source(far)[source], messages.per_target(far)[target]),
        )
        if topology.ranks_per_link > 1:  # a rank that sends alone has the node's whole link
            sizes = np.bincount(topology.nodes)
            even = (np.bincount(self._nodes[source], far, len(sizes)) / sizes)[self._nodes[source]]
            shared = np.maximum(longer / topology.ranks_per_link, np.minimum(longer, even))
            longer = np.where(inside, longer, shared)
        found: Floats = longer / np.where(inside, topology.inside.bytes_per_s, topology.between.bytes_per_s)
        return found

    def latencies_s(self, messages: Messages) -> Floats:
        """Seconds that each message takes beside its bytes over its link's bandwidth."""
        topology = self.costs.topology
        inside = latencies(topology.inside, messages.num_bytes)
        if self._has_one_node:
            return inside
        is_near = self._nodes[messages.source] == self._nodes[messages.target]
        found: Floats = np.where(is_near, inside, latencies(topology.between, messages.num_bytes))
        return found

    def alone_s(self, messages: Messages) -> Floats:
        """Seconds of each message's bytes on its link, if it waits for no other."""
        topology = self.costs.topology
        if self._has_one_node:
            inside_s: Floats = messages.num_bytes / topology.inside.bytes_per_s
            return inside_s
        is_near = self._nodes[messages.source] == self._nodes[messages.target]
        bandwidth = np.where(is_near, topology.inside.bytes_per_s, topology.between.bytes_per_s)
        found: Floats = messages.num_bytes / bandwidth
        return found

    def arrivals(self, messages: Messages, ready_s: Floats) -> Floats:
        """Times at which each rank has all its messages, which leave their senders at `ready_s`; 0 without messages."""
        return self.last(messages, ready_s[messages.source] + self.latencies_s(messages) + self.queues_s(messages))

    def last(self, messages: Messages, times_s: Floats) -> Floats:
        """[P] latest of the messages' times [M] by receiver; 0 for ranks without messages."""
        found = np.zeros_like(self.now)
        np.maximum.at(found, messages.target, times_s)
        return found
