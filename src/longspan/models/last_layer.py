"""The last layer computes only rows that somebody reads.

Holds the replacement of two modules' forward. Must not know attention, plans or ranks.
Read next: `longspan.plan.read_runs`, which says who reads what; `longspan.worker.forward`, which passes the rows.

What comes behind the last layer's attention (its output projection and MLP) serves the row's own logits and nothing
else, so for a prompt's inner tokens it is not computed. Keys and values of all rows are.
"""

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

READ_ROWS = "longspan_read_rows"
"""Forward keyword argument: [n] int64 packed rows that are read, or None for all."""


class _CurrentRows(threading.local):
    """What the layer's caller passed, until its modules run. Ranks that are threads share the modules."""

    rows: Tensor | None = None


def skip_unread_rows_(model: nn.Module) -> int:
    """Let the last layer leave rows out that `READ_ROWS` does not name; their output is 0.

    Returns:
        How many modules do; 0 if the last layer has no such parts.
    """
    base: Any = getattr(model, "model", None)
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not layers:
        return 0
    last: Any = layers[-1]
    projection = getattr(getattr(last, "self_attn", None), "o_proj", None)
    mlp = getattr(last, "mlp", None)
    if not isinstance(projection, nn.Module) or not isinstance(mlp, nn.Module):
        return 0
    current = _CurrentRows()

    def note_rows(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        current.rows = kwargs.get(READ_ROWS)

    last.register_forward_pre_hook(note_rows, with_kwargs=True)
    for module in (projection, mlp):
        module.forward = _of_read_rows(module.forward, current)
    return 2


def _of_read_rows(forward: Callable[[Tensor], Tensor], current: _CurrentRows) -> Callable[[Tensor], Tensor]:
    """`forward` of [1, T, width], computed for the rows that are read, 0 for the others."""

    def some_rows(hidden: Tensor) -> Tensor:
        rows = current.rows
        if rows is None:
            return forward(hidden)
        computed = forward(hidden[:, rows])
        out = computed.new_zeros(1, hidden.shape[1], computed.shape[-1])
        out[:, rows] = computed
        return out

    return some_rows
