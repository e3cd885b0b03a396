"""Attention of one step on one rank: write new KV, run the plan's strategies, merge sinks.

This is all that a host (our engine, vLLM) sees of context parallelism: `attend(layer, q, k, v)`. Holds the dispatch to
strategies. Must not know models, schedulers or processes.
Read next: `longspan.models.hook`, which calls it from Transformers models.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from longspan.kv.layout import KVGroup
from longspan.kv.pool import PagePool
from longspan.plan.read_runs import read_runs
from longspan.plan.types import Plan
from longspan.sharding.pages import PageTable
from longspan.types import AttentionParams, Strategy

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
        """
        self.rank = comm.rank
        self._pools, self._layer_params = pools, layer_params
        self._group_of_layer = {layer: i for i, pool in enumerate(pools) for layer in pool.group.layers}
        self._comm = comm
        self.bytes_sent: Counter[str] = Counter()
        """Per strategy, in this step."""
        self._last_layer = len(layer_params) - 1
        self._read: _ReadRows | None = None
        self._strategies: list[MovementStrategy] = []
        self._names: list[str] = []
        self._stores: list[list[tuple[int, int, int]]] = []
        self._scattered: list[Tensor | None] = []  # pool row of every token, where stores are many and short
        for group_step, group_tables, pool in zip(plan.groups, tables, pools, strict=True):
            step = RankStep(comm, backend, pool.group, group_step, plan.query_runs, group_tables)
            self._strategies.append(_STRATEGIES[group_step.strategy](step))
            self._names.append(group_step.strategy.value)
            self._stores.append(_store_runs(step))
            self._scattered.append(_scattered_rows(self._stores[-1], pool))
            if plan.last_layer is not None and self._last_layer in pool.group.layers:
                read = read_runs(plan.query_runs, plan.samples, plan.scores)
                reading = RankStep(comm, backend, pool.group, plan.last_layer, read, group_tables)
                rows = _read_rows(step, reading, pool.device)
                self._read = _ReadRows(_STRATEGIES[plan.last_layer.strategy](reading), plan.last_layer.strategy, rows)
        self.num_tokens = sum(run.num_tokens for run in plan.query_runs if run.compute_rank == self.rank)
        """Tokens that this rank computes."""
        self.read_rows = None if self._read is None else self._read.rows
        """[n] int64 packed rows of this rank that are read, or None for all; the last layer leaves the others out."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        """Attention of this rank's new tokens in one layer.

        Args:
            layer: layer of the model.
            q: [T, H, D] queries after RoPE, packed in plan order.
            k: [Hkv, T, D] keys after RoPE of the same tokens.
            v: [Hkv, T, Dv] values.
            sinks: [H] attention sinks, natural-log logits, or None.

        Returns:
            [T, H, Dv] in q's dtype; 0 in rows of the last layer that nobody reads.

        Collective: all ranks of the plan call it (or `join`) for every layer in ascending order.
        """
        group_idx = self._group_of_layer[layer]
        pool = self._pools[group_idx]
        rows = self._scattered[group_idx]
        if rows is None:
            pool.write(layer, k, v, self._stores[group_idx])
        else:
            pool.scatter(layer, k, v, rows)
        read = self._read_in(layer)
        partial = self._attend(group_idx, layer, q if read is None else q[read.rows])
        if sinks is not None:
            merge_sinks_(partial, sinks)
        out = partial.out.to(q.dtype)
        if read is None:
            return out
        return q.new_zeros(q.shape[0], *out.shape[1:]).index_copy_(0, read.rows, out)

    def join(self, layer: int) -> None:
        """Take part in one layer's exchanges without a token of one's own. Collective: as `attend`."""
        group_idx = self._group_of_layer[layer]
        pool = self._pools[group_idx]
        group: KVGroup = pool.group
        q = torch.empty(
            0, group.num_query_heads, group.spec.layout.k_width, dtype=pool.k[layer].dtype, device=pool.k[layer].device
        )
        self._attend(group_idx, layer, q)

    def _attend(self, group_idx: int, layer: int, q: Tensor) -> PartialAttention:
        """One layer by its group's strategy; counts what it sends."""
        pool = self._pools[group_idx]
        before = self._comm.bytes_sent
        read = self._read_in(layer)
        strategy = self._strategies[group_idx] if read is None else read.strategy
        partial = strategy.run_layer(q, pool.k[layer], pool.v[layer], self._layer_params[layer])
        name = self._names[group_idx] if read is None else read.name.value
        self.bytes_sent[name] += self._comm.bytes_sent - before
        return partial

    def _read_in(self, layer: int) -> "_ReadRows | None":
        """What is special about a layer: in the last one, attention is for the rows that are read."""
        return self._read if layer == self._last_layer else None


@dataclass(frozen=True, slots=True)
class _ReadRows:
    """The last layer, where not all rows are read."""

    strategy: MovementStrategy
    name: Strategy
    rows: Tensor
    """[n] int64, of this rank's packed rows."""


def _read_rows(step: RankStep, reading: RankStep, device: torch.device) -> Tensor:
    """[n] the packed rows of `step` that are the rows of `reading`, in its order."""
    first_row = {(request_id, start): row for (request_id, start, _), row in step.local_query_rows().items()}
    starts = sorted(first_row)
    rows: list[int] = []
    for request_id, start, end in reading.local_query_rows():
        run = starts[bisect_right(starts, (request_id, start)) - 1]
        row = first_row[run] + start - run[1]
        rows += range(row, row + end - start)
    return torch.tensor(rows, dtype=torch.long, device=device)


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
