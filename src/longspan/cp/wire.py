"""Messages of partials as tensors.

Holds the views of a message, and the copies of partials into it and out of it. Must not know its sender or purpose.
Read next: `longspan.plan.message_format`, the layout of a message; `longspan.cp.pass_q`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.attention.partial import PartialAttention, merge_rows_
from longspan.plan.message_format import PartialFormat


def partial_views(data: Tensor, form: PartialFormat, *rows: int) -> tuple[Tensor, Tensor]:
    """Return views of the partials in messages.

    Args:
        data: [bytes] uint8 of one message, or [count, bytes] of several.
        form: format of the messages.
        rows: number of rows n of one message; or the number of messages, and n of each.

    Returns:
        `lse` [n, H] and `out` [n, H, Dv], or [count, n, H] and [count, n, H, Dv]: views of `data`.
    """
    num_rows, heads = rows[-1], form.num_heads
    sizes = (num_rows * form.lse_bytes, num_rows * (form.row_bytes - form.lse_bytes))
    lse, out = data.split_with_sizes(sizes, -1)
    return (
        lse.view(getattr(torch, form.lse_dtype)).view(*rows, heads),
        out.view(getattr(torch, form.out_dtype)).view(*rows, heads, form.v_width),
    )


class PartialMessage:
    """Message of partials."""

    def __init__(self, form: PartialFormat, num_rows: int, device: torch.device) -> None:
        self.data = torch.empty(num_rows * form.row_bytes, dtype=torch.uint8, device=device)
        """[bytes] uint8 content of the message."""
        self._lse, self._out = partial_views(self.data, form, num_rows)

    def pack(self, partial: PartialAttention) -> Tensor:
        """Fill the message from a partial; return its content."""
        self._out.copy_(partial.out)
        self._lse.copy_(partial.lse)
        return self.data

    def merge_into_(self, partials: Sequence[PartialAttention], runs: Sequence[tuple[int, int, int]]) -> None:
        """Merge the message's rows into partials.

        Args:
            partials: partials that are changed in place.
            runs: (index of the partial, first row in it, rows), in the order of the message.
        """
        row = 0
        for index, first, count in runs:
            part = PartialAttention(self._out[row : row + count], self._lse[row : row + count])
            merge_rows_(partials[index], first, part)
            row += count
