"""`local`: nothing moves, every key that a query sees is on its own rank.

Holds the strategy. Must not know other strategies.
Read next: `longspan.cp.gather_kv`.
"""

from torch import Tensor

from longspan.attention.partial import PartialAttention
from longspan.cp.base import RankStep
from longspan.cp.resolve import resolve
from longspan.types import AttentionParams


class Local:
    """Attention of this rank's queries over this rank's keys; also the first part of every other strategy."""

    def __init__(self, step: RankStep) -> None:
        rank = step.rank
        own = [s for s in step.segments if s.query_rank == rank and s.key_rank == rank]
        self._backend = step.backend
        self._segments = resolve(own, step.local_query_rows(), step.pool_layout, step.group.spec.window)

    def run_layer(self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> PartialAttention:
        return self._backend.partial_attention(q, k, v, self._segments, params)
