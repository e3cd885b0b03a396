"""How long the attention of one layer will take under a strategy, until the last rank is done.

Holds one model per strategy, pure functions of a plan's integers and of measured numbers. Must not know clocks, or
anything that ranks could see differently. What the strategies really do is in `longspan.cp`.
Read next: `longspan.policy.choose`, which takes the strategy with the least time; `longspan.policy.rates`.

Note: how time is reckoned
    Ranks start together. A rank packs what it sends, computes what it has, and goes on when messages have arrived.
    Messages of one rank over one link go out one after the other, and come in one after the other; what lies on the way
    of a message is `latency + the longer queue / bandwidth`. Messages move while ranks compute, so they cost time only
    where a rank waits for them, and where moving them takes from the rank's own compute (`moved_byte_s`).

    Two ranks, 10 ms of kernels each against own keys and 10 ms against the other's, messages of 4 ms:

        gather_kv   max(10, 4) + 10 = 20 ms        with messages of 14 ms:   max(10, 14) + 10 = 24 ms
        pass_q      max(10, 4) + 10 + 4 (partials, for which nothing is left to do meanwhile) = 24 ms
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from longspan.plan.types import DirectExchange, GroupStep, RingExchange
from longspan.policy.rates import Costs, Link
from longspan.policy.work import StepWork, count_work
from longspan.sharding.pages import PageTable
from longspan.types import KVGroup, Strategy


@dataclass(frozen=True, slots=True)
class Prediction:
    """Time of one layer's attention, and what the last rank to finish spends it on."""

    strategy: Strategy
    total_s: float
    compute_s: float
    """In attention kernels."""
    copy_s: float
    """Packing messages, starting them, and merging partials."""

    @property
    def wait_s(self) -> float:
        """Waiting for messages."""
        return max(0.0, self.total_s - self.compute_s - self.copy_s)


def attention_time(step: GroupStep, tables: Mapping[int, PageTable], group: KVGroup, costs: Costs) -> float:
    """Seconds of one layer of a KV group until the last rank is done. Arguments as in `predict_attention`."""
    return predict_attention(step, tables, group, costs).total_s


def predict_attention(
    step: GroupStep,
    tables: Mapping[int, PageTable],
    group: KVGroup,
    costs: Costs,
    work: StepWork | None = None,
) -> Prediction:
    """Predict one layer of a KV group.

    Args:
        step: strategy, segments and exchanges, as they would stand in the plan.
        tables: page table per request of this group.
        group: for the widths of rows.
        costs: what the cluster can do.
        work: what `count_work` says of the segments, if it has been asked already.
    """
    if work is None:
        work = count_work(step.segments, tables, group, costs.rates)
    model = _Step(step, group, costs, work)
    if step.strategy is Strategy.LOCAL or not step.exchanges:
        model.local()
    elif step.strategy is Strategy.GATHER_KV:
        model.gather_kv()
    elif step.strategy is Strategy.PASS_KV:
        model.pass_kv()
    elif step.strategy is Strategy.PASS_Q:
        model.pass_q()
    else:
        assert step.strategy is Strategy.TREE, step.strategy
        model.tree()
    return model.prediction()


def message_bytes(operand: str, num_rows: int, group: KVGroup) -> int:
    """Bytes of one message."""
    spec, heads = group.spec, group.num_query_heads
    if operand == "kv":
        return num_rows * spec.token_bytes
    if operand == "query":
        return num_rows * heads * spec.k_width * spec.itemsize_bytes
    assert operand == "partial", operand
    out_bytes = num_rows * heads * spec.v_width * group.partial_itemsize_bytes
    lse_bytes = num_rows * heads * max(4, group.partial_itemsize_bytes)  # float32, beside float64 also float64
    return out_bytes + lse_bytes


@dataclass(frozen=True, slots=True)
class _Message:
    source: int
    target: int
    num_bytes: int


Seconds = dict[int, float]
"""Per rank."""


