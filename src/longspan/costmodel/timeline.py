"""Clocks of the ranks of a step in one layer, which every phase of a strategy advances.

Holds the times of work and of messages, and what ranks share. Must not know strategies.
Read next: `longspan.costmodel.predict`, which runs strategies on these clocks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from longspan.costmodel.parameters import Costs

Seconds = dict[int, float]
"""Seconds by rank."""


@dataclass(frozen=True, slots=True)
class Message:
    """Message from one rank to another."""

    source: int
    target: int
    num_bytes: int


class Clocks:
    """Seconds since the layer began, by rank, and their parts for compute and copies; the rest is waits."""

    def __init__(self, ranks: Iterable[int], costs: Costs) -> None:
        self.ranks = sorted(ranks)
        self.costs = costs
        self.now: Seconds = dict.fromkeys(self.ranks, 0.0)
        self.compute_s: Seconds = dict.fromkeys(self.ranks, 0.0)
        self.copy_s: Seconds = dict.fromkeys(self.ranks, 0.0)
        self._machines = costs.topology.machines or costs.topology.nodes
        self._busy_s: Seconds = {}  # by machine: loads of all its ranks

    @property
    def end_s(self) -> float:
        """Seconds until the last rank is done."""
        end_s = max(self.now.values(), default=0.0)
        if self.costs.rates.ranks_per_device > 1:
            # What ranks of a machine do at different times still takes its devices' time.
            for machine, busy_s in self._busy_s.items():
                end_s = max(end_s, busy_s / self._machines.count(machine))
        return end_s

    # -- work --------------------------------------------------------------------------------------------------------

    def run(self, compute_s: Mapping[int, float], copy_s: Mapping[int, float], moved: Sequence[Message] = ()) -> None:
        """Advance every rank by its load, while the messages `moved` are on their way."""
        byte_s = self.costs.rates.moved_byte_s
        moved_s: Seconds = {}
        if byte_s:
            for m in moved:
                add(moved_s, m.source, m.num_bytes * byte_s)
                add(moved_s, m.target, m.num_bytes * byte_s)
        ranks = list({**compute_s, **copy_s, **moved_s})
        loads = [compute_s.get(r, 0.0) + copy_s.get(r, 0.0) + moved_s.get(r, 0.0) for r in ranks]
        for rank, load_s, time_s in zip(ranks, loads, self.together(ranks, loads), strict=True):
            if load_s:
                self.now[rank] += time_s
                self.compute_s[rank] += compute_s.get(rank, 0.0) * time_s / load_s
                self.copy_s[rank] += copy_s.get(rank, 0.0) * time_s / load_s

    def together(self, ranks: Sequence[int], loads_s: list[float]) -> list[float]:
        """Seconds that each rank takes for its load if all start together, devices shared."""
        sharing = self.costs.rates.ranks_per_device
        if sharing == 1:
            return loads_s
        nodes = self._machines
        even_s: Seconds = {}  # by machine, if its devices are busy to the end
        for rank, load_s in zip(ranks, loads_s, strict=True):
            add(even_s, nodes[rank], load_s / nodes.count(nodes[rank]))
            add(self._busy_s, nodes[rank], load_s)
        return [
            min(load_s, max(load_s / sharing, even_s[nodes[rank]])) for rank, load_s in zip(ranks, loads_s, strict=True)
        ]

    def longest(self, ranks: Sequence[int], loads_s: list[float]) -> float:
        """Seconds that the slowest rank takes for its load if all start together."""
        return max(self.together(ranks, loads_s))

    def wait(self, until: Mapping[int, float]) -> None:
        """Hold ranks back until their times in `until`."""
        for rank, time_s in until.items():
            self.now[rank] = max(self.now[rank], time_s)

    # -- messages ----------------------------------------------------------------------------------------------------

    def sending_s(self, messages: Sequence[Message]) -> Seconds:
        """Seconds in which each rank packs and sends its messages."""
        rates = self.costs.rates
        seconds: Seconds = {}
        for m in messages:
            add(seconds, m.source, rates.exchange_s + m.num_bytes / rates.copy_bytes_per_s)
        return seconds

    def receiving_s(self, messages: Sequence[Message]) -> Seconds:
        """Seconds in which each rank receives its messages."""
        seconds: Seconds = {}
        for m in messages:
            add(seconds, m.target, self.costs.rates.exchange_s)
        return seconds

    def queues_s(self, messages: Sequence[Message]) -> list[float]:
        """Seconds that each message's link is busy with all messages of the same sender or receiver."""
        topology, nodes = self.costs.topology, self.costs.topology.nodes
        sent: dict[tuple[int, bool], int] = {}
        received: dict[tuple[int, bool], int] = {}
        node_sent: dict[int, int] = {}
        for m in messages:
            inside = nodes[m.source] == nodes[m.target]
            sent[m.source, inside] = sent.get((m.source, inside), 0) + m.num_bytes
            received[m.target, inside] = received.get((m.target, inside), 0) + m.num_bytes
            if not inside:
                node_sent[nodes[m.source]] = node_sent.get(nodes[m.source], 0) + m.num_bytes
        queues_s: list[float] = []
        for m in messages:
            inside = nodes[m.source] == nodes[m.target]
            num_bytes = float(max(sent[m.source, inside], received[m.target, inside]))
            if inside:
                queues_s.append(num_bytes / topology.inside.bytes_per_s)
                continue
            if topology.ranks_per_link > 1:  # a rank that sends alone has the node's whole link
                even = node_sent[nodes[m.source]] / nodes.count(nodes[m.source])
                num_bytes = max(num_bytes / topology.ranks_per_link, min(num_bytes, even))
            queues_s.append(num_bytes / topology.between.bytes_per_s)
        return queues_s

    def arrivals(self, messages: Sequence[Message], ready_s: Mapping[int, float]) -> Seconds:
        """Times at which each rank has all its messages, which leave their senders at `ready_s`."""
        arrived: Seconds = {}
        for m, queue_s in zip(messages, self.queues_s(messages), strict=True):
            link = self.costs.topology.link(m.source, m.target)
            time_s = ready_s[m.source] + link.latency_of(m.num_bytes) + queue_s
            arrived[m.target] = max(arrived.get(m.target, 0.0), time_s)
        return arrived


def add(seconds: Seconds, rank: int, more_s: float) -> None:
    """Add `more_s` to the seconds of one rank."""
    seconds[rank] = seconds.get(rank, 0.0) + more_s
