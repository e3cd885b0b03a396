"""Page pool: the memory of one rank and KV group.

Holds tensors and row copies. Must not know requests, page tables or free slots.
Read next: `longspan.cp.eager`, which writes and reads it.

Layout: `[num_kv_heads, rows, stored width]` per layer. A run of consecutive slots is then one view for each head, and
one kernel call reads it at the full memory bandwidth.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.kv.layout import KVComponent, KVGroup
from longspan.kv.stored import holds, round_rows


class PagePool:
    """KV of every layer of one KV group on one rank."""

    def __init__(
        self,
        group: KVGroup,
        num_pages: int,
        page_size: int,
        device: torch.device,
        *,
        memory: "PagePool | None" = None,
    ) -> None:
        """Make the tensors.

        Args:
            group: layers and layout.
            num_pages: pages of the pool.
            page_size: tokens per page.
            device: where the tensors lie.
            memory: pool of another group with the same layout and at least as many layers, whose tensors this pool
                uses, the first for its first layer and so on; a page may be in use in one of them at a time. None
                allocates.
        """
        layout = group.spec.layout
        self.group, self.page_size, self.num_rows = group, page_size, num_pages * page_size
        self.device = device
        if memory is None:
            self._stored = [self._component(component) for component in layout.components]
        else:
            assert layout == memory.group.spec.layout, "groups that share memory have one layout"
            assert len(group.layers) <= len(memory.group.layers), "a group has no more layers than its memory"
            assert self.num_rows == memory.num_rows, "groups that share memory have the same pages"
            self._stored = [dict(zip(group.layers, given.values(), strict=False)) for given in memory._stored]
        self.k = self._stored[0]
        """Keys by layer, [Hkv, rows, stored Dk] as `longspan.kv.stored` describes rows."""
        self.v = self._stored[1] if layout.v_width_in_k is None else self._starts_of_keys(layout.v_width)
        """Values by layer, [Hkv, rows, stored Dv]; views of `k` where values are a part of keys, [Hkv, rows, Dv]."""

    def _component(self, component: KVComponent) -> dict[int, Tensor]:
        """Tensors of one component by layer, [heads, rows, stored width]."""
        shape, dtype = (component.num_heads, self.num_rows, component.stored_width), holds(component)
        # empty, not zeros: the operating system gives memory on first touch, so an unused pool costs nothing
        return {layer: torch.empty(shape, dtype=dtype, device=self.device) for layer in self.group.layers}

    def _starts_of_keys(self, width: int) -> dict[int, Tensor]:
        """Views of the first `width` elements of every key by layer, [Hkv, rows, width]."""
        return {layer: keys[:, :, :width] for layer, keys in self.k.items()}

    def write(self, layer: int, k: Tensor, v: Tensor, stores: Sequence[tuple[int, int, int]]) -> None:
        """Store new tokens.

        Args:
            layer: layer of the model.
            k: [Hkv, T, Dk], keys of new tokens, in the dtype of computation.
            v: [Hkv, T, Dv], values of new tokens; not read where values are a part of keys.
            stores: (first token in k and v, first row in the pool, number of tokens).
        """
        for pool, new in self._rounded(layer, k, v):
            for token, row, count in stores:
                pool[:, row : row + count] = new[:, token : token + count]

    def scatter(self, layer: int, k: Tensor, v: Tensor, rows: Tensor) -> None:
        """Store new tokens of any number of requests in one call, each in a row of its own.

        Args:
            layer: layer of the model.
            k: [Hkv, T, Dk], keys of new tokens, in the dtype of computation.
            v: [Hkv, T, Dv], values of new tokens; not read where values are a part of keys.
            rows: [T] int64, each token's row in the pool.
        """
        for pool, new in self._rounded(layer, k, v):
            pool.index_copy_(1, rows, new)

    def _rounded(self, layer: int, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a layer's tensor and the new rows that it gets, as it stores them."""
        components = self.group.spec.layout.components
        new = (round_rows(rows, component) for rows, component in zip((k, v), components, strict=False))
        return [(pool[layer], rows) for pool, rows in zip(self._stored, new, strict=True)]

    def rows(self, slot: int, num_pages: int) -> list[Tensor]:
        """Views of whole pages, [Hkv, rows, stored width] of all components and layers, in one order on every rank."""
        part = slice(slot * self.page_size, (slot + num_pages) * self.page_size)
        return [tensor[:, part] for pool in self._stored for tensor in pool.values()]

    def by_slot(self) -> list[Tensor]:
        """Views of all rows, [Hkv, slots, page_size * stored width], of all components and layers in the order of
        `rows`."""
        return [
            tensor.view(tensor.shape[0], -1, self.page_size * tensor.shape[2])
            for pool in self._stored
            for tensor in pool.values()
        ]

    def copy_pages_(self, source_slot: int, target_slot: int, num_pages: int) -> None:
        """Copy whole pages within this pool, in every layer."""
        size = self.page_size
        source = slice(source_slot * size, (source_slot + num_pages) * size)
        target = slice(target_slot * size, (target_slot + num_pages) * size)
        for pool in self._stored:
            for tensor in pool.values():
                tensor[:, target] = tensor[:, source].clone()


def are_in_keys(v: Tensor, k: Tensor) -> bool:
    """Whether values [Hkv, S, Dv] are the first elements of keys [Hkv, S, D], in the same memory."""
    return v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and v.shape[2] <= k.shape[2] and v.dtype is k.dtype
