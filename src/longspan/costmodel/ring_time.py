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
import numpy as np

from longspan.costmodel.parameters import Costs, Link
from longspan.costmodel.timeline import Clocks
from longspan.costmodel.work import Floats, StepWork
from longspan.plan.exchanges import RingExchange
from longspan.plan.step_keys import Counts


class RingTime:
    """Time model of one ring of P members."""

    def __init__(
        self,
        ring: RingExchange,
        members: Counts,
        clocks: Clocks,
        costs: Costs,
        work: StepWork,
        *,
        token_bytes: int,
        row_bytes: int,
    ) -> None:
        """Take a ring.

        Args:
            ring: the ring.
            members: [P] its participants, as indices of the clocks' ranks.
            clocks: clocks of all ranks, which `run` advances.
            costs: topology and rates of the cluster.
            work: kernel calls of the step.
            token_bytes: bytes of a key with its value.
            row_bytes: bytes of a row of a partial that is merged.
        """
        self._ring, self._members, self._clocks, self._rates = ring, members, clocks, costs.rates
        self._token_bytes, self._num_rows = token_bytes, np.array(ring.num_rows, dtype=np.float64)
        self._links = _ring_links(ring.participants, costs)
        pairs = np.ix_(members, members)
        num_calls, num_merged = work.in_blocks(ring.block_len)
        self._own_s = work.pair_s(costs.rates).diagonal()[members]
        self._kernel_s = work.kernel_s[pairs] + num_calls[pairs] * costs.rates.call_s
        self._merged_s = num_merged[pairs] * row_bytes / costs.rates.copy_bytes_per_s
        self._meets = work.num_rows[pairs] > 0
        for matrix in (self._kernel_s, self._merged_s, self._meets):
            np.fill_diagonal(matrix, 0)
        seconds = self._kernel_s + self._merged_s
        self._row_s = np.divide(seconds, self._num_rows, out=np.zeros_like(seconds), where=self._num_rows > 0)
        """[P, P] seconds of member i's work on the keys of member j, per key that goes round."""

    def run(self) -> None:
        """Set the members' clocks to the end of the ring."""
        ring, clocks = self._ring, self._clocks
        before_s = self._own_s  # seconds of compute during the next hop
        total_s = 0.0
        round_s: dict[tuple[bytes, bool], float] = {}
        last_blocks: bytes | None = None
        for index in range(int(-(-max(ring.num_rows) // ring.block_len))):
            blocks = np.clip(self._num_rows - index * ring.block_len, 0, ring.block_len)
            kind = (blocks.tobytes(), blocks.tobytes() == last_blocks)
            if kind not in round_s:
                round_s[kind], before_s = self._round_s(blocks, before_s)
            total_s += round_s[kind]
            last_blocks = blocks.tobytes()
        total_s += float(clocks.together(self._all(before_s)).max())
        clocks.now[self._members] = total_s
        rounds = -(-self._num_rows // ring.block_len)
        num_merges = np.where(self._meets, rounds, 0.0)
        clocks.compute_s[self._members] = self._own_s + self._kernel_s.sum(axis=1)
        copied_s = self._num_rows * self._token_bytes / self._rates.copy_bytes_per_s
        merges_s = (self._merged_s + num_merges * self._rates.merge_s).sum(axis=1)
        clocks.copy_s[self._members] = copied_s + merges_s

    def _all(self, loads_s: Floats) -> Floats:
        """Loads [..., members] as loads of all the clocks' ranks, 0 for those outside of the ring."""
        found = np.zeros((*loads_s.shape[:-1], len(self._clocks.now)))
        found[..., self._members] = loads_s
        return found

    def _round_s(self, blocks: Floats, before_s: Floats) -> tuple[float, Floats]:
        """Time one round.

        Args:
            blocks: [P] rows of each member's block.
            before_s: [P] seconds that each member computes during the first hop.

        Returns:
            Seconds of the round, and seconds that each member computes during the next hop.
        """
        rates, size = self._rates, len(blocks)
        hops, members = np.arange(1, size)[:, None], np.arange(size)
        origins = (members - hops) % size  # [hops, P] whose block each member receives
        sent = blocks[(members - hops + 1) % size] * self._token_bytes
        received = blocks[origins] * self._token_bytes
        computes_s = blocks[origins] * self._row_s[members, origins]
        computes_s[computes_s > 0] += rates.merge_s
        loads_s = np.concatenate([before_s[None], computes_s[:-1]]) + (sent + received) * rates.moved_byte_s
        loads_s += ((sent > 0) * 1 + (received > 0)) * rates.exchange_s
        loads_s[0] += sent[0] / rates.copy_bytes_per_s
        message_s, late_s = self._messages_s(sent)
        longest_s = self._clocks.together(self._all(loads_s)).max(axis=1)
        return float((np.maximum(message_s - late_s, longest_s) + late_s).sum()), computes_s[-1]

    def _messages_s(self, sent: Floats) -> tuple[Floats, Floats]:
        """[hops] seconds of the longest message of each hop, and how late messages start where devices are shared."""
        latency_s = np.stack([link.latencies_of(sent[:, i]) for i, link in enumerate(self._links)], axis=1)
        bandwidth = np.array([link.bytes_per_s for link in self._links])
        message_s = np.where(sent > 0, latency_s + sent / bandwidth, 0.0).max(axis=1)
        if self._rates.ranks_per_device == 1:
            return message_s, np.zeros_like(message_s)
        # Moving long messages waits for a turn on a core, whatever is computed there.
        extra_s = latency_s - np.array([link.latency_s for link in self._links])
        return message_s, np.where(sent > 0, extra_s, 0.0).max(axis=1)


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
