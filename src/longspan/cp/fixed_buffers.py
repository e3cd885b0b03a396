"""Persistent buffers of fixed steps: for a plan's tables, and for messages.

Holds memory whose address never changes, and the copies into it. Must not know plans or launches.
Read next: `longspan.cp.fixed`, which fills and reads them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan.attention.staging import staged
from longspan.attention.tiles import Table, TileTables
from longspan.cp.wire import partial_views
from longspan.kv.pool import PagePool
from longspan.plan.fixed_shape import BUCKETS, MOST_SHARED, FixedShape
from longspan.plan.message_format import PartialFormat, row_bytes
from longspan.triton_kernels.attention import tiling
from longspan.triton_kernels.launch import shared_bytes


class PlacedTiles(NamedTuple):
    """Tables of one rank's rows, and where these rows lie."""

    first_row: int
    """First of these rows in the launch's tensor of queries."""
    tables: TileTables
    """Tables with one tile of queries for every row."""


class FixedInputs:
    """Buffers that steps of all shapes read on a rank, large enough for the largest shape."""

    def __init__(self, pools: Sequence[PagePool], num_ranks: int) -> None:
        """Allocate the buffers.

        Args:
            pools: this rank's pool of every KV group.
            num_ranks: ranks in the cp_group.
        """
        device, rows = pools[0].device, BUCKETS[-1]
        self.token_ids = torch.zeros(rows, dtype=torch.int32, device=device)
        """[rows] int32 input tokens."""
        self.positions = torch.zeros(rows, dtype=torch.int32, device=device)
        """[rows] int32 global positions."""
        self.stores = [torch.full((rows,), -1, dtype=torch.int32, device=device) for _ in pools]
        """[rows] int32 pool row of every token, or -1, per KV group."""
        self.query_tiles = [torch.zeros(num_ranks * rows, 7, dtype=torch.int32, device=device) for _ in pools]
        """[num_ranks * rows, 7] tiles of this rank's rows, then of other homes' rows in rank order, per KV group."""
        self.key_tiles = [
            torch.zeros(most_key_tiles(pool, num_ranks * rows), 4, dtype=torch.int32, device=device) for pool in pools
        ]
        """[tiles, 4] key tiles of all rows in `query_tiles`, in their order, per KV group."""

    def put_tokens(self, token_ids: Sequence[int], positions: Sequence[int]) -> None:
        """Copy a step's tokens and their positions."""
        _put(self.token_ids, token_ids)
        _put(self.positions, positions)

    def put_stores(self, group_idx: int, rows: Sequence[int]) -> None:
        """Copy the pool rows of a step's tokens."""
        _put(self.stores[group_idx], rows)

    def put_tiles(self, group_idx: int, placed: Sequence[PlacedTiles]) -> None:
        """Copy the tables of several ranks' rows one after the other. The plan knows that there is room."""
        queries: list[Table] = []
        num_keys = 0
        for first_row, tables in placed:
            tiles = tables.query_tiles.copy()
            tiles[:, 0] += first_row
            tiles[:, 3:] += num_keys  # a, b, c, d
            queries.append(tiles)
            num_keys += len(tables.key_tiles)
        if not placed:
            return
        keys = np.concatenate([tables.key_tiles for _, tables in placed])
        _put(self.query_tiles[group_idx], np.concatenate(queries))
        assert num_keys <= len(self.key_tiles[group_idx]), "a plan of fixed shape has too many key tiles"
        _put(self.key_tiles[group_idx], keys)


class FixedMessages:
    """Message buffers of one KV group on one rank, for steps of one shape."""

    def __init__(self, shape: FixedShape, group_idx: int, pool: PagePool, rank: int) -> None:
        """Allocate the buffers.

        Args:
            shape: shape of the steps.
            group_idx: index of the KV group.
            pool: this rank's pool of the KV group.
            rank: this rank.
        """
        group, num_rows, has_rows = pool.group, shape.num_rows, rank in shape.homes
        participants = shape.participants[group_idx]
        others = [peer for peer in participants if peer != rank] if rank in participants else []
        self.owners = others if has_rows else []
        """Other participants, all of which get this rank's queries and send partials back, empty ones if need be."""
        self.other_homes = [peer for peer in others if peer in shape.homes]
        """Ranks for whose queries this rank computes partials."""
        self.queries = torch.zeros(
            len(self.other_homes),
            num_rows,
            group.num_query_heads,
            group.spec.q_width,
            dtype=getattr(torch, group.wire_dtype),
            device=pool.device,
        )
        """[other homes, rows, H, D] queries received from other homes."""
        form = PartialFormat.of(group)

        def partials(count: int) -> tuple[Tensor, Tensor, Tensor]:
            data = torch.zeros(count, num_rows * form.row_bytes, dtype=torch.uint8, device=pool.device)
            return data, *partial_views(data, form, count, num_rows)

        self.sent, self.sent_lse, self.sent_out = partials(len(self.other_homes))
        """[other homes, bytes] messages to other homes; `sent_lse` [other homes, rows, H] and `sent_out` [other homes,
        rows, H, Dv] are views of them."""
        self.home, self.home_lse, self.home_out = partials(1 + len(self.owners))
        """[1 + owners, bytes] this rank's own partial, then messages from owners; `home_lse` [1 + owners, rows, H] and
        `home_out` [1 + owners, rows, H, Dv] are views of them."""
        self.layer_bytes = num_rows * (
            len(self.owners) * row_bytes("query", group) + len(self.other_homes) * row_bytes("partial", group)
        )
        """Bytes that this rank sends in one layer."""


def most_key_tiles(pool: PagePool, num_rows: int) -> int:
    """Key tiles that the buffer has room for: every page of the pool as often as plans may look at it (`MOST_SHARED`),
    and for every row a page that its window cuts.

    Args:
        pool: pool of the KV group.
        num_rows: most rows that look at it in a step.
    """
    tiles_per_page = -(-pool.page_size // keys_per_tile(pool))
    return (MOST_SHARED * (pool.num_rows // pool.page_size) + 2 * num_rows) * tiles_per_page


def keys_per_tile(pool: PagePool) -> int:
    """Most keys of a key tile."""
    spec = pool.group.spec
    dtype: torch.dtype = getattr(torch, spec.compute_dtype)
    return tiling(max(spec.layout.k_width, spec.layout.v_width), dtype, shared_bytes(pool.device)).keys


def _put(buffer: Tensor, values: Sequence[int] | Table) -> None:
    """Copy into the first rows of a buffer, asynchronously."""
    tensor = staged(np.asarray(values, dtype=np.int32), buffer.device)
    buffer[: len(tensor)].copy_(tensor, non_blocking=True)
