"""Attention of a decode step in fixed shapes, so that a CUDA graph can repeat it.

Holds persistent buffers, what a plan puts into them, and the launches that read nothing else. Must not know models or
graphs. Runs on the `triton` backend's kernels alone.
Read next: `longspan.worker.graphs`, which captures steps; `longspan.cp.pass_q`, the same without padding.

Note [Fixed shapes]
    Every rank of a plan makes the same `FixedShape` of it, or all make none: it depends on the plan alone. Rows are
    padded to a bucket on all ranks, so messages have the same sizes whoever has how many requests. A row that only
    fills up is token 0 at position 0, sees no key, is stored nowhere and sampled by nobody.

    Three ranks decode two requests of rank 1, whose keys lie on all three, and none of rank 0 and 2: `homes` is (1,),
    `num_rows` 2. In every layer

        rank 1            sends 2 queries to 0 and 2, computes its own partial meanwhile, gets 2 from each, merges
        ranks 0 and 2     get 2 queries, compute, send 2 partials; they do not run the model

    Attention reads tile tables in buffers (Note [Tables] in `longspan.triton_kernels.attention`): tables change with
    the plan, addresses and grids do not.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan.attention.base import RowSegment
from longspan.attention.staging import staged, to_device
from longspan.attention.tiles import TileTables, tile_tables
from longspan.attention.triton import MAX_SPLITS, WAVES, num_processors, power_of_two
from longspan.comm.base import Communicator
from longspan.cp.resolve import PoolLayout, resolve
from longspan.cp.wire import partial_views
from longspan.kv.pool import PagePool
from longspan.plan.message_format import PartialFormat, row_bytes
from longspan.plan.types import Plan, Range
from longspan.sharding.pages import PageTable
from longspan.triton_kernels.attention import attention, tiling
from longspan.triton_kernels.merge import merge
from longspan.triton_kernels.store import store
from longspan.types import AttentionParams, Phase, Strategy

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows of one rank; a step with more is not fixed."""


MIN_FIXED_SPLITS = 4
"""Even where rows alone fill the GPU: one of them may be a long context beside short ones."""


class FixedShape(NamedTuple):
    """What the buffers and launches of a step depend on."""

    num_rows: int
    """Of every rank that has any; a bucket."""
    homes: tuple[int, ...]
    """Ranks that have rows."""
    participants: tuple[tuple[int, ...], ...]
    """Per KV group, the ranks between which queries and partials move; none where all keys are at home."""


def fixed_shape(plan: Plan) -> FixedShape | None:
    """The shape of a decode step, or None for a step that is not fixed. See Note [Fixed shapes]."""
    if plan.phase is not Phase.DECODE or plan.scores or plan.last_layer is not None or not plan.query_runs:
        return None
    rows: dict[int, int] = {}
    for run in plan.query_runs:
        if run.num_tokens != 1:
            return None
        rows[run.compute_rank] = rows.get(run.compute_rank, 0) + 1
    participants: list[tuple[int, ...]] = []
    for step in plan.groups:
        if step.strategy is Strategy.LOCAL:
            participants.append(())
        elif step.strategy is Strategy.PASS_Q or (step.strategy is Strategy.TREE and len(step.nodes) == 1):
            participants.append(tuple(sorted(rank for node in step.nodes for rank in node)))
        else:
            return None
    most = max(rows.values())
    bucket = next((bucket for bucket in BUCKETS if bucket >= most), None)
    return None if bucket is None else FixedShape(bucket, tuple(sorted(rows)), tuple(participants))


