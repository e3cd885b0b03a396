"""Attention of one step on one rank: write new KV, run the plan's strategies, merge sinks.

This is all that a host (our engine, vLLM) sees of context parallelism: `attend(layer, q, k, v)`. Holds the dispatch to
strategies. Must not know models, schedulers or processes.
Read next: `longspan.models.hook`, which calls it from Transformers models.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from longspan.attention.base import AttentionBackend
from longspan.attention.partial import PartialAttention, merge_sinks_
from longspan.comm.recording import RecordingCommunicator
from longspan.cp.base import MovementStrategy, RankStep
from longspan.cp.gather_kv import GatherKV
from longspan.cp.local import Local
from longspan.cp.pass_kv import PassKV
from longspan.cp.pass_q import PassQ
from longspan.errors import LongspanError
from longspan.kvcache.pool import PagePool
from longspan.plan.types import DirectExchange, Plan
from longspan.sharding.pages import PageTable
from longspan.types import AttentionParams, KVGroup, Strategy

_STRATEGIES: Mapping[Strategy, type[Local | GatherKV | PassKV | PassQ]] = {
    Strategy.LOCAL: Local,
    Strategy.GATHER_KV: GatherKV,
    Strategy.PASS_KV: PassKV,
    Strategy.PASS_Q: PassQ,
    Strategy.TREE: PassQ,
}

SCATTER_TOKENS = 16
"""Runs with fewer tokens than this on average are stored by one indexed copy; copying a run costs 5 us a layer."""


class StepAttention:
    """The attention of all layers in one step on one rank."""

    def __init__(
        self,
        plan: Plan,
        tables: Sequence[Mapping[int, PageTable]],
        pools: Sequence[PagePool],
        comm: RecordingCommunicator,
        backend: AttentionBackend,
        layer_params: Sequence[AttentionParams],
    ) -> None:
        """Resolve the plan to rows.

        Args:
            plan: the step.
            tables: per KV group, the page table of every request in the plan, this step's pages included.
            pools: this rank's pool per KV group.
            comm: this rank's communicator.
            backend: this rank's kernels.
            layer_params: per layer of the model; every rank needs them, also one that computes only for others.

        Raises:
            LongspanError: the plan asks for something that is not supported.
        """
        self.rank = comm.rank
        self._pools, self._layer_params = pools, layer_params
        self._group_of_layer = {layer: i for i, pool in enumerate(pools) for layer in pool.group.layers}
        self._comm = comm
        self.bytes_sent: Counter[str] = Counter()
        """Per strategy, in this step."""
        self._names = [group_step.strategy.value for group_step in plan.groups]
        self._strategies: list[MovementStrategy] = []
        self._stores: list[list[tuple[int, int, int]]] = []
        self._scattered: list[Tensor | None] = []  # pool row of every token, where stores are many and short
        for group_step, group_tables, pool in zip(plan.groups, tables, pools, strict=True):
            for exchange in group_step.exchanges:
                if isinstance(exchange, DirectExchange) and exchange.padded_rows is not None:
                    raise LongspanError(f"plan {plan.plan_id}: padded exchanges are not supported yet")
            step = RankStep(comm, backend, pool.group, group_step, plan.query_runs, group_tables)
            self._strategies.append(_STRATEGIES[group_step.strategy](step))
            self._stores.append(_store_runs(step))
            self._scattered.append(_scattered_rows(self._stores[-1], pool))
        self.num_tokens = sum(run.num_tokens for run in plan.query_runs if run.compute_rank == self.rank)
        """Tokens that this rank computes."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        """Attention of this rank's new tokens in one layer.

        Args:
            layer: layer of the model.
            q: [T, H, D] queries after RoPE, packed in plan order.
            k: [Hkv, T, D] keys after RoPE of the same tokens.
            v: [Hkv, T, Dv] values.
            sinks: [H] attention sinks, natural-log logits, or None.

        Returns:
            [T, H, Dv] in q's dtype.

        Collective: all ranks of the plan call it (or `join`) for every layer in ascending order.
        """
        group_idx = self._group_of_layer[layer]
        pool = self._pools[group_idx]
        rows = self._scattered[group_idx]
        if rows is None:
            pool.write(layer, k, v, self._stores[group_idx])
        else:
            pool.scatter(layer, k, v, rows)
        partial = self._attend(group_idx, layer, q)
        if sinks is not None:
            merge_sinks_(partial, sinks)
        return partial.out.to(q.dtype)

    def join(self, layer: int) -> None:
        """Take part in one layer's exchanges without a token of one's own. Collective: as `attend`."""
        group_idx = self._group_of_layer[layer]
        pool = self._pools[group_idx]
        group: KVGroup = pool.group
        q = torch.empty(
            0, group.num_query_heads, group.spec.k_width, dtype=pool.k[layer].dtype, device=pool.k[layer].device
        )
        self._attend(group_idx, layer, q)

    def _attend(self, group_idx: int, layer: int, q: Tensor) -> PartialAttention:
        """One layer by its group's strategy; counts what it sends."""
        pool = self._pools[group_idx]
        before = self._comm.bytes_sent
        partial = self._strategies[group_idx].attend(q, pool.k[layer], pool.v[layer], self._layer_params[layer])
        self.bytes_sent[self._names[group_idx]] += self._comm.bytes_sent - before
        return partial


def _store_runs(step: RankStep) -> list[tuple[int, int, int]]:
    """(first token of the packed rows, first row in the pool, tokens) of every new token of this rank."""
    stores: list[tuple[int, int, int]] = []
    for (request_id, start, end), token in step.local_query_rows().items():
        runs = step.pool_layout.key_runs(request_id, start, end)
        assert sum(run.num_tokens for run in runs) == end - start, "a token is computed by the rank that stores it"
        stores += [(token + run.position - start, run.row, run.num_tokens) for run in runs]
    return stores


def _scattered_rows(stores: Sequence[tuple[int, int, int]], pool: PagePool) -> Tensor | None:
    """[T] the pool row of every token, or None where copies of whole runs are cheaper."""
    num_tokens = sum(count for _, _, count in stores)
    if len(stores) < 4 or num_tokens > SCATTER_TOKENS * len(stores):
        return None
    rows = [0] * num_tokens
    for token, row, count in stores:
        rows[token : token + count] = range(row, row + count)
    return torch.tensor(rows, dtype=torch.long, device=pool.device)
