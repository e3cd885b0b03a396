"""Persistent buffers of fixed steps: what a plan puts into them, and the messages.

Holds memory whose address never changes, and the copies into it. Must not know plans or launches.
Read next: `longspan.cp.fixed`, which fills and reads them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan.attention.staging import staged, to_device
from longspan.attention.tiles import Table, TileTables
from longspan.cp.wire import partial_views
from longspan.kv.pool import PagePool
from longspan.plan.fixed_shape import BUCKETS, FixedShape
from longspan.plan.message_format import PartialFormat, row_bytes
from longspan.triton_kernels.attention import tiling


class PlacedTiles(NamedTuple):
    """Tables of one rank's rows, and where these rows lie."""

    first_row: int
    """In the tensor of queries that the launch takes."""
    tables: TileTables
    """A tile of queries for every row."""


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
        self.key_tiles = [torch.zeros(most_key_tiles(pool), 4, dtype=torch.int32, device=device) for pool in pools]
        """Per KV group: [tiles, 4] of all these rows, in their order."""

    def put_tokens(self, token_ids: Sequence[int], positions: Sequence[int]) -> None:
        """Copy a step's tokens and their positions."""
        _put(self.token_ids, token_ids)
        _put(self.positions, positions)

    def put_stores(self, group_idx: int, rows: Sequence[int]) -> None:
        """Copy the pool rows of a step's tokens."""
        _put(self.stores[group_idx], rows)

    def put_tiles(self, group_idx: int, placed: Sequence[PlacedTiles]) -> Tensor:
        """Copy the tables of several ranks' rows behind each other.

        Returns:
            [tiles, 4] key tiles: this object's buffer, or another tensor where they have no room in it.
        """
        queries: list[Table] = []
        num_keys = 0
        for first_row, tables in placed:
            tiles = tables.query_tiles.copy()
            tiles[:, 0] += first_row
            tiles[:, 3:] += num_keys  # a, b, c, d
            queries.append(tiles)
            num_keys += len(tables.key_tiles)
        buffer = self.key_tiles[group_idx]
        if not placed:
            return buffer
        keys = np.concatenate([tables.key_tiles for _, tables in placed])
        _put(self.query_tiles[group_idx], np.concatenate(queries))
        if num_keys > len(buffer):
            return to_device(keys, buffer.device)
        _put(buffer, keys)
        return buffer


class FixedMessages:
    """One KV group's messages in steps of one shape on one rank."""

    def __init__(self, shape: FixedShape, group_idx: int, pool: PagePool, rank: int) -> None:
        """Allocate them.

        Args:
            shape: of the steps.
            group_idx: the KV group.
            pool: this rank's pool of it.
            rank: this one.
        """
        group, num_rows, has_rows = pool.group, shape.num_rows, rank in shape.homes
        participants = shape.participants[group_idx]
        others = [peer for peer in participants if peer != rank] if rank in participants else []
        self.owners = others if has_rows else []
        """All other participants: they get this rank's queries, and answer for the keys that they have, or for none."""
        self.other_homes = [peer for peer in others if peer in shape.homes]
        """Ranks of whose queries this one computes partials."""
        self.queries = torch.zeros(
            len(self.other_homes),
            num_rows,
            group.num_query_heads,
            group.spec.layout.k_width,
            dtype=getattr(torch, group.wire_dtype),
            device=pool.device,
        )
        """[other homes, rows, H, D] received."""
        form = PartialFormat.of(group)

        def partials(count: int) -> tuple[Tensor, Tensor, Tensor]:
            data = torch.zeros(count, num_rows * form.row_bytes, dtype=torch.uint8, device=pool.device)
            return data, *partial_views(data, form, count, num_rows)

        self.sent, self.sent_lse, self.sent_out = partials(len(self.other_homes))
        """[other homes, bytes] to them; what is in it: [other homes, rows, H] and [other homes, rows, H, Dv]."""
        self.home, self.home_lse, self.home_out = partials(1 + len(self.owners))
        """[1 + owners, bytes] this rank's own partial, then those of owners; what is in it, likewise."""
        self.layer_bytes = num_rows * (
            len(self.owners) * row_bytes("query", group) + len(self.other_homes) * row_bytes("partial", group)
        )
        """What this rank sends in one layer."""


def most_key_tiles(pool: PagePool) -> int:
    """Room for every page of a pool twice: requests may share some."""
    return 2 * (pool.num_rows // pool.page_size) * -(-pool.page_size // keys_per_tile(pool)) + BUCKETS[-1]


def keys_per_tile(pool: PagePool) -> int:
    """Most keys of a tile."""
    spec = pool.group.spec
    return tiling(max(spec.layout.k_width, spec.layout.v_width), getattr(torch, spec.compute_dtype)).keys


def _put(buffer: Tensor, values: Sequence[int] | Table) -> None:
    """Copy into the first rows of a buffer; no rank waits for it."""
    tensor = staged(np.asarray(values, dtype=np.int32), buffer.device)
    buffer[: len(tensor)].copy_(tensor, non_blocking=True)
