"""Predicted time of one layer's attention under a strategy, until the last rank is done.

Holds one time model per strategy, pure functions of a plan's integers and of measured numbers. Must not know clocks of
this machine, or anything that ranks could see differently. `longspan.cp` has the strategies themselves.
Read next: `longspan.costmodel.choose`, which takes the strategy with the least time; `longspan.costmodel.timeline`,
`longspan.costmodel.ring_time`, `longspan.costmodel.work`.

Note [Time of a layer]
    Ranks start together. A rank packs its messages, computes on its own keys, and goes on when messages have arrived.
    Messages of one rank over one link leave one after the other, and arrive one after the other: the last one takes
    `latency + bytes of the longer queue / bandwidth`. Messages move while ranks compute, so they cost time only where a
    rank waits for them, and where moving them takes from the rank's own compute (`moved_byte_s`).

    Two ranks, each with 10 ms of kernels on its own keys and 10 ms on the other's, messages of 4 ms:

        gather_kv   max(10, 4) + 10 = 20 ms        with messages of 14 ms:   max(10, 14) + 10 = 24 ms
        pass_q      max(10, 4) + 10 + 4 (partials, for which nothing is left to do meanwhile) = 24 ms
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longspan.costmodel.parameters import Costs
from longspan.costmodel.ring_time import RingTime
from longspan.costmodel.timeline import Clocks, Message, Seconds, add
from longspan.costmodel.work import StepWork, count_work
from longspan.kv.layout import KVGroup
from longspan.plan.message_format import row_bytes
from longspan.plan.types import DirectExchange, GroupStep, RingExchange
from longspan.sharding.pages import PageTable
from longspan.types import Strategy


@dataclass(frozen=True, slots=True)
class Prediction:
    """Time of one layer's attention, and its parts on the last rank to finish."""

    strategy: Strategy
    total_s: float
    compute_s: float
    """Time in attention kernels."""
    copy_s: float
    """Time of packing and starting messages, and of merging partials."""

    @property
    def wait_s(self) -> float:
        """Time of waiting for messages."""
        return max(0.0, self.total_s - self.compute_s - self.copy_s)


def predict_attention(
    step: GroupStep,
    tables: Mapping[int, PageTable],
    group: KVGroup,
    costs: Costs,
    work: StepWork | None = None,
) -> Prediction:
    """Predict the attention of one layer of a KV group.

    Args:
        step: the group's step, as it would stand in the plan.
        tables: page table per request of this group.
        group: the KV group, whose widths give bytes and flops.
        costs: topology and rates of the cluster.
        work: result of `count_work` for the step's segments; None counts them.
    """
    if work is None:
        work = count_work(step.segments, tables, group, costs.rates)
    layer = _Layer(step, group, costs, work)
    layer.run()
    clocks = layer.clocks
    if not clocks.ranks:
        return Prediction(step.strategy, 0.0, 0.0, 0.0)
    last = max(clocks.ranks, key=lambda rank: clocks.now[rank])
    return Prediction(step.strategy, clocks.end_s, clocks.compute_s[last], clocks.copy_s[last])