class _Step:
    """The ranks of one step on their way through one layer. Each has a clock, which every phase moves on."""

    def __init__(self, step: GroupStep, group: KVGroup, costs: Costs, work: StepWork) -> None:
        self._step, self._group, self._rates, self._topology = step, group, costs.rates, costs.topology
        self._pairs = work.pairs
        ranks = {rank for pair in work.pairs for rank in pair}
        for exchange in step.exchanges:
            ranks.update(exchange.participants)
        self._ranks = sorted(ranks)
        self._now: Seconds = dict.fromkeys(self._ranks, 0.0)
        self._compute_s: Seconds = dict.fromkeys(self._ranks, 0.0)
        self._copy_s: Seconds = dict.fromkeys(self._ranks, 0.0)
        self._machines = costs.topology.machines or costs.topology.nodes
        self._busy_s: Seconds = {}  # per machine, of all its ranks
        self._row_bytes = group.num_query_heads * group.spec.v_width * max(4, group.spec.itemsize_bytes)

    def prediction(self) -> Prediction:
        """What the last rank has come to."""
        if not self._ranks:
            return Prediction(self._step.strategy, 0.0, 0.0, 0.0)
        last = max(self._ranks, key=lambda rank: self._now[rank])
        total_s, compute_s, copy_s = self._now[last], self._compute_s[last], self._copy_s[last]
        if (
            self._rates.ranks_per_device > 1
        ):  # what ranks of a machine do at different times still takes its devices' time
            for machine, busy_s in self._busy_s.items():
                total_s = max(total_s, busy_s / self._machines.count(machine))
        return Prediction(self._step.strategy, total_s, compute_s, copy_s)

    # -- strategies --------------------------------------------------------------------------------------------------

    def local(self) -> None:
        """`longspan.cp.local`."""
        self._run({rank: self._pair_s(rank, rank) for rank in self._ranks}, {})

    def gather_kv(self) -> None:
        """`longspan.cp.gather_kv`: pack, exchange beside the local part, then all that came."""
        messages = self._messages(0)
        self._run({}, self._sending_s(messages))
        arrived = self._arrivals(messages, self._now)
        self._run({rank: self._pair_s(rank, rank) for rank in self._ranks}, {}, messages)
        self._wait(arrived)
        compute_s: Seconds = {}
        copy_s: Seconds = {}
        for m in messages:
            _add(compute_s, m.target, self._pair_s(m.target, m.source))
            _add(copy_s, m.target, self._merge_s(self._num_rows(m.target, m.source)))
        self._run(compute_s, copy_s)

    def pass_q(self) -> None:
        """`longspan.cp.pass_q`: queries leave, local part, a partial for every peer, their partials, merge."""
        queries, partials = self._messages(0), self._messages(1)
        self._run({}, self._sending_s(queries))
        arrived = self._arrivals(queries, self._now)
        self._run({rank: self._pair_s(rank, rank) for rank in self._ranks}, {}, queries)
        self._wait(arrived)
        self._take_home(partials, self._serve(queries, partials))

    def tree(self) -> None:
        """`longspan.cp.tree`: as `pass_q` inside the node; other nodes' leaders relay queries and merge partials."""
        queries, relayed, partials, merged = (self._messages(i) for i in range(4))
        self._run({}, self._sending_s(queries))
        arrived = self._arrivals(queries, self._now)
        # A leader forwards before anything else: its peers have nothing to do but their local part until then.
        forwarded_s = {m.source: max(self._now[m.source], arrived.get(m.source, 0.0)) for m in relayed}
        for rank, time_s in self._arrivals(relayed, {**self._now, **forwarded_s}).items():
            arrived[rank] = max(arrived.get(rank, 0.0), time_s)
        self._run({rank: self._pair_s(rank, rank) for rank in self._ranks}, self._sending_s(relayed), queries + relayed)
        self._wait(arrived)
        self._take_home(partials, self._serve(queries + relayed, partials))
        self._run({}, self._sending_s(merged))
        self._take_home(merged, dict(self._now))

    def pass_kv(self) -> None:
        """`longspan.cp.pass_kv`: hop by hop in step, as nobody gets on before its predecessor has.

        Rounds of equal blocks take equal time, so each kind of round is reckoned twice at most: after another kind, and
        after its own.
        """
        (ring,) = self._step.exchanges
        assert isinstance(ring, RingExchange)
        members, rates = ring.participants, self._rates
        num_rounds = -(-max(ring.num_rows) // ring.block_len)
        row_s = {pair: self._ring_row_s(ring, *pair) for pair in self._pairs}
        before_s = [self._pair_s(rank, rank) for rank in members]  # what is computed beside the next hop
        self._run({r: self._pair_s(r, r) for r in self._ranks if r not in members}, {})
        total_s = 0.0
        round_s: dict[tuple[tuple[int, ...], bool], float] = {}
        last_blocks: tuple[int, ...] | None = None
        for index in range(num_rounds):
            blocks = tuple(max(0, min(ring.block_len, rows - index * ring.block_len)) for rows in ring.num_rows)
            kind = (blocks, blocks == last_blocks)
            if kind not in round_s:
                round_s[kind], before_s = self._round_s(ring, blocks, row_s, before_s)
            total_s += round_s[kind]
            last_blocks = blocks
        total_s += self._longest(members, before_s)
        for i, rank in enumerate(members):
            self._now[rank] = total_s
            compute_s = self._pair_s(rank, rank)
            copy_s = ring.num_rows[i] * self._group.spec.token_bytes / rates.copy_bytes_per_s
            for origin, rows in zip(members, ring.num_rows, strict=True):
                if origin != rank and (pair := self._pairs.get((rank, origin))):
                    num_calls, num_rows = pair.in_blocks(ring.block_len)
                    compute_s += pair.kernel_s + num_calls * rates.call_s
                    copy_s += num_rows * self._row_bytes / rates.copy_bytes_per_s
                    copy_s += -(-rows // ring.block_len) * rates.merge_s
            self._compute_s[rank], self._copy_s[rank] = compute_s, copy_s

    def _round_s(
        self,
        ring: RingExchange,
        blocks: tuple[int, ...],
        row_s: Mapping[tuple[int, int], float],
        before_s: list[float],
    ) -> tuple[float, list[float]]:
        """One round of the ring.

        Args:
            ring: the exchange.
            blocks: rows of each member's block.
            row_s: by (computing rank, rank of the keys), what a row of keys takes on average.
            before_s: per member, what it computes beside the first hop.

        Returns:
            Seconds, and what each member computes beside the next hop.
        """
        members, rates, token_bytes = ring.participants, self._rates, self._group.spec.token_bytes
        size = len(members)
        links = self._ring_links(members)
        total_s = 0.0
        for hop in range(1, size):
            loads_s: list[float] = []
            message_s = 0.0
            for i in range(size):
                sent, received = blocks[(i - hop + 1) % size] * token_bytes, blocks[(i - hop) % size] * token_bytes
                load_s = before_s[i] + (sent + received) * rates.moved_byte_s
                load_s += ((sent > 0) + (received > 0)) * rates.exchange_s
                if hop == 1:
                    load_s += sent / rates.copy_bytes_per_s
                loads_s.append(load_s)
                if sent:
                    message_s = max(message_s, links[i].message_s(sent))
            total_s += max(message_s, self._longest(members, loads_s))
            before_s = []
            for i in range(size):
                origin = (i - hop) % size
                seconds = blocks[origin] * row_s.get((members[i], members[origin]), 0.0)
                before_s.append(seconds + rates.merge_s if seconds else 0.0)
        return total_s, before_s

    def _ring_links(self, members: Sequence[int]) -> list[Link]:
        """From every member to the next. Of a node's link to others, those have it that send over it."""
        topology, nodes = self._topology, self._topology.nodes
        pairs = list(zip(members, [*members[1:], members[0]], strict=True))
        links = [topology.link(*pair) for pair in pairs]
        if topology.ranks_per_link == 1:
            return links
        far = [nodes[a] for a, b in pairs if nodes[a] != nodes[b]]
        return [
            link
            if nodes[a] == nodes[b]
            else msgspec.structs.replace(
                link,
                bytes_per_s=link.bytes_per_s
                * min(topology.ranks_per_link, max(1.0, nodes.count(nodes[a]) / far.count(nodes[a]))),
            )
            for link, (a, b) in zip(links, pairs, strict=True)
        ]

    def _ring_row_s(self, ring: RingExchange, query_rank: int, key_rank: int) -> float:
        """What one rank's work on the keys of another takes, per row of these that go round."""
        if query_rank == key_rank or key_rank not in ring.participants:
            return 0.0
        num_rows = ring.num_rows[ring.participants.index(key_rank)]
        if not num_rows:
            return 0.0
        pair, rates = self._pairs[query_rank, key_rank], self._rates
        num_calls, num_merged = pair.in_blocks(ring.block_len)
        merge_s = num_merged * self._row_bytes / rates.copy_bytes_per_s
        return (pair.kernel_s + num_calls * rates.call_s + merge_s) / num_rows

    # -- phases ------------------------------------------------------------------------------------------------------

    def _serve(self, queries: Sequence[_Message], partials: Sequence[_Message]) -> Seconds:
        """Compute for others; returns when each rank's first partial leaves."""
        compute_s: Seconds = {}
        num_served: dict[int, int] = {}
        for (query_rank, key_rank), pair in self._pairs.items():
            if query_rank != key_rank:
                _add(compute_s, key_rank, pair.kernel_s + pair.num_calls * self._rates.call_s)
        for m in partials:
            num_served[m.source] = num_served.get(m.source, 0) + 1
        began = dict(self._now)
        self._run(compute_s, self._sending_s(partials))
        return {rank: began[rank] + (self._now[rank] - began[rank]) / count for rank, count in num_served.items()}

    def _take_home(self, partials: Sequence[_Message], first_s: Mapping[int, float]) -> None:
        """Wait for partials and merge them. Args: `first_s` when each sender's first one leaves."""
        arrived: Seconds = {}
        for m, queue_s in zip(partials, self._queues_s(partials), strict=True):
            link = self._topology.link(m.source, m.target)
            last = self._now[m.source] + min(queue_s, m.num_bytes / link.bytes_per_s)  # computed last, behind nothing
            time_s = link.latency_of(m.num_bytes) + max(last, first_s[m.source] + queue_s)
            arrived[m.target] = max(arrived.get(m.target, 0.0), time_s)
        self._wait(arrived)
        merge_s: Seconds = {}
        for m in partials:
            _add(merge_s, m.target, self._merge_bytes_s(m.num_bytes))
        self._run({}, merge_s, partials)

    def _run(self, compute_s: Mapping[int, float], copy_s: Mapping[int, float], moved: Sequence[_Message] = ()) -> None:
        """Every rank works off its load. Args: `moved` messages move meanwhile."""
        byte_s = self._rates.moved_byte_s
        moved_s: Seconds = {}
        if byte_s:
            for m in moved:
                _add(moved_s, m.source, m.num_bytes * byte_s)
                _add(moved_s, m.target, m.num_bytes * byte_s)
        ranks = list({**compute_s, **copy_s, **moved_s})
        loads = [compute_s.get(r, 0.0) + copy_s.get(r, 0.0) + moved_s.get(r, 0.0) for r in ranks]
        for rank, load_s, time_s in zip(ranks, loads, self._together(ranks, loads), strict=True):
            if load_s:
                self._now[rank] += time_s
                self._compute_s[rank] += compute_s.get(rank, 0.0) * time_s / load_s
                self._copy_s[rank] += copy_s.get(rank, 0.0) * time_s / load_s

    def _together(self, ranks: Sequence[int], loads_s: list[float]) -> list[float]:
        """How long ranks take that start together, if they share devices."""
        sharing = self._rates.ranks_per_device
        if sharing == 1:
            return loads_s
        nodes = self._machines
        even_s: Seconds = {}  # per machine, if its devices are busy to the end
        for rank, load_s in zip(ranks, loads_s, strict=True):
            _add(even_s, nodes[rank], load_s / nodes.count(nodes[rank]))
            _add(self._busy_s, nodes[rank], load_s)
        return [
            min(load_s, max(load_s / sharing, even_s[nodes[rank]])) for rank, load_s in zip(ranks, loads_s, strict=True)
        ]

    def _longest(self, ranks: Sequence[int], loads_s: list[float]) -> float:
        return max(self._together(ranks, loads_s))

    def _wait(self, until: Mapping[int, float]) -> None:
        for rank, time_s in until.items():
            self._now[rank] = max(self._now[rank], time_s)

    # -- messages ----------------------------------------------------------------------------------------------------

    def _messages(self, index: int) -> list[_Message]:
        exchange = self._step.exchanges[index]
        assert isinstance(exchange, DirectExchange)
        ranks, operand, group = exchange.participants, exchange.operand, self._group
        return [
            _Message(source, target, message_bytes(operand, num_rows, group))
            for source, row in zip(ranks, exchange.num_rows, strict=True)
            if any(row)
            for target, num_rows in zip(ranks, row, strict=True)
            if num_rows
        ]

    def _sending_s(self, messages: Sequence[_Message]) -> Seconds:
        """Per rank, time to pack its messages, and to start all that it sends and receives."""
        rates = self._rates
        seconds: Seconds = {}
        for m in messages:
            _add(seconds, m.source, rates.exchange_s + m.num_bytes / rates.copy_bytes_per_s)
            _add(seconds, m.target, rates.exchange_s)
        return seconds

    def _queues_s(self, messages: Sequence[_Message]) -> list[float]:
        """Per message, how long those take that share its sender or its receiver: its own link is busy with them."""
        topology, nodes = self._topology, self._topology.nodes
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
            if topology.ranks_per_link > 1:  # whoever sends alone has the node's whole link
                even = node_sent[nodes[m.source]] / nodes.count(nodes[m.source])
                num_bytes = max(num_bytes / topology.ranks_per_link, min(num_bytes, even))
            queues_s.append(num_bytes / topology.between.bytes_per_s)
        return queues_s

    def _arrivals(self, messages: Sequence[_Message], ready_s: Mapping[int, float]) -> Seconds:
        """When each rank has all its messages. Args: `ready_s` per rank, when its messages leave."""
        arrived: Seconds = {}
        for m, queue_s in zip(messages, self._queues_s(messages), strict=True):
            link = self._topology.link(m.source, m.target)
            time_s = ready_s[m.source] + link.latency_of(m.num_bytes) + queue_s
            arrived[m.target] = max(arrived.get(m.target, 0.0), time_s)
        return arrived

    # -- work --------------------------------------------------------------------------------------------------------

    def _pair_s(self, query_rank: int, key_rank: int) -> float:
        pair = self._pairs.get((query_rank, key_rank))
        return pair.kernel_s + pair.num_calls * self._rates.call_s if pair else 0.0

    def _num_rows(self, query_rank: int, key_rank: int) -> int:
        pair = self._pairs.get((query_rank, key_rank))
        return pair.num_rows if pair else 0

    def _merge_s(self, num_rows: int) -> float:
        return self._merge_bytes_s(num_rows * self._row_bytes)

    def _merge_bytes_s(self, num_bytes: float) -> float:
        return self._rates.merge_s + num_bytes / self._rates.copy_bytes_per_s


def _add(seconds: Seconds, rank: int, more_s: float) -> None:
    seconds[rank] = seconds.get(rank, 0.0) + more_s