class FixedInputs:
    """Buffers that every step of a rank reads, whatever its shape; large enough for the largest."""

    def __init__(self, pools: Sequence[PagePool], num_ranks: int) -> None:
        """Allocate them.

        Args:
            pools: this rank's, per KV group.
            num_ranks: of the cp_group.
        """
        device, rows = pools[0].device, BUCKETS[-1]
        self.token_ids = torch.zeros(rows, dtype=torch.int32, device=device)
        """[rows]"""
        self.positions = torch.zeros(rows, dtype=torch.int32, device=device)
        """[rows], global."""
        self.stores = [torch.full((rows,), -1, dtype=torch.int32, device=device) for _ in pools]
        """Per KV group: [rows] pool row of every token, or -1."""
        self.query_tiles = [torch.zeros(num_ranks * rows, 7, dtype=torch.int32, device=device) for _ in pools]
        """Per KV group: [num_ranks * rows, 7] this rank's rows, then those of other homes in rank order."""
        self.key_tiles = [torch.zeros(_most_key_tiles(pool), 4, dtype=torch.int32, device=device) for pool in pools]
        """Per KV group: [tiles, 4] of all these rows, in their order."""


def _most_key_tiles(pool: PagePool) -> int:
    """Room for every page of a pool twice: requests may share some."""
    sizes = _tile_keys(pool)
    return 2 * (pool.num_rows // pool.page_size) * -(-pool.page_size // sizes) + BUCKETS[-1]


def _tile_keys(pool: PagePool) -> int:
    spec = pool.group.spec
    return tiling(max(spec.layout.k_width, spec.layout.v_width), getattr(torch, spec.compute_dtype)).keys


class FixedAttention:
    """One shape's buffers and launches on one rank."""

    def __init__(
        self,
        shape: FixedShape,
        inputs: FixedInputs,
        pools: Sequence[PagePool],
        comm: Communicator,
        layer_params: Sequence[AttentionParams],
    ) -> None:
        """Allocate messages and partials.

        Args:
            shape: of the steps.
            inputs: this rank's buffers, shared by all shapes.
            pools: this rank's, per KV group.
            comm: this rank's communicator.
            layer_params: per layer of the model.
        """
        self.shape, self.rank = shape, comm.rank
        self.has_rows = comm.rank in shape.homes
        self._inputs, self._pools, self._comm, self._layer_params = inputs, pools, comm, layer_params
        self._group_of_layer = {layer: i for i, pool in enumerate(pools) for layer in pool.group.layers}
        self._parts = [_GroupBuffers(shape, i, pool, comm.rank, self.has_rows) for i, pool in enumerate(pools)]

    def fill(self, plan: Plan, tables: Sequence[Mapping[int, PageTable]], token_ids: Sequence[int]) -> bool:
        """Put a plan into the buffers.

        Args:
            plan: of this shape.
            tables: per KV group, the page table of every request in the plan.
            token_ids: of this rank's rows.

        Returns:
            Whether the buffers are those of a captured graph; False where key tiles had no room in them, so that this
            step reads others.
        """
        runs = [run for run in plan.query_runs if run.compute_rank == self.rank]
        assert len(runs) == len(token_ids) <= self.shape.num_rows
        num_rows, inputs = self.shape.num_rows, self._inputs
        _put(inputs.token_ids, [*token_ids, *[0] * (num_rows - len(runs))])
        _put(inputs.positions, [*(run.position for run in runs), *[0] * (num_rows - len(runs))])
        is_graphs = True
        for i, (step, pool, part) in enumerate(zip(plan.groups, self._pools, self._parts, strict=True)):
            layout = PoolLayout(tables[i], self.rank)
            stores = [-1] * num_rows
            for row, run in enumerate(runs):
                (keys,) = layout.key_runs(run.request_id, run.position, run.end)
                stores[row] = keys.row
            _put(inputs.stores[i], stores)
            tiles: list[TileTables] = []
            for home in ([self.rank] if self.has_rows else []) + part.peers_homes:
                rows: dict[Range, int] = {}
                for run in plan.query_runs:
                    if run.compute_rank == home:
                        rows[run.request_id, run.position, run.end] = len(rows)
                seen = [s for s in step.segments if s.query_rank == home and s.key_rank == self.rank]
                found = resolve(seen, rows, layout, pool.group.spec.window)
                tiles.append(self._tables(found, pool))
            is_graphs &= self._put_tables(i, tiles)
        return is_graphs

    def _tables(self, segments: Sequence[RowSegment], pool: PagePool) -> TileTables:
        """Tables of one rank's rows: a tile for each."""
        return tile_tables(
            segments,
            self.shape.num_rows,
            queries_per_tile=1,
            keys_per_tile=_tile_keys(pool),
            window=pool.group.spec.window,
        )

    def _put_tables(self, group_idx: int, tables: Sequence[TileTables]) -> bool:
        """Copy tables of several ranks' rows behind each other; returns whether they have room."""
        if not tables:
            return True
        num_rows, inputs, part = self.shape.num_rows, self._inputs, self._parts[group_idx]
        queries, num_keys = [], 0
        for i, table in enumerate(tables):
            tiles = table.query_tiles.copy()
            tiles[:, 3:] += num_keys  # a, b, c, d
            is_remote = i - self.has_rows
            if is_remote > 0:
                tiles[:, 0] += is_remote * num_rows  # the remote rows are one tensor
            queries.append(tiles)
            num_keys += len(table.key_tiles)
        keys = np.concatenate([table.key_tiles for table in tables])
        _put(inputs.query_tiles[group_idx], np.concatenate(queries))
        part.key_tiles = inputs.key_tiles[group_idx]
        if num_keys > len(part.key_tiles):
            part.key_tiles = to_device(keys, part.key_tiles.device)
            return False
        _put(part.key_tiles, keys)
        return True

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        """Attention of this rank's rows in one layer.

        Args:
            layer: layer of the model.
            q: [num_rows, H, D] after RoPE.
            k: [Hkv, num_rows, D] after RoPE.
            v: [Hkv, num_rows, Dv].
            sinks: [H] natural-log logits, or None.

        Returns:
            [num_rows, H, Dv] in q's dtype.

        Collective: the layer's participants, as `shape` names them, all call this or `join`, in ascending order of
        layers. Two exchanges; `layer_bytes` sent by this rank.
        """
        group_idx = self._group_of_layer[layer]
        pool, part = self._pools[group_idx], self._parts[group_idx]
        store(pool.k[layer], pool.v[layer], k, v, self._inputs.stores[group_idx][: self.shape.num_rows])
        out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
        lse = torch.empty(*q.shape[:2], dtype=torch.float32, device=q.device)
        if not part.owners:
            merge(*self._attend(layer, group_idx, q, is_remote=False), out, lse, sinks)
            return out
        q = q.contiguous()
        pending = self._comm.exchange(
            [(owner, q) for owner in part.owners],
            [(home, part.queries[i]) for i, home in enumerate(part.peers_homes)],
        )
        merge(*self._attend(layer, group_idx, q, is_remote=False), part.home_out[0], part.home_lse[0])
        pending.wait()
        self._answer(layer, group_idx, q)
        merge(part.home_out, part.home_lse, out, lse, sinks)
        return out

    def layer_bytes(self, group_idx: int) -> int:
        """What this rank sends in one layer of a group."""
        part = self._parts[group_idx]
        query_bytes = self.shape.num_rows * row_bytes("query", self._pools[group_idx].group)
        return len(part.owners) * query_bytes + part.sent.numel()

    def join(self, layer: int) -> None:
        """Answer other ranks' queries in one layer, on a rank without rows. Collective: as `attend`."""
        group_idx = self._group_of_layer[layer]
        part = self._parts[group_idx]
        if not part.peers_homes:
            return
        self._comm.exchange([], [(home, part.queries[i]) for i, home in enumerate(part.peers_homes)]).wait()
        self._answer(layer, group_idx, part.queries[0])

    def _answer(self, layer: int, group_idx: int, like: Tensor) -> None:
        """Partials of other homes' queries to them, and those of this rank's queries home."""
        part = self._parts[group_idx]
        if part.peers_homes:
            queries = part.queries.flatten(0, 1)  # [homes * rows, H, D]
            merge(*self._attend(layer, group_idx, queries, is_remote=True), part.sent_out, part.sent_lse)
        self._comm.exchange(
            [(home, part.sent[i]) for i, home in enumerate(part.peers_homes)],
            [(owner, part.home[1 + i]) for i, owner in enumerate(part.owners)],
        ).wait()

    def _attend(self, layer: int, group_idx: int, q: Tensor, *, is_remote: bool) -> tuple[Tensor, Tensor]:
        """Every split's partial: [splits, T, H, Dv] and [splits, T, H]."""
        pool, part, params = self._pools[group_idx], self._parts[group_idx], self._layer_params[layer]
        num_rows, group = self.shape.num_rows, pool.group
        first = num_rows if is_remote and self.has_rows else 0
        tiles = self._inputs.query_tiles[group_idx][first : first + q.shape[0]]
        splits = fixed_splits(q.shape[0] * group.spec.layout.num_kv_heads, num_processors(pool.device))
        outs = torch.empty(splits, *q.shape[:2], group.spec.layout.v_width, dtype=torch.float32, device=q.device)
        lses = torch.empty(splits, *q.shape[:2], dtype=torch.float32, device=q.device)
        attention(
            q,
            pool.k[layer],
            pool.v[layer],
            tiles,
            part.key_tiles,
            outs,
            lses,
            queries_per_tile=1,
            scale=params.scale,
            softcap=params.softcap,
            window=params.window,
        )
        return outs, lses


def fixed_splits(programs: int, processors: int) -> int:
    """Splits of every row's keys, however many there are. Args: `programs` without splits."""
    return power_of_two(max(MIN_FIXED_SPLITS, min(MAX_SPLITS, WAVES * processors // programs)))


class _GroupBuffers:
    """Messages of one KV group."""

    def __init__(self, shape: FixedShape, group_idx: int, pool: PagePool, rank: int, has_rows: bool) -> None:
        layout, num_heads, num_rows = pool.group.spec.layout, pool.group.num_query_heads, shape.num_rows
        participants = shape.participants[group_idx]
        others = [peer for peer in participants if peer != rank] if rank in participants else []
        self.owners = others if has_rows else []
        """All other participants: they get this rank's queries, and answer for the keys that they have, or for none."""
        self.peers_homes = [peer for peer in others if peer in shape.homes]
        """Ranks of whose queries this one computes partials."""
        form = PartialFormat.of(pool.group)
        dtype: torch.dtype = getattr(torch, pool.group.wire_dtype)
        self.key_tiles = torch.zeros(1, 4, dtype=torch.int32, device=pool.device)
        self.queries = torch.zeros(
            len(self.peers_homes), num_rows, num_heads, layout.k_width, dtype=dtype, device=pool.device
        )
        """[other homes, rows, H, D] received."""

        def messages(count: int) -> tuple[Tensor, Tensor, Tensor]:
            """[count, bytes] messages, and what is in them: lse [count, rows, H] and out [count, rows, H, Dv]."""
            data = torch.zeros(count, num_rows * form.row_bytes, dtype=torch.uint8, device=pool.device)
            return data, *partial_views(data, form, count, num_rows)

        self.sent, self.sent_lse, self.sent_out = messages(len(self.peers_homes))
        """To other homes: [other homes, bytes]."""
        self.home, self.home_lse, self.home_out = messages(1 + len(self.owners))
        """This rank's own partial, then those of owners: [1 + owners, bytes]."""


def _put(buffer: Tensor, values: Sequence[int] | np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> None:
    """Copy into the first rows of a buffer; nobody waits for it."""
    tensor = staged(np.asarray(values, dtype=np.int32), buffer.device)
    buffer[: len(tensor)].copy_(tensor, non_blocking=True)
