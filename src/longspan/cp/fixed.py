"""Attention of a decode step in fixed shapes, so that a CUDA graph can repeat it.

Holds the way of a plan into persistent buffers, and the launches that read only these. Must not know models or
graphs. Runs on the `triton` backend's kernels alone.
Read next: `longspan.plan.fixed_shape`, Note [Fixed shapes]; `longspan.worker.graphs`, which captures steps;
`longspan.cp.pass_q`, the same exchanges without padding.

Attention reads tile tables in buffers (Note [Tables] in `longspan.triton_kernels.attention`): tables change with the
plan, addresses and grids do not.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from longspan.attention.latent import LatentParams
from longspan.attention.partial import PartialAttention
from longspan.attention.tiles import tile_tables
from longspan.attention.triton import MAX_SPLITS, WAVES, num_processors, power_of_two
from longspan.comm.base import Communicator
from longspan.cp.base import check_participants
from longspan.cp.fixed_buffers import FixedInputs, FixedMessages, PlacedTiles, keys_per_tile
from longspan.cp.resolve import PoolLayout, query_rows, resolve, store_rows, store_runs
from longspan.kv.pool import PagePool
from longspan.plan.fixed_shape import FixedShape
from longspan.plan.segments import make_segments
from longspan.plan.types import Plan, Range, Segment
from longspan.sharding.pages import PageTable
from longspan.triton_kernels.attention import attention, head_tiles, tiling
from longspan.triton_kernels.launch import shared_bytes
from longspan.triton_kernels.merge import merge
from longspan.triton_kernels.store import store
from longspan.types import AttentionParams

MIN_FIXED_SPLITS = 4
"""Fewest splits, even where rows alone fill the GPU: one row may have a long context and the others short ones."""


class FixedStepAttention:
    """`StepAttention` of all steps of one shape, one after the other: `fill` begins each."""

    def __init__(
        self,
        shape: FixedShape,
        inputs: FixedInputs,
        pools: Sequence[PagePool],
        comm: Communicator,
        layer_params: Sequence[AttentionParams | None],
    ) -> None:
        """Allocate messages.

        Args:
            shape: shape of the steps.
            inputs: this rank's buffers, shared by all shapes.
            pools: this rank's pool of every KV group.
            comm: this rank's communicator.
            layer_params: attention parameters of every layer.
        """
        self.shape, self.rank = shape, comm.rank
        self.num_rows = shape.num_rows if comm.rank in shape.homes else 0
        self.read_rows: Tensor | None = None
        self.bytes_sent: Counter[str] = Counter()
        self._inputs, self._pools, self._comm, self._layer_params = inputs, pools, comm, layer_params
        self._group_of_layer = {layer: i for i, pool in enumerate(pools) for layer in pool.group.layers}
        self._messages = [FixedMessages(shape, i, pool, comm.rank) for i, pool in enumerate(pools)]

    def fill(self, plan: Plan, tables: Sequence[Mapping[int, PageTable]], token_ids: Sequence[int]) -> None:
        """Put a plan into the buffers.

        Args:
            plan: a plan of this shape.
            tables: per KV group, the page table of every request in the plan.
            token_ids: input tokens of this rank's rows.
        """
        rows_of = {home: query_rows(plan.query_runs, home) for home in {self.rank, *self.shape.homes}}
        own = rows_of[self.rank]
        assert len(own) == len(token_ids) <= self.shape.num_rows
        fillers = [0] * (self.shape.num_rows - len(own))
        self._inputs.put_tokens([*token_ids, *fillers], [*(position for _, position, _ in own), *fillers])
        self.bytes_sent = Counter()
        for i, (step, pool, messages) in enumerate(zip(plan.groups, self._pools, self._messages, strict=True)):
            layout = PoolLayout(tables[i], self.rank)
            self._inputs.put_stores(i, store_rows(store_runs(own, layout), self.shape.num_rows))
            spec = pool.group.spec
            segments = make_segments(plan.query_runs, tables[i], spec.window, spec.chunk, self.rank)
            check_participants(step, segments)
            placed = [] if not self.num_rows else [self._tiles(segments, i, self.rank, own, layout, 0)]
            for j, home in enumerate(messages.other_homes):  # the other homes' rows are one tensor
                placed.append(self._tiles(segments, i, home, rows_of[home], layout, j * self.shape.num_rows))
            self._inputs.put_tiles(i, placed)
            self.bytes_sent[step.strategy.value] += len(pool.group.layers) * messages.layer_bytes

    def _tiles(
        self,
        segments: Sequence[Segment],
        group_idx: int,
        home: int,
        rows: Mapping[Range, int],
        layout: PoolLayout,
        first_row: int,
    ) -> PlacedTiles:
        """Tables of the keys on this rank that one home's rows see, with a tile of queries for every row."""
        pool = self._pools[group_idx]
        window = pool.group.spec.window
        seen = [s for s in segments if s.query_rank == home and s.key_rank == self.rank]
        found = tile_tables(
            resolve(seen, rows, layout, window),
            self.shape.num_rows,
            queries_per_tile=1,
            keys_per_tile=keys_per_tile(pool),
            window=window,
        )
        return PlacedTiles(first_row, found)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        """See `StepAttention.attend`.

        Collective: two exchanges between the layer's participants, as `shape` names them.
        """
        group_idx = self._group_of_layer[layer]
        pool, messages = self._pools[group_idx], self._messages[group_idx]
        store(pool.k[layer], pool.v[layer], k, v, self._inputs.stores[group_idx][: self.shape.num_rows])
        out = torch.empty(*q.shape[:2], pool.group.spec.out_width, dtype=q.dtype, device=q.device)
        lse = torch.empty(*q.shape[:2], dtype=torch.float32, device=q.device)
        if not messages.owners:
            self._attend_keys(layer, q, out, lse, sinks)
            return out
        q = q.contiguous()
        pending = self._comm.exchange(
            [(owner, q) for owner in messages.owners],
            [(home, messages.queries[i]) for i, home in enumerate(messages.other_homes)],
        )
        self._attend_keys(layer, q, messages.home_out[0], messages.home_lse[0])
        pending.wait()
        self._answer(layer)
        merge(messages.home_out, messages.home_lse, out, lse, sinks)
        return out

    def join(self, layer: int) -> None:
        """See `StepAttention.join`."""
        messages = self._messages[self._group_of_layer[layer]]
        if not messages.other_homes:
            return
        self._comm.exchange([], [(home, messages.queries[i]) for i, home in enumerate(messages.other_homes)]).wait()
        self._answer(layer)

    def _answer(self, layer: int) -> None:
        """Send partials of other homes' queries to these homes, and receive those of this rank's queries."""
        messages = self._messages[self._group_of_layer[layer]]
        if messages.other_homes:
            queries = messages.queries.flatten(0, 1)  # [homes * rows, H, D]
            self._attend_keys(layer, queries, messages.sent_out, messages.sent_lse, is_remote=True)
        self._comm.exchange(
            [(home, messages.sent[i]) for i, home in enumerate(messages.other_homes)],
            [(owner, messages.home[1 + i]) for i, owner in enumerate(messages.owners)],
        ).wait()

    def _attend_keys(
        self, layer: int, q: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None = None, *, is_remote: bool = False
    ) -> None:
        """Compute the partial of this rank's keys.

        Args:
            layer: layer of the model.
            q: [T, H, D] queries of the layer.
            out: [T, H, Dout], or [homes, T / homes, H, Dout] whose homes may lie apart: written.
            lse: [T, H], or [homes, T / homes, H], float32: written.
            sinks: [H] attention sinks, merged into every row, or None.
            is_remote: whether the queries are other homes'.
        """
        params = self._layer_params[layer]
        if not isinstance(params, LatentParams):
            merge(*self._split_partials(layer, q, is_remote=is_remote), out, lse, sinks)
            return
        outs, lses = self._split_partials(layer, params.weights.absorb(q), is_remote=is_remote)
        over_latents = torch.empty(*lse.shape, outs.shape[-1], dtype=outs.dtype, device=outs.device)
        merge(outs, lses, over_latents, lse, sinks)  # rows in the groups of `lse`
        projected = params.weights.project(PartialAttention(over_latents.flatten(0, -3), lse)).out  # [T, H, Dout]
        out.copy_(projected.view(out.shape))

    def _split_partials(self, layer: int, q: Tensor, *, is_remote: bool) -> tuple[Tensor, Tensor]:
        """Compute every split's partial: [splits, T, H, Dv] and [splits, T, H]."""
        group_idx, params = self._group_of_layer[layer], self._layer_params[layer]
        assert params is not None, f"layer {layer} has no attention"
        pool = self._pools[group_idx]
        layout = pool.group.spec.layout
        first = self.num_rows if is_remote else 0
        sizes = tiling(max(layout.k_width, layout.v_width), q.dtype, shared_bytes(pool.device))
        head_programs = layout.num_kv_heads * head_tiles(q.shape[1] // layout.num_kv_heads, sizes.most_rows)
        splits = fixed_splits(q.shape[0] * head_programs, num_processors(pool.device))
        outs = torch.empty(splits, *q.shape[:2], layout.v_width, dtype=torch.float32, device=q.device)
        lses = torch.empty(splits, *q.shape[:2], dtype=torch.float32, device=q.device)
        attention(
            q,
            pool.k[layer],
            pool.v[layer],
            self._inputs.query_tiles[group_idx][first : first + q.shape[0]],
            self._inputs.key_tiles[group_idx],
            outs,
            lses,
            queries_per_tile=1,
            scale=params.scale,
            softcap=params.softcap,
            window=params.window,
        )
        return outs, lses


def fixed_splits(programs: int, processors: int) -> int:
    """Number of splits of every row's keys, however many keys there are.

    Args:
        programs: programs of a launch without splits.
        processors: multiprocessors of the GPU.
    """
    return power_of_two(max(MIN_FIXED_SPLITS, min(MAX_SPLITS, WAVES * processors // programs)))
