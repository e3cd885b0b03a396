"""`gather_kv`: every rank fetches the K and V rows that its queries see, at once.

Good for short chunks on fast links and for sliding windows, where only the rows in the window move. Peak memory grows
with the number of visible keys.

Note [Traffic of one layer]
    N ranks, R rows on each that the queries of each other rank see: a rank sends (N - 1) R rows of K and V, in one
    exchange of N - 1 messages.

Holds the strategy. Must not know other strategies but `local`.
Read next: `longspan.cp.pass_kv`, which moves the same rows with bounded memory.
"""

from torch import Tensor

from longspan.attention.partial import PartialAttention
from longspan.cp.base import KeyShare, KVBlock, RankStep, check_rows
from longspan.cp.local import Local
from longspan.cp.resolve import BufferLayout, PoolLayout, message_runs, resolve
from longspan.plan.segments import moved_keys
from longspan.plan.types import Segment
from longspan.sharding.pages import KeyRun
from longspan.types import AttentionParams


class GatherKV:
    """Strategy that fetches rows while the local part is computed."""

    def __init__(self, step: RankStep) -> None:
        self._step, self._local = step, Local(step)
        self._sends: dict[int, list[tuple[int, KeyRun]]] = {}
        self._recvs: dict[int, tuple[int, KeyShare]] = {}
        rank, query_rows = step.rank, step.local_query_rows()
        seen_by: dict[int, list[Segment]] = {}  # peer: segments of its queries over this rank's keys
        seen_on: dict[int, list[Segment]] = {}  # peer: segments of this rank's queries over its keys
        for s in step.segments:
            if s.query_rank != rank:
                seen_by.setdefault(s.query_rank, []).append(s)
            elif s.key_rank != rank:
                seen_on.setdefault(s.key_rank, []).append(s)
        for peer, segments in sorted(seen_by.items()):
            self._sends[peer] = message_runs(step.pool_layout, moved_keys(segments, rank, peer))
        for peer, segments in sorted(seen_on.items()):
            layout = BufferLayout(message_runs(PoolLayout(step.tables, peer), moved_keys(segments, peer, rank)))
            share = KeyShare(resolve(segments, query_rows, layout, step.group.spec.window))
            self._recvs[peer] = (layout.num_rows, share)
        sent = sum(run.num_tokens for runs in self._sends.values() for _, run in runs)
        check_rows(step, sent, sum(rows for rows, _ in self._recvs.values()))

    def run_layer(self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> PartialAttention:
        step, layout = self._step, self._step.group.spec.layout
        sends: list[tuple[int, Tensor]] = []
        for peer, runs in self._sends.items():
            block = KVBlock(layout, sum(run.num_tokens for _, run in runs), k.device)
            sends.append((peer, block.message(block.pack(k, v, runs))))
        blocks = {peer: KVBlock(layout, rows, k.device) for peer, (rows, _) in self._recvs.items()}
        recvs = [(peer, block.message(self._recvs[peer][0])) for peer, block in blocks.items()]
        pending = step.comm.exchange(sends, recvs)
        acc = self._local.run_layer(q, k, v, params)
        pending.wait()
        for peer, block in blocks.items():
            rows, share = self._recvs[peer]
            share.accumulate_(acc, step.backend, q, *block.views(rows), params)
        return acc
