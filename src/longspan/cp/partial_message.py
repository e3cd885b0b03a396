"""Partials on the wire.

Holds the format of one message. Must not know who sends it, or why.
Read next: `longspan.cp.pass_q`.

`out` is rounded once to `KVGroup.partial_dtype`, `lse` keeps float32: the error is then flat in the number of ranks
(a partial that a leader merges is rounded twice, whatever their number).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.attention.partial import PartialAttention, merge_rows_
from longspan.kv.layout import KVGroup


class PartialMessage:
    """One message that holds `lse` [n, H] and `out` [n, H, Dv] in the wire's dtype."""

    def __init__(self, group: KVGroup, num_rows: int, device: torch.device) -> None:
        dtype: torch.dtype = getattr(torch, group.partial_dtype)
        lse_dtype = torch.float64 if dtype is torch.float64 else torch.float32
        num_heads, v_width = group.num_query_heads, group.spec.layout.v_width
        lse_bytes = num_rows * num_heads * lse_dtype.itemsize
        out_bytes = num_rows * num_heads * v_width * dtype.itemsize
        self.data = torch.empty(lse_bytes + out_bytes, dtype=torch.uint8, device=device)
        """[bytes] what travels."""
        self._lse = self.data[:lse_bytes].view(lse_dtype).view(num_rows, num_heads)  # first: `out` is aligned behind it
        self._out = self.data[lse_bytes:].view(dtype).view(num_rows, num_heads, v_width)

    def pack(self, partial: PartialAttention) -> Tensor:
        """Fill the message from a partial; returns what travels."""
        self._out.copy_(partial.out)
        self._lse.copy_(partial.lse)
        return self.data

    def merge_into_(self, partials: Sequence[PartialAttention], runs: Sequence[tuple[int, int, int]]) -> None:
        """Merge the message's rows into partials.

        Args:
            partials: changed in place.
            runs: (index of the partial, first row in it, rows), in the order of the message.
        """
        row = 0
        for index, first, count in runs:
            part = PartialAttention(self._out[row : row + count], self._lse[row : row + count])
            merge_rows_(partials[index], first, part)
            row += count
