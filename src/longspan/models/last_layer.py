"""Restriction of the last layer to the rows whose output is read.

Holds the replacement of two modules' forward. Must not know attention, plans or ranks.
Read next: `longspan.plan.read_runs`, which rows are read; `longspan.worker.forward`, which passes the rows.

The last layer's output projection and MLP serve the row's own logits and nothing else, so they are not computed for a
prompt's inner tokens. Keys and values are computed for all rows.
"""

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

READ_ROWS = "longspan_read_rows"
"""Forward keyword argument: [n] int64 packed rows that are read, or None for all."""


class _CurrentRows(threading.local):
    """Rows that the layer's caller passed, for its modules; per thread, as ranks that are threads share the modules."""

    rows: Tensor | None = None


def skip_unread_rows_(model: nn.Module) -> int:
    """Let the last layer skip rows that `READ_ROWS` does not name; their output is 0.

    Returns:
        Number of changed modules; 0 if the last layer has no such parts.
    """
    base: Any = getattr(model, "model", None)
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not layers:
        return 0
    last: Any = layers[-1]
    projection = getattr(getattr(last, "self_attn", None), "o_proj", None)
    mlp = getattr(last, "mlp", None) or getattr(last, "feed_forward", None)  # two names for one thing
    if not isinstance(projection, nn.Module) or not isinstance(mlp, nn.Module):
        return 0
    current = _CurrentRows()

    def note_rows(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        current.rows = kwargs.get(READ_ROWS)

    last.register_forward_pre_hook(note_rows, with_kwargs=True)
    for module in (projection, mlp):
        module.forward = _of_read_rows(module.forward, current)
    return 2


def _of_read_rows(forward: Callable[[Tensor], Any], current: _CurrentRows) -> Callable[[Tensor], Any]:
    """Wrap a `forward` of [1, T, width]: rows that are read are computed, the others are 0."""

    def some_rows(hidden: Tensor) -> Any:
        rows = current.rows
        if rows is None:
            return forward(hidden)
        result = forward(hidden[:, rows])
        computed, *others = result if isinstance(result, tuple) else (result,)
        out = computed.new_zeros(1, hidden.shape[1], computed.shape[-1])
        out[:, rows] = computed
        return (out, *others) if others else out  # the router's scores of a mixture, which nothing reads

    return some_rows
