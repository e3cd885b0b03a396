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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longspan.costmodel.parameters import Costs
from longspan.costmodel.ring_time import RingTime
from longspan.costmodel.timeline import Clocks, Messages
from longspan.costmodel.work import Floats, StepWork
from longspan.kv.layout import KVGroup
from longspan.plan.exchanges import DirectExchange, Exchange, RingExchange
from longspan.plan.message_format import row_bytes
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
    strategy: Strategy, exchanges: Sequence[Exchange], work: StepWork, group: KVGroup, costs: Costs
) -> Prediction:
    """Predict the attention of one layer of a KV group.

    Args:
        strategy: the movement strategy.
        exchanges: what it moves (`longspan.plan.exchanges.count_exchanges`).
        work: kernel calls of the step (`longspan.costmodel.work.count_work`).
        group: the KV group, whose widths give bytes and flops.
        costs: topology and rates of the cluster.
    """
    layer = _Layer(strategy, exchanges, work, group, costs)
    layer.run()
    clocks = layer.clocks
    if not len(clocks.now):
        return Prediction(strategy, 0.0, 0.0, 0.0)
    last = int(np.argmax(clocks.now))
    return Prediction(strategy, clocks.end_s, float(clocks.compute_s[last]), float(clocks.copy_s[last]))


class _Layer:
    """Time model of one layer under a strategy."""

    def __init__(
        self, strategy: Strategy, exchanges: Sequence[Exchange], work: StepWork, group: KVGroup, costs: Costs
    ) -> None:
        self._strategy, self._exchanges, self._group, self._costs, self._work = strategy, exchanges, group, costs, work
        self._rates = costs.rates
        self.clocks = Clocks(work.keys.ranks, costs)
        self._pair_s = work.pair_s(costs.rates)
        self._own_s = self._pair_s.diagonal()
        self._row_bytes = group.merged_row_bytes

    def run(self) -> None:
        """Advance the clocks to the end of the layer."""
        if not self._exchanges:
            self._local(None)
            return
        {
            Strategy.GATHER_KV: self._gather_kv,
            Strategy.PASS_KV: self._pass_kv,
            Strategy.PASS_Q: self._pass_q,
            Strategy.TREE: self._tree,
        }[self._strategy]()

    # -- strategies --------------------------------------------------------------------------------------------------

    def _local(self, moved: Messages | None) -> None:
        """Time `longspan.cp.local`, while the messages `moved` are on their way."""
        self.clocks.run(self._own_s, 0.0, moved)

    def _gather_kv(self) -> None:
        """Time `longspan.cp.gather_kv`: pack, exchange during the local part, then attend to the keys received."""
        clocks, messages = self.clocks, self._messages(0)
        clocks.run(0.0, clocks.sending_s(messages))
        arrived = clocks.arrivals(messages, clocks.now)
        self._local(messages)
        clocks.wait(arrived)
        source, target = messages.source, messages.target
        compute_s = messages.per_target(self._pair_s[target, source])
        merged_s = self._merge_s(self._work.num_rows[target, source].astype(np.float64) * self._row_bytes)
        clocks.run(compute_s, clocks.receiving_s(messages) + messages.per_target(merged_s))

    def _pass_kv(self) -> None:
        """Time `longspan.cp.pass_kv`."""
        (ring,) = self._exchanges
        assert isinstance(ring, RingExchange)
        members = np.searchsorted(self._work.keys.ranks, ring.participants)
        outside = self._own_s.copy()
        outside[members] = 0.0
        self.clocks.run(outside, 0.0)
        token_bytes, row_bytes = self._group.spec.layout.token_bytes, self._row_bytes
        RingTime(
            ring, members, self.clocks, self._costs, self._work, token_bytes=token_bytes, row_bytes=row_bytes
        ).run()

    def _pass_q(self) -> None:
        """Time `longspan.cp.pass_q`: send queries, local part, partials for all peers, receive and merge partials."""
        clocks = self.clocks
        queries, partials = self._messages(0), self._messages(1)
        clocks.run(0.0, clocks.sending_s(queries))
        arrived = clocks.arrivals(queries, clocks.now)
        self._local(queries)
        clocks.wait(arrived)
        clocks.run(0.0, clocks.receiving_s(queries))
        self._take_home(partials, self._serve(partials))

    def _tree(self) -> None:
        """Time `tree` in `longspan.cp.pass_q`, where leaders of other nodes relay queries and merge partials."""
        clocks = self.clocks
        queries, relayed, partials, merged = (self._messages(i) for i in range(4))
        clocks.run(0.0, clocks.sending_s(queries))
        arrived = clocks.arrivals(queries, clocks.now)
        self._local(queries)
        clocks.wait(arrived)
        clocks.run(0.0, clocks.receiving_s(queries))
        clocks.run(0.0, clocks.sending_s(relayed))
        clocks.wait(clocks.arrivals(relayed, clocks.now.copy()))
        clocks.run(0.0, clocks.receiving_s(relayed))
        self._take_home(partials, self._serve(partials))
        clocks.run(0.0, clocks.sending_s(merged))
        self._take_home(merged, clocks.now.copy())

    # -- phases ------------------------------------------------------------------------------------------------------

    def _serve(self, partials: Messages) -> Floats:
        """Compute partials for other ranks; return the time at which each rank's first one leaves."""
        clocks = self.clocks
        compute_s = self._pair_s.sum(axis=0) - self._own_s
        began = clocks.now.copy()
        clocks.run(compute_s, clocks.sending_s(partials))
        first: Floats = began + (clocks.now - began) / np.maximum(partials.per_source(), 1.0)
        return first

    def _take_home(self, partials: Messages, first_s: Floats) -> None:
        """Wait for partials, of which each sender's first one leaves at `first_s`, and merge them."""
        clocks, source = self.clocks, partials.source
        queue_s = clocks.queues_s(partials)
        # The message computed last waits for no other.
        last_s = clocks.now[source] + np.minimum(queue_s, clocks.alone_s(partials))
        times_s = clocks.latencies_s(partials) + np.maximum(last_s, first_s[source] + queue_s)
        clocks.wait(clocks.last(partials, times_s))
        merge_s = clocks.receiving_s(partials) + partials.per_target(self._merge_s(partials.num_bytes))
        clocks.run(0.0, merge_s, partials)

    def _merge_s(self, num_bytes: Floats) -> Floats:
        found: Floats = self._rates.merge_s + num_bytes / self._rates.copy_bytes_per_s
        return found

    def _messages(self, index: int) -> Messages:
        """Messages of one exchange of the step."""
        exchange = self._exchanges[index]
        assert isinstance(exchange, DirectExchange)
        return Messages.of(exchange.num_rows, row_bytes(exchange.operand, self._group))
