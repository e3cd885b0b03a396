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
from longspan.cp.base import KeyShare, KVBlock, RankStep
from longspan.cp.local import Local
from longspan.cp.resolve import BufferLayout, PoolLayout, message_runs, resolve
from longspan.plan.segments import moved_keys
from longspan.plan.types import DirectExchange
from longspan.types import AttentionParams


class GatherKV:
    """Strategy that fetches rows while the local part is computed."""

    def __init__(self, step: RankStep) -> None:
        self._step, self._local = step, Local(step)
        self._sends, self._recvs = {}, {}
        rank, segments = step.rank, step.step.segments
        (exchange,) = step.step.exchanges
        assert isinstance(exchange, DirectExchange)
        if rank not in exchange.participants:
            return
        me = exchange.participants.index(rank)
        query_rows = step.local_query_rows()
        for i, peer in enumerate(exchange.participants):
            if exchange.num_rows[me][i]:
                self._sends[peer] = message_runs(step.pool_layout, moved_keys(segments, rank, peer))
            if exchange.num_rows[i][me]:
                layout = BufferLayout(message_runs(PoolLayout(step.tables, peer), moved_keys(segments, peer, rank)))
                assert layout.num_rows == exchange.num_rows[i][me], "plan and page tables disagree"
                seen = [s for s in segments if s.query_rank == rank and s.key_rank == peer]
                share = KeyShare(resolve(seen, query_rows, layout, step.group.spec.window))
                self._recvs[peer] = (layout.num_rows, share)

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
