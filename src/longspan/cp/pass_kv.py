"""`pass_kv`: K and V go round a ring in blocks of fixed size, the next one in flight while this one is computed.

Good for long chunks with little cached prefix. Temporary memory is three blocks, whatever the number of ranks and the
context. Source: ring attention (2310.01889); pass-KV (2411.01783).

Holds the strategy. Must not know other strategies but `local`.
Read next: `longspan.cp.pass_q`.

Note [Three ranks, two rounds]
    Rank 0 holds blocks a0 a1, rank 1 b0 b1, rank 2 c0. What rank 0 sends, receives and computes:

        step        1       2       3       4       (after)
        send to 1   a0      c0      a1      -
        recv from 2 c0      b0      -       b1
        compute     local   c0      b0      -       b1

    A block is forwarded while it is computed; the first step of a round sends an own block instead. So there is at
    most one block being sent, one being received and one being computed: three buffers. Rank 2 has no second block:
    its message of round 1 has no rows and is not sent, as every rank knows from the plan.

Note [Traffic of one layer]
    N ranks that contribute R rows each, seen by any other rank, in blocks of B: a rank sends (N - 1) R rows of K and V
    (its own, and all others' but its successor's), in (N - 1) R / B exchanges, rounded up, of one message each.
"""

from torch import Tensor

from longspan.attention.partial import PartialAttention
from longspan.cp.base import KeyShare, KVBlock, RankStep
from longspan.cp.local import Local
from longspan.cp.resolve import BufferLayout, PoolLayout, cut_blocks, message_runs, resolve
from longspan.plan.segments import keys_of_others
from longspan.plan.types import Segment
from longspan.sharding.pages import KeyRun
from longspan.types import AttentionParams


class PassKV:
    """Strategy that passes blocks of K and V round a ring of all participants."""

    def __init__(self, step: RankStep) -> None:
        self._step, self._local = step, Local(step)
        self._num_rows, self._block_len, self._num_rounds = step.step.num_sent, step.step.block_len, 0
        self._participants = step.step.participants
        if step.rank not in self._participants:
            return
        rank, query_rows = step.rank, step.local_query_rows()
        self._me = self._participants.index(rank)
        self._num_rounds = -(-max(self._num_rows) // self._block_len)
        self._blocks: list[list[tuple[int, KeyRun]]] = []
        self._seen: dict[tuple[int, int], KeyShare] = {}  # (origin, round): the keys of the block seen here
        seen_on: dict[int, list[Segment]] = {}
        for s in step.segments:
            if s.query_rank == rank:
                seen_on.setdefault(s.key_rank, []).append(s)
        for origin, peer in enumerate(self._participants):
            others = keys_of_others(step.query_runs, step.tables, step.group.spec, peer)
            runs = message_runs(PoolLayout(step.tables, peer), others)
            assert sum(run.num_tokens for _, run in runs) == self._num_rows[origin], "plan and page tables disagree"
            blocks = cut_blocks(runs, self._block_len)
            if peer == rank:
                self._blocks = blocks
                continue
            mine = seen_on.get(peer, [])
            for index, block in enumerate(blocks):
                layout = BufferLayout(block)
                self._seen[origin, index] = KeyShare(resolve(mine, query_rows, layout, step.group.spec.window))

    def _block_rows(self, origin: int, index: int) -> int:
        """Number of rows of a participant's block in one round."""
        left = self._num_rows[origin] - index * self._block_len
        return max(0, min(self._block_len, left))

    def run_layer(self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> PartialAttention:
        if self._num_rounds == 0:
            return self._local.run_layer(q, k, v, params)
        step, participants = self._step, self._participants
        num_ranks = len(participants)
        successor = participants[(self._me + 1) % num_ranks]
        predecessor = participants[(self._me - 1) % num_ranks]
        capacity = min(self._block_len, max(self._num_rows))
        free = [KVBlock(step.group.spec.layout, capacity, k.device) for _ in range(3)]
        acc: PartialAttention | None = None
        received: tuple[KVBlock, int, int] | None = None  # buffer, origin, round

        def compute(block: KVBlock, origin: int, index: int) -> None:
            assert acc is not None
            views = block.views(self._block_rows(origin, index))
            if (origin, index) in self._seen:
                self._seen[origin, index].accumulate_(acc, step.backend, q, *views, params)

        for index in range(self._num_rounds):
            for hop in range(1, num_ranks):
                sent_origin, origin = (self._me - hop + 1) % num_ranks, (self._me - hop) % num_ranks
                if hop == 1:
                    outgoing = free.pop()
                    if self._block_rows(self._me, index):
                        outgoing.pack(k, v, self._blocks[index])
                else:
                    assert received is not None
                    outgoing = received[0]
                incoming = free.pop()
                pending = step.comm.exchange(
                    [(successor, outgoing.message(self._block_rows(sent_origin, index)))],
                    [(predecessor, incoming.message(self._block_rows(origin, index)))],
                )
                if received is None:
                    acc = self._local.run_layer(q, k, v, params)
                else:
                    compute(*received)
                pending.wait()
                if received is not None and received[0] is not outgoing:
                    free.append(received[0])
                free.append(outgoing)
                received = (incoming, origin, index)
        assert received is not None
        assert acc is not None
        compute(*received)
        return acc
