"""Attention of any step: any number of rows, every strategy, one launch after the other.

Holds the table of strategies, and the steps around them in a layer: store new keys and values before, merge attention
sinks after. Must not know models, schedulers or processes.
Read next: `longspan.cp.base`, the protocol of strategies; `longspan.worker.forward`, which calls this from a model.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
from longspan.cp.resolve import StoreRun, store_rows, store_runs
from longspan.kv.pool import PagePool
from longspan.plan.types import Plan
from longspan.sharding.pages import PageTable
from longspan.types import AttentionParams, Strategy

_STRATEGIES: Mapping[Strategy, Callable[[RankStep], MovementStrategy]] = {
    Strategy.LOCAL: Local,
    Strategy.GATHER_KV: GatherKV,
    Strategy.PASS_KV: PassKV,
    Strategy.PASS_Q: PassQ,
    Strategy.TREE: PassQ,
}

SCATTER_TOKENS = 16
"""Runs with fewer tokens than this on average are stored by one indexed copy; copying a run costs 5 us a layer."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Step data that the layers of one KV group share."""

    pool: PagePool
    strategy: MovementStrategy
    name: str
    stores: Sequence[StoreRun]
    scattered: Tensor | None
    """[T] int64 pool row of every new token if `is_scattered` holds, else None."""
    read_rows: Tensor | None = None
    """[n] int64 packed rows that the strategy runs for; None for all."""


class EagerStepAttention:
    """`StepAttention` that runs the plan's strategies."""

    def __init__(
        self,
        plan: Plan,
        tables: Sequence[Mapping[int, PageTable]],
        pools: Sequence[PagePool],
        comm: RecordingCommunicator,
        backend: AttentionBackend,
        layer_params: Sequence[AttentionParams | None],
    ) -> None:
        """Resolve the plan to rows.

        Args:
            plan: the step.
            tables: per KV group, the page table of every request in the plan, this step's pages included.
            pools: this rank's pool per KV group.
            comm: this rank's communicator.
            backend: this rank's kernels.
            layer_params: attention parameters of every layer, also on a rank that computes only for others; None in
                a layer without attention.
        """
        self.rank = comm.rank
        self.num_rows = sum(run.num_tokens for run in plan.query_runs if run.compute_rank == self.rank)
        self.read_rows: Tensor | None = None
        self.bytes_sent: Counter[str] = Counter()
        self._comm, self._layer_params = comm, layer_params
        self._parts: dict[int, _Part] = {}  # per layer
        last = len(layer_params) - 1
        for group_step, group_tables, pool in zip(plan.groups, tables, pools, strict=True):
            step = RankStep.of(comm, backend, pool.group, group_step, plan.query_runs, group_tables)
            stores = store_runs(step.local_query_rows(), step.pool_layout)
            scattered = _indices(store_rows(stores, self.num_rows), pool.device) if is_scattered(stores) else None
            part = _Part(pool, _STRATEGIES[group_step.strategy](step), group_step.strategy.value, stores, scattered)
            self._parts.update(dict.fromkeys(pool.group.layers, part))
            if plan.last_layer is not None and last in pool.group.layers:
                reading = RankStep.of(comm, backend, pool.group, plan.last_layer, plan.read_runs, group_tables)
                self.read_rows = _indices(_packed_rows(step, reading), pool.device)
                strategy = plan.last_layer.strategy
                self._parts[last] = replace(
                    part, strategy=_STRATEGIES[strategy](reading), name=strategy.value, read_rows=self.read_rows
                )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        """See `StepAttention.attend`."""
        part = self._parts[layer]
        if part.scattered is None:
            part.pool.write(layer, k, v, part.stores)
        else:
            part.pool.scatter(layer, k, v, part.scattered)
        read = part.read_rows
        partial = self._run_strategy(layer, q if read is None else q[read])
        if sinks is not None:
            merge_sinks_(partial, sinks)
        out = partial.out.to(q.dtype)
        if read is None:
            return out
        return q.new_zeros(q.shape[0], *out.shape[1:]).index_copy_(0, read, out)

    def join(self, layer: int) -> None:
        """See `StepAttention.join`."""
        pool = self._parts[layer].pool
        group, dtype = pool.group, getattr(torch, pool.group.spec.compute_dtype)
        q = torch.empty(0, group.num_query_heads, group.spec.q_width, dtype=dtype, device=pool.device)
        self._run_strategy(layer, q)

    def _run_strategy(self, layer: int, q: Tensor) -> PartialAttention:
        """Run one layer by its group's strategy, without sinks.

        Args:
            layer: layer of the model.
            q: [n, H, D] queries of this rank's rows that are read in the layer; n may be 0.

        Returns:
            One partial over all visible keys.

        Collective: like `attend`, which calls it.
        """
        part, before, params = self._parts[layer], self._comm.bytes_sent, self._layer_params[layer]
        assert params is not None, f"layer {layer} has no attention"
        partial = part.strategy.run_layer(q, part.pool.k[layer], part.pool.v[layer], params)
        self.bytes_sent[part.name] += self._comm.bytes_sent - before
        return partial


def is_scattered(stores: Sequence[StoreRun]) -> bool:
    """Whether new tokens are stored by one indexed copy, because their runs are many and short."""
    return len(stores) >= 4 and sum(run.num_tokens for run in stores) <= SCATTER_TOKENS * len(stores)


def _packed_rows(step: RankStep, reading: RankStep) -> list[int]:
    """Packed rows of `step` that `reading` keeps, in the order of `reading`."""
    first_row = {(request_id, start): row for (request_id, start, _), row in step.local_query_rows().items()}
    starts = sorted(first_row)
    rows: list[int] = []
    for request_id, start, end in reading.local_query_rows():
        run = starts[bisect_right(starts, (request_id, start)) - 1]
        row = first_row[run] + start - run[1]
        rows += range(row, row + end - start)
    return rows


def _indices(rows: Sequence[int], device: torch.device) -> Tensor:
    """Tensor [n] int64 of rows on the device."""
    return torch.tensor(rows, dtype=torch.long, device=device)
