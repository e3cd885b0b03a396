"""KV groups of a model under vLLM: layers that share a block table and see alike.

Holds their division and their pools. Must not know requests, steps, or how vLLM chose its tables.
Read next: `longspan.integrations.vllm.rank_model`, which reads the layers; `longspan.kv.layout`.

Note [Tables and groups]
    vLLM has one block table per request and "KV cache group", and numbers the blocks of all tables together: block 7
    is memory for so many layers, and belongs to one table at a time. So the pools of several tables are one memory,
    layer by layer. A model of 2 full layers (f) and 4 with a window (w), as vLLM divides it:

        layers           f0 w1 w2 f3 w4 w5
        tables           (f0, f3)  (w1, w4)  (w2, w5)       3 groups, one per table
        first memory      f0        w1        w2
        second memory     f3        w4        w5

    Without vLLM's hybrid manager (`--disable-hybrid-kv-cache-manager`; vLLM's default for chunked attention) all layers
    share one table: then every kind of layer is a group of its own over that table, with memory of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longspan.kv.layout import KVGroup, KVSpec
from longspan.kv.pool import PagePool


@dataclass(frozen=True)
class LayerGroups:
    """KV groups of a model, and the block table that each reads."""

    groups: tuple[KVGroup, ...]
    tables: tuple[int, ...]
    """Index of vLLM's block table, per group."""

    @property
    def num_tables(self) -> int:
        """Block tables of a request."""
        return max(self.tables) + 1

    def table_spec(self, table: int) -> KVSpec | None:
        """Return what the layers of a table see, or None where they differ: then nothing falls out of all windows."""
        found = [group.spec for group, mine in zip(self.groups, self.tables, strict=True) if mine == table]
        return found[0] if len(found) == 1 else None

    def make_pools(self, num_pages: int, page_size: int, device: torch.device) -> list[PagePool]:
        """Make the pool of every group. See Note [Tables and groups].

        Args:
            num_pages: blocks of this rank.
            page_size: tokens per block.
            device: where the model lies.
        """
        if self.num_tables == 1:
            return [PagePool(group, num_pages, page_size, device) for group in self.groups]
        assert len(self.groups) == self.num_tables, "with several tables, the layers of each see alike"
        memory = PagePool(max(self.groups, key=lambda group: len(group.layers)), num_pages, page_size, device)
        return [PagePool(group, num_pages, page_size, device, memory=memory) for group in self.groups]


def divide_layers(specs: Sequence[KVSpec], num_query_heads: int, tables: Sequence[Sequence[int]]) -> LayerGroups:
    """Divide layers into KV groups.

    Args:
        specs: spec of every layer of the model.
        num_query_heads: query heads of a layer, in this process.
        tables: layers of each of vLLM's block tables.
    """
    groups: list[KVGroup] = []
    table_of: list[int] = []
    for table, layers in enumerate(tables):
        kinds: dict[KVSpec, list[int]] = {}
        for layer in sorted(layers):
            kinds.setdefault(specs[layer], []).append(layer)
        for spec, mine in kinds.items():
            groups.append(KVGroup(tuple(mine), spec, num_query_heads))
            table_of.append(table)
    return LayerGroups(tuple(groups), tuple(table_of))
