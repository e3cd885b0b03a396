"""`pass_q`: queries go to the owners of the keys, partials come back and are merged at home.

Good for decode, and for chunks that are small against their cached prefix. Source: pass-Q (2411.01783); merging
partials by log-sum-exp (2305.19370 section 3).

Holds the strategy and the wire format of partials. Must not know the others but `local`.
Read next: `longspan.cp.attend`, which calls the strategies.

On the wire, a partial's `out` is rounded once to the model's dtype, `lse` keeps float32: the error is then flat in the
number of ranks.
"""

import torch
from torch import Tensor

from longspan.attention.base import RowSegment
from longspan.attention.partial import PartialAttention, merge_rows_
from longspan.cp.base import RankStep
from longspan.cp.local import Local
from longspan.cp.resolve import resolve
from longspan.plan.segments import moved_queries
from longspan.plan.types import PARTIAL_ALIGNMENT_BYTES, DirectExchange
from longspan.types import AttentionParams


class PartialMessage:
    """One message that holds `out` [n, H, Dv] in the model's dtype and `lse` [n, H]."""

    def __init__(self, num_rows: int, num_heads: int, v_width: int, dtype: torch.dtype, device: torch.device) -> None:
        lse_dtype = torch.float64 if dtype is torch.float64 else torch.float32
        out_bytes = num_rows * num_heads * v_width * dtype.itemsize
        lse_start = -(-out_bytes // PARTIAL_ALIGNMENT_BYTES) * PARTIAL_ALIGNMENT_BYTES
        lse_bytes = num_rows * num_heads * lse_dtype.itemsize
        self.data = torch.empty(lse_start + lse_bytes, dtype=torch.uint8, device=device)
        """[bytes] what travels."""
        self.out = self.data[:out_bytes].view(dtype).view(num_rows, num_heads, v_width)
        self.lse = self.data[lse_start:].view(lse_dtype).view(num_rows, num_heads)

    def pack(self, partial: PartialAttention) -> Tensor:
        """Fill the message from a partial."""
        self.out.copy_(partial.out)
        self.lse.copy_(partial.lse)
        return self.data

    def partial(self) -> PartialAttention:
        """What the message holds, in accumulation dtype."""
        return PartialAttention(self.out.to(self.lse.dtype), self.lse)


class PassQ:
    """All queries leave at once; every peer's partial leaves as soon as it is computed."""

    def __init__(self, step: RankStep) -> None:
        self._step, self._local = step, Local(step)
        self._sends: dict[int, list[tuple[int, int]]] = {}  # peer: (first row, rows) of my queries
        self._recvs: dict[int, tuple[int, list[RowSegment]]] = {}  # peer: rows of its queries, what to compute
        exchange, back = step.step.exchanges
        assert isinstance(exchange, DirectExchange)
        assert isinstance(back, DirectExchange)
        rank, segments, participants = step.rank, step.step.segments, exchange.participants
        if rank not in participants:
            return
        me = participants.index(rank)
        query_rows = step.local_query_rows()
        # Start with the next rank: else everybody would compute for rank 0 first, and rank N - 1 would wait longest.
        for i in ((me + n) % len(participants) for n in range(1, len(participants))):
            peer = participants[i]
            if exchange.num_rows[me][i]:
                mine = moved_queries(segments, rank, peer)
                self._sends[peer] = [(query_rows[run], run[2] - run[1]) for run in mine]
            if exchange.num_rows[i][me]:
                rows, row = {}, 0
                for run in moved_queries(segments, peer, rank):
                    rows[run] = row
                    row += run[2] - run[1]
                assert row == exchange.num_rows[i][me] == back.num_rows[me][i], "plan and segments disagree"
                seen = [s for s in segments if s.query_rank == peer and s.key_rank == rank]
                self._recvs[peer] = (row, resolve(seen, rows, step.pool_layout, step.group.spec.window))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> PartialAttention:
        comm, backend, spec = self._step.comm, self._step.backend, self._step.group.spec
        num_heads, k_width = self._step.group.num_query_heads, spec.k_width

        def message(num_rows: int) -> PartialMessage:
            return PartialMessage(num_rows, num_heads, spec.v_width, k.dtype, k.device)

        incoming = {
            peer: torch.empty(num_rows, num_heads, k_width, dtype=k.dtype, device=k.device)
            for peer, (num_rows, _) in self._recvs.items()
        }
        rows = q.contiguous()  # once: what several peers get is not copied again
        outgoing = {peer: _gathered(rows, runs) for peer, runs in self._sends.items()}
        queries = {
            peer: comm.exchange(
                [(peer, outgoing[peer])] if peer in outgoing else [],
                [(peer, incoming[peer])] if peer in incoming else [],
            )
            for peer in {**self._sends, **self._recvs}
        }
        answers = {peer: message(sum(count for _, count in runs)) for peer, runs in self._sends.items()}
        acc = self._local.attend(q, k, v, params)
        partials = []
        for peer, pending in queries.items():
            pending.wait()
            sends: list[tuple[int, Tensor]] = []
            if peer in incoming:
                num_rows, segments = self._recvs[peer]
                partial = backend.partial_attention(incoming[peer], k, v, segments, params)
                sends.append((peer, message(num_rows).pack(partial)))
            recvs = [(peer, answers[peer].data)] if peer in answers else []
            partials.append(comm.exchange(sends, recvs))
        for pending in partials:
            pending.wait()
        for peer, answer in answers.items():
            partial, row = answer.partial(), 0
            for first, count in self._sends[peer]:
                part = PartialAttention(partial.out[row : row + count], partial.lse[row : row + count])
                merge_rows_(acc, first, part)
                row += count
        return acc


def _gathered(rows: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """(first, count) runs of rows [T, H, D] behind each other; a view where they follow each other already."""
    first, last = runs[0][0], runs[-1][0] + runs[-1][1]
    if last - first == sum(count for _, count in runs):
        return rows[first:last]
    return torch.cat([rows[row : row + count] for row, count in runs])
