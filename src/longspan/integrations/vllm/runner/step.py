"""Attention of one step on one rank, in every layer: store, attend twice, send partials back, merge.

Holds the step's tensors on the device and the order of calls and messages. Must not know vLLM, requests, or which
kernels there are.
Read next: `longspan.integrations.vllm.runner.rows`, Note [Two calls].
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.integrations.vllm.runner.kernels import DeviceCall, Kernels
from longspan.integrations.vllm.runner.messages import RankMessages
from longspan.integrations.vllm.runner.rows import Call, RankRows
from longspan.types import AttentionParams

Upload = Callable[[NDArray[np.int64]], Tensor]
"""Copies an array to the device without waiting for it."""


class RankedStep:
    """What vLLM hands to every attention layer as the step's "attention metadata"."""

    def __init__(
        self, rows: RankRows, block_table: Tensor, block_size: int, messages: RankMessages, upload: Upload
    ) -> None:
        """Bring the step's numbers to the device, in one copy.

        Args:
            rows: this rank's part of the step.
            block_table: [requests, blocks] int32 on the device: this rank's blocks of every request, in sequence order.
            block_size: tokens per block.
            messages: exchanges with the other ranks.
            upload: copies to the device.
        """
        self._messages = messages
        self._num_rows, self._num_travelling = len(rows.slots), rows.num_travelling
        calls = (rows.own, rows.remote)
        numbers = [rows.slots, rows.travelling, rows.remote.empty_queries]
        numbers += [part for call in calls for part in (call.table_rows, call.query_starts, call.key_lens)]
        on_device = upload(np.concatenate(numbers, dtype=np.int64)).split_with_sizes([len(part) for part in numbers])
        self._slots, self._travelling, empty_queries = on_device[:3]
        self._unseen = empty_queries.bool().unsqueeze(-1)  # [P * M, 1]
        self._own = _on_device(rows.own, on_device[3:6], block_table, block_size, is_causal=True)
        self._remote = _on_device(rows.remote, on_device[6:9], block_table, block_size, is_causal=False)

    def attend(
        self, kernels: Kernels, params: AttentionParams, q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor, out: Tensor
    ) -> None:
        """Store this rank's rows and compute their attention over the keys of all ranks.

        Args:
            kernels: what computes on this device.
            params: scale and softcap of the layer.
            q: [T, H, D] after RoPE; rows beyond the step's are padding.
            k: [T, Hkv, D] after RoPE.
            v: [T, Hkv, Dv].
            kv_cache: the layer's KV memory.
            out: [T, H, Dv]: written; 0 in padding.

        Collective: every process of the group, layer by layer.
        """
        num_rows = self._num_rows
        out[num_rows:].zero_()
        if num_rows:
            kernels.store(k[:num_rows], v[:num_rows], kv_cache, self._slots)
        if not self._num_travelling:
            if num_rows:
                kernels.attend(q[:num_rows], kv_cache, self._own, params, out[:num_rows])
            return
        gathered, arrival = self._messages.gather(self._rows_to_send(q))  # while this rank attends to its own keys
        own_lse = kernels.attend(q[:num_rows], kv_cache, self._own, params, out[:num_rows]) if num_rows else None
        arrival.wait()
        parts, lses = self._answer(kernels, params, gathered, kv_cache, out)
        if own_lse is not None and len(self._travelling):
            self._merge(kernels, parts, lses, own_lse, out)

    def _rows_to_send(self, q: Tensor) -> Tensor:
        """Return the travelling rows [M, H, D]; what pads them may be anything."""
        rows = q.new_zeros((self._num_travelling, *q.shape[1:]))
        torch.index_select(q, 0, self._travelling, out=rows[: len(self._travelling)])
        return rows

    def _answer(
        self, kernels: Kernels, params: AttentionParams, gathered: Tensor, kv_cache: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend to this rank's keys for all ranks.

        Returns:
            `parts` [P, M, H, Dv] and `lses` [P, M, H] of this rank's own travelling rows, entry r over the keys of rank
            r; the rank's own entry is empty.
        """
        found = gathered.new_empty((gathered.shape[0], *out.shape[1:]))
        if self._remote.max_key_len:
            lse = kernels.attend(gathered, kv_cache, self._remote, params, found)
            lse = lse.masked_fill(self._unseen, -torch.inf)
        else:
            lse = torch.full(gathered.shape[:2], -torch.inf, dtype=torch.float32, device=gathered.device)
        by_rank = (self._messages.size, self._num_travelling)
        parts = self._messages.give_back(found.view(*by_rank, *found.shape[1:]))
        return parts, self._messages.give_back(lse.contiguous().view(*by_rank, -1))

    def _merge(self, kernels: Kernels, parts: Tensor, lses: Tensor, own_lse: Tensor, out: Tensor) -> None:
        """Merge what the ranks found for the travelling rows, own keys included, into `out`."""
        mine, num_rows = self._messages.rank, len(self._travelling)
        torch.index_select(out, 0, self._travelling, out=parts[mine, :num_rows])
        torch.index_select(own_lse, 0, self._travelling, out=lses[mine, :num_rows])
        merged = torch.empty_like(parts[mine])
        kernels.merge(parts, lses, merged)
        out.index_copy_(0, self._travelling, merged[:num_rows])


def exchanged_bytes(num_ranks: int, num_rows: int, row_bytes: int) -> int:
    """Return the most bytes that a step's exchanges hold on one rank, if all its rows lie on one rank and travel.

    Args:
        num_ranks: ranks of the group.
        num_rows: most rows of a step on all ranks together.
        row_bytes: bytes of one row of queries.
    """
    on_all_ranks = 3 * num_ranks  # gathered queries, partials sent, partials received
    merging = 4  # rows sent, own rows, merged rows, and log-sum-exps, which are smaller
    return (on_all_ranks + merging) * num_rows * row_bytes


def _on_device(
    call: Call, numbers: tuple[Tensor, ...], block_table: Tensor, block_size: int, is_causal: bool
) -> DeviceCall:
    """Return a call with its numbers and block table on the device."""
    table_rows, query_starts, key_lens = numbers
    num_blocks = -(-call.max_key_len // block_size)
    return DeviceCall(
        block_table=block_table[:, :num_blocks].index_select(0, table_rows),
        query_starts=query_starts.int(),
        key_lens=key_lens.int(),
        max_query_len=call.max_query_len,
        max_key_len=call.max_key_len,
        is_causal=is_causal,
    )
