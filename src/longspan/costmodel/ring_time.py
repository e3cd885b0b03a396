"""Predicted time of a ring (`pass_kv`), hop by hop.

Holds the time model of one strategy. Must not know the others.
Read next: `longspan.cp.pass_kv`, which is modelled here; `longspan.costmodel.predict`.

Note [Ranks in step]
    A rank starts no hop before its predecessor has finished the previous one, so after a few hops all ranks go at the
    pace of the slowest: a hop takes as long as its longest computation or message. Rounds of whole blocks take equal
    time, but for the first: they are computed twice at most, and count as often as they are.
"""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from longspan.costmodel.parameters import Costs, Link
from longspan.costmodel.timeline import Clocks, latencies
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
        num_full = int(min(ring.num_rows) // ring.block_len)  # rounds where every member has a whole block
        kinds = [np.full(len(self._num_rows), float(ring.block_len))] * min(num_full, 2)
        counts = [1, num_full - 1][: len(kinds)]
        for index in range(num_full, int(-(-max(ring.num_rows) // ring.block_len))):
            kinds.append(np.clip(self._num_rows - index * ring.block_len, 0, ring.block_len))
            counts.append(1)
        round_s, after_s = self._rounds_s(np.stack(kinds))
        total_s = float((round_s * counts).sum())  # no product by BLAS: hosts must agree to the last bit
        total_s += float(clocks.together(self._all(after_s)).max())
        clocks.now[self._members] = total_s
        rounds = -(-self._num_rows // ring.block_len)
        num_merges = np.where(self._meets, rounds, 0.0)
        slowness = clocks.slowness[self._members]
        clocks.compute_s[self._members] = (self._own_s + self._kernel_s.sum(axis=1)) * slowness
        copied_s = self._num_rows * self._token_bytes / self._rates.copy_bytes_per_s
        merges_s = (self._merged_s + num_merges * self._rates.merge_s).sum(axis=1)
        clocks.copy_s[self._members] = (copied_s + merges_s) * slowness

    def _all(self, loads_s: Floats) -> Floats:
        """Loads [..., members] as loads of all the clocks' ranks, 0 for those outside of the ring."""
        if len(self._members) == len(self._clocks.now):
            return loads_s
        found = np.zeros((*loads_s.shape[:-1], len(self._clocks.now)))
        found[..., self._members] = loads_s
        return found

    def _rounds_s(self, blocks: Floats) -> tuple[Floats, Floats]:
        """Time rounds that follow each other.

        Args:
            blocks: [rounds, P] rows of each member's block.

        Returns:
            Seconds [rounds], and seconds [P] that each member computes after the last hop.
        """
        rates, size = self._rates, blocks.shape[1]
        hops, members = np.arange(1, size)[:, None], np.arange(size)
        origins = (members - hops) % size  # [hops, P] whose block each member receives
        sent = blocks[:, (members - hops + 1) % size] * self._token_bytes  # [rounds, hops, P]
        rows = blocks[:, origins]
        computes_s = rows * self._row_s[members, origins]
        if rates.merge_s:
            computes_s[computes_s > 0] += rates.merge_s
        flat = computes_s.reshape(-1, size)
        loads_s = np.concatenate([self._own_s[None], flat[:-1]]).reshape(computes_s.shape)
        if rates.moved_byte_s:
            loads_s += (sent + rows * self._token_bytes) * rates.moved_byte_s
        if rates.exchange_s:
            loads_s += ((sent > 0) * 1 + (rows > 0)) * rates.exchange_s
        loads_s[:, 0] += sent[:, 0] / rates.copy_bytes_per_s
        message_s, late_s = self._messages_s(sent)
        longest_s = self._clocks.together(self._all(loads_s)).max(axis=2)
        return (np.maximum(message_s - late_s, longest_s) + late_s).sum(axis=1), flat[-1]

    def _messages_s(self, sent: Floats) -> tuple[Floats, Floats | float]:
        """Longest message of each hop [rounds, hops], and how late messages start where devices are shared.

        Args:
            sent: [rounds, hops, P] bytes that each member sends.
        """
        links = self._links
        if all(link == links[0] for link in links):
            latency_s = latencies(links[0], sent)
            bandwidth = np.array(links[0].bytes_per_s)
        else:
            latency_s = np.stack([latencies(link, sent[..., i]) for i, link in enumerate(links)], axis=2)
            bandwidth = np.array([link.bytes_per_s for link in links])
        message_s = np.where(sent > 0, latency_s + sent / bandwidth, 0.0).max(axis=2)
        if self._rates.ranks_per_device == 1:
            return message_s, 0.0
        # Moving long messages waits for a turn on a core, whatever is computed there.
        extra_s = latency_s - np.array([link.latency_s for link in links])
        return message_s, np.where(sent > 0, extra_s, 0.0).max(axis=2)


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
