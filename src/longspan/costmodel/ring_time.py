"""Predicted time of a ring (`pass_kv`), hop by hop.

Holds the time model of one strategy. Must not know the others.
Read next: `longspan.cp.pass_kv`, which is modelled here; `longspan.costmodel.predict`.

Note [Ranks in step]
    A rank starts no hop before its predecessor has finished the previous one, so after a few hops all ranks go at the
    pace of the slowest: a hop takes as long as its longest computation or message. Rounds of equal blocks take equal
    time, so each kind of round is computed twice at most: once behind another kind, once behind its own.
"""

from collections.abc import Mapping, Sequence

import msgspec

from longspan.costmodel.parameters import Costs, Link
from longspan.costmodel.timeline import Clocks
from longspan.costmodel.work import StepWork
from longspan.plan.types import RingExchange


class RingTime:
    """Time model of one ring."""

    def __init__(
        self, ring: RingExchange, clocks: Clocks, costs: Costs, work: StepWork, *, token_bytes: int, row_bytes: int
    ) -> None:
        """Take a ring where a key with its value has `token_bytes`, and a row of a partial has `row_bytes`."""
        self._ring, self._clocks, self._rates, self._work = ring, clocks, costs.rates, work
        self._token_bytes, self._row_bytes = token_bytes, row_bytes
        self._links = _ring_links(ring.participants, costs)
        self._row_s = {pair: self._seconds_per_row(*pair) for pair in work.pairs}

    def run(self) -> None:
        """Set the members' clocks to the end of the ring."""
        ring, clocks, members = self._ring, self._clocks, self._ring.participants
        before_s = [self._own_s(rank) for rank in members]  # seconds of compute during the next hop
        total_s = 0.0
        round_s: dict[tuple[tuple[int, ...], bool], float] = {}
        last_blocks: tuple[int, ...] | None = None
        for index in range(-(-max(ring.num_rows) // ring.block_len)):
            blocks = tuple(max(0, min(ring.block_len, rows - index * ring.block_len)) for rows in ring.num_rows)
            kind = (blocks, blocks == last_blocks)
            if kind not in round_s:
                round_s[kind], before_s = self._round_s(blocks, before_s)
            total_s += round_s[kind]
            last_blocks = blocks
        total_s += clocks.longest(members, before_s)
        for i, rank in enumerate(members):
            clocks.now[rank] = total_s
            clocks.compute_s[rank], clocks.copy_s[rank] = self._shares_s(i)

    def _round_s(self, blocks: tuple[int, ...], before_s: list[float]) -> tuple[float, list[float]]:
        """Time one round.

        Args:
            blocks: rows of each member's block.
            before_s: seconds that each member computes during the first hop.

        Returns:
            Seconds of the round, and seconds that each member computes during the next hop.
        """
        members, rates = self._ring.participants, self._rates
        size = len(members)
        is_shared = rates.ranks_per_device > 1
        total_s = 0.0
        for hop in range(1, size):
            loads_s: list[float] = []
            message_s = late_s = 0.0
            for i in range(size):
                sent = blocks[(i - hop + 1) % size] * self._token_bytes
                received = blocks[(i - hop) % size] * self._token_bytes
                load_s = before_s[i] + (sent + received) * rates.moved_byte_s
                load_s += ((sent > 0) + (received > 0)) * rates.exchange_s
                if hop == 1:
                    load_s += sent / rates.copy_bytes_per_s
                loads_s.append(load_s)
                if sent:
                    link = self._links[i]
                    message_s = max(message_s, link.message_s(sent))
                    if is_shared:  # moving long messages waits for a turn on a core, whatever is computed there
                        late_s = max(late_s, link.latency_of(sent) - link.latency_s)
            total_s += max(message_s - late_s, self._clocks.longest(members, loads_s)) + late_s
            before_s = []
            for i in range(size):
                origin = (i - hop) % size
                seconds = blocks[origin] * self._row_s.get((members[i], members[origin]), 0.0)
                before_s.append(seconds + rates.merge_s if seconds else 0.0)
        return total_s, before_s

    def _own_s(self, rank: int) -> float:
        return self._work.pair_s(rank, rank, self._rates)

    def _seconds_per_row(self, query_rank: int, key_rank: int) -> float:
        """Seconds of one rank's work on the keys of another, per key that goes round."""
        ring, rates = self._ring, self._rates
        if query_rank == key_rank or key_rank not in ring.participants:
            return 0.0
        num_rows = ring.num_rows[ring.participants.index(key_rank)]
        if not num_rows:
            return 0.0
        pair = self._work.pairs[query_rank, key_rank]
        num_calls, num_merged = pair.in_blocks(ring.block_len)
        merge_s = num_merged * self._row_bytes / rates.copy_bytes_per_s
        return (pair.kernel_s + num_calls * rates.call_s + merge_s) / num_rows

    def _shares_s(self, member: int) -> tuple[float, float]:
        """Seconds that one member spends in kernels, and on packing and merging."""
        ring, rates = self._ring, self._rates
        rank = ring.participants[member]
        compute_s = self._own_s(rank)
        copy_s = ring.num_rows[member] * self._token_bytes / rates.copy_bytes_per_s
        for origin, rows in zip(ring.participants, ring.num_rows, strict=True):
            pair = self._work.pairs.get((rank, origin))
            if origin != rank and pair is not None:
                num_calls, num_merged = pair.in_blocks(ring.block_len)
                compute_s += pair.kernel_s + num_calls * rates.call_s
                copy_s += num_merged * self._row_bytes / rates.copy_bytes_per_s
                copy_s += -(-rows // ring.block_len) * rates.merge_s
        return compute_s, copy_s


def _ring_links(members: Sequence[int], costs: Costs) -> list[Link]:
    """Link from every member to the next; members that send over one node's link to others share it."""
    topology, nodes = costs.topology, costs.topology.nodes
    pairs = list(zip(members, [*members[1:], members[0]], strict=True))
    num_far: Mapping[int, int] = {
        node: sum(nodes[a] == node != nodes[b] for a, b in pairs) for node in {nodes[a] for a in members}
    }
    links: list[Link] = []
    for a, b in pairs:
        link = topology.link(a, b)
        if nodes[a] != nodes[b] and topology.ranks_per_link > 1:
            share = min(topology.ranks_per_link, max(1.0, nodes.count(nodes[a]) / num_far[nodes[a]]))
            link = msgspec.structs.replace(link, bytes_per_s=link.bytes_per_s * share)
        links.append(link)
    return links