class _Layer:
    """Time model of one layer under the step's strategy."""

    def __init__(self, step: GroupStep, group: KVGroup, costs: Costs, work: StepWork) -> None:
        self._step, self._group, self._costs, self._work = step, group, costs, work
        self._rates = costs.rates
        ranks = {rank for pair in work.pairs for rank in pair}
        for exchange in step.exchanges:
            ranks.update(exchange.participants)
        self.clocks = Clocks(ranks, costs)
        self._row_bytes = group.merged_row_bytes

    def run(self) -> None:
        """Advance the clocks to the end of the layer."""
        if not self._step.exchanges:
            self._local(())
            return
        {
            Strategy.GATHER_KV: self._gather_kv,
            Strategy.PASS_KV: self._pass_kv,
            Strategy.PASS_Q: self._pass_q,
            Strategy.TREE: self._tree,
        }[self._step.strategy]()

    # -- strategies --------------------------------------------------------------------------------------------------

    def _local(self, moved: Sequence[Message]) -> None:
        """Time `longspan.cp.local`, while the messages `moved` are on their way."""
        own_s = {rank: self._work.pair_s(rank, rank, self._rates) for rank in self.clocks.ranks}
        self.clocks.run(own_s, {}, moved)

    def _gather_kv(self) -> None:
        """Time `longspan.cp.gather_kv`: pack, exchange during the local part, then attend to the keys received."""
        clocks, messages = self.clocks, self._messages(0)
        clocks.run({}, clocks.sending_s(messages))
        arrived = clocks.arrivals(messages, clocks.now)
        self._local(messages)
        clocks.wait(arrived)
        compute_s: Seconds = {}
        copy_s = clocks.receiving_s(messages)
        for m in messages:
            add(compute_s, m.target, self._work.pair_s(m.target, m.source, self._rates))
            add(copy_s, m.target, self._merge_s(self._work.num_rows(m.target, m.source) * self._row_bytes))
        clocks.run(compute_s, copy_s)

    def _pass_kv(self) -> None:
        """Time `longspan.cp.pass_kv`."""
        (ring,) = self._step.exchanges
        assert isinstance(ring, RingExchange)
        outside = [rank for rank in self.clocks.ranks if rank not in ring.participants]
        self.clocks.run({rank: self._work.pair_s(rank, rank, self._rates) for rank in outside}, {})
        token_bytes, row_bytes = self._group.spec.layout.token_bytes, self._row_bytes
        RingTime(ring, self.clocks, self._costs, self._work, token_bytes=token_bytes, row_bytes=row_bytes).run()

    def _pass_q(self) -> None:
        """Time `longspan.cp.pass_q`: send queries, local part, partials for all peers, receive and merge partials."""
        clocks = self.clocks
        queries, partials = self._messages(0), self._messages(1)
        clocks.run({}, clocks.sending_s(queries))
        arrived = clocks.arrivals(queries, clocks.now)
        self._local(queries)
        clocks.wait(arrived)
        clocks.run({}, clocks.receiving_s(queries))
        self._take_home(partials, self._serve(partials))

    def _tree(self) -> None:
        """Time `tree` in `longspan.cp.pass_q`, where leaders of other nodes relay queries and merge partials."""
        clocks = self.clocks
        queries, relayed, partials, merged = (self._messages(i) for i in range(4))
        clocks.run({}, clocks.sending_s(queries))
        arrived = clocks.arrivals(queries, clocks.now)
        self._local(queries)
        clocks.wait(arrived)
        clocks.run({}, clocks.receiving_s(queries))
        clocks.run({}, clocks.sending_s(relayed))
        clocks.wait(clocks.arrivals(relayed, dict(clocks.now)))
        clocks.run({}, clocks.receiving_s(relayed))
        self._take_home(partials, self._serve(partials))
        clocks.run({}, clocks.sending_s(merged))
        self._take_home(merged, dict(clocks.now))

    # -- phases ------------------------------------------------------------------------------------------------------

    def _serve(self, partials: Sequence[Message]) -> Seconds:
        """Compute partials for other ranks; return the time at which each rank's first one leaves."""
        clocks = self.clocks
        compute_s: Seconds = {}
        num_served: dict[int, int] = {}
        for query_rank, key_rank in self._work.pairs:
            if query_rank != key_rank:
                add(compute_s, key_rank, self._work.pair_s(query_rank, key_rank, self._rates))
        for m in partials:
            num_served[m.source] = num_served.get(m.source, 0) + 1
        began = dict(clocks.now)
        clocks.run(compute_s, clocks.sending_s(partials))
        return {rank: began[rank] + (clocks.now[rank] - began[rank]) / count for rank, count in num_served.items()}

    def _take_home(self, partials: Sequence[Message], first_s: Mapping[int, float]) -> None:
        """Wait for partials, of which each sender's first one leaves at `first_s`, and merge them."""
        clocks, topology = self.clocks, self._costs.topology
        arrived: Seconds = {}
        for m, queue_s in zip(partials, clocks.queues_s(partials), strict=True):
            link = topology.link(m.source, m.target)
            last_s = clocks.now[m.source] + min(
                queue_s, m.num_bytes / link.bytes_per_s
            )  # the message computed last waits for no other
            time_s = link.latency_of(m.num_bytes) + max(last_s, first_s[m.source] + queue_s)
            arrived[m.target] = max(arrived.get(m.target, 0.0), time_s)
        clocks.wait(arrived)
        merge_s = clocks.receiving_s(partials)
        for m in partials:
            add(merge_s, m.target, self._merge_s(m.num_bytes))
        clocks.run({}, merge_s, partials)

    def _merge_s(self, num_bytes: float) -> float:
        return self._rates.merge_s + num_bytes / self._rates.copy_bytes_per_s

    def _messages(self, index: int) -> list[Message]:
        """Messages of one exchange of the step."""
        exchange = self._step.exchanges[index]
        assert isinstance(exchange, DirectExchange)
        ranks, num_bytes = exchange.participants, row_bytes(exchange.operand, self._group)
        return [
            Message(source, target, num_rows * num_bytes)
            for source, row in zip(ranks, exchange.num_rows, strict=True)
            if any(row)
            for target, num_rows in zip(ranks, row, strict=True)
            if num_rows
        ]
