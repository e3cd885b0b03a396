"""Restriction of the last layer to the rows whose output is read.

Holds the replacement of two modules' forward. Must not know attention, plans or ranks.
Read next: `longspan.plan.read_runs`, which rows are read; `longspan.worker.forward`, which passes the rows.

The last layer's output projection and MLP serve the row's own logits and nothing else, so they are not computed for a
prompt's inner tokens. Keys and values are computed for all rows.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
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
    in_width: int | None = getattr(projection, "in_features", None)
    hidden_width: int | None = getattr(getattr(model, "config", None), "hidden_size", None)
    if in_width is None or hidden_width is None:
        return 0
    current = _CurrentRows()

    def note_rows(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        current.rows = kwargs.get(READ_ROWS)

    last.register_forward_pre_hook(note_rows, with_kwargs=True)
    embedding: Tensor = base.embed_tokens.weight
    for module, width in ((projection, in_width), (mlp, hidden_width)):
        with torch.inference_mode():
            row = module(embedding.new_zeros(1, 1, width))
        module.forward = _of_read_rows(module.forward, current, row)
    return 2


def _of_read_rows(
    forward: Callable[[Tensor], Any], current: _CurrentRows, row: Tensor | tuple[Any, ...]
) -> Callable[[Tensor], Any]:
    """Wrap a `forward` of [1, T, width]: rows that are read are computed, the others are 0.

    Args:
        forward: function to wrap, which is never called without rows: quantised layers of some libraries crash then.
        current: which rows are read.
        row: result of `forward` for one row. Of a tuple the first is the output; nothing reads the others, such as the
            router's scores of a mixture.
    """
    example, *example_others = row if isinstance(row, tuple) else (row,)

    def some_rows(hidden: Tensor) -> Any:
        rows = current.rows
        if rows is None:
            return forward(hidden)
        out, others = hidden.new_zeros(1, hidden.shape[1], example.shape[-1]), example_others
        if len(rows):
            result = forward(hidden[:, rows])
            out[:, rows], *others = result if isinstance(result, tuple) else (result,)
        return (out, *others) if isinstance(row, tuple) else out

    return some_rows
