"""RoPE whose frequencies depend on a request's length, chosen for every row instead of for a whole step.

Holds the replacement of rotary modules' forward. Must not know plans or requests: whoever calls the model passes the
length of every row.
Read next: `longspan.types`, `RopeLengths`; `longspan.worker.forward`, which passes the lengths.

Transformers chooses the frequencies of a forward pass by its last position, and writes them into the module. A step
here packs rows of several requests, and ranks that are threads share the module. So there is a copy of the module for
each set of frequencies, which is never written to, and each row gets the cosines and sines of the copy for its length.
"""

import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longspan.errors import UnsupportedModelError
from longspan.models.rope import rope_lengths
from longspan.types import RopeLengths

ROW_LENGTHS = "longspan_row_lengths"
"""Forward keyword argument: list of ints, the length that counts for every row (`RopeLengths.counted`)."""

MAX_TABLES = 64
"""Most copies of a module that are kept; the least recently used one is dropped first."""


class _CurrentRows(threading.local):
    """Lengths of the rows of the call that is under way; per thread, as ranks that are threads share the modules."""

    lengths: Sequence[int] | None = None


def choose_frequencies_by_row_(model: Any) -> int:
    """Let rotary modules choose frequencies by row, if they depend on a request's length.

    Returns:
        Number of changed modules.

    Raises:
        UnsupportedModelError: a module uses more of the length than its frequencies.
    """
    lengths = rope_lengths(model.config)
    if lengths is None:
        return 0
    rope_type = model.config.rope_parameters["rope_type"]
    modules: list[Any] = [module for module in model.modules() if getattr(module, "rope_type", None) == rope_type]
    current = _CurrentRows()

    def note(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        current.lengths = kwargs.pop(ROW_LENGTHS, None)
        return args, kwargs

    model.register_forward_pre_hook(note, with_kwargs=True)
    for module in modules:
        by_row = _ByRow(module, lengths, current)
        by_row.check()
        module.forward = by_row
    return len(modules)


class _ByRow:
    """Forward of a rotary module; copies of a model share it, and the lengths that it reads."""

    def __init__(self, module: Any, lengths: RopeLengths, current: _CurrentRows) -> None:
        self._lengths, self._current = lengths, current
        with torch.device("cpu"):  # a trace has none of its values
            self._fresh: Any = type(module)(config=module.config)
        self._lock = threading.Lock()
        self._tables: OrderedDict[tuple[int, torch.device], Any] = OrderedDict()

    def __deepcopy__(self, memo: object) -> "_ByRow":
        return self

    def __call__(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines [1, T, width] of positions [1, T]; `x` gives dtype and device."""
        lengths = self._current.lengths
        if x.is_meta:
            lengths = [self._lengths.same_up_to]
        elif lengths is None:  # one request, as Transformers has it
            lengths = [self._lengths.counted(int(position_ids.max()) + 1)]
        distinct = sorted(set(lengths))
        if len(distinct) == 1:
            found: tuple[Tensor, ...] = self._table(distinct[0], x.device)(x, position_ids)
            return found
        outs: tuple[Tensor, ...] = ()
        for length in distinct:
            rows = torch.tensor([i for i, other in enumerate(lengths) if other == length], device=x.device)
            parts = self._table(length, x.device)(x, position_ids[:, rows])
            outs = outs or tuple(part.new_empty(1, len(lengths), *part.shape[2:]) for part in parts)
            for out, part in zip(outs, parts, strict=True):
                out[:, rows] = part
        return outs

    def _table(self, length: int, device: torch.device) -> Any:
        """Copy of the module with the frequencies of a length."""
        with self._lock:
            table = self._tables.get((length, device))
            if table is None:
                table = self._tables[length, device] = self._make_table(length).to(device)
                if len(self._tables) > MAX_TABLES:
                    self._tables.popitem(last=False)
            self._tables.move_to_end((length, device))
        return table

    def _make_table(self, length: int) -> Any:
        table = copy.deepcopy(self._fresh, {id(self._fresh.config): self._fresh.config})
        if length > self._lengths.same_up_to:
            with torch.device("cpu"):
                # A tensor, as Transformers passes it: the arithmetic is that of its dtype.
                table.inv_freq, table.attention_scaling = ROPE_INIT_FUNCTIONS[table.rope_type](
                    table.config, torch.device("cpu"), seq_len=torch.tensor(length)
                )
        table.rope_type = "default"  # or it would choose frequencies itself
        return table

    def check(self) -> None:
        """Compare with Transformers' own module, in steps of one request: rows must not depend on the last one.

        Raises:
            UnsupportedModelError: they do.
        """
        same_up_to = self._lengths.same_up_to
        with torch.device("cpu"):
            if not all(self._is_exact(length) for length in (same_up_to, same_up_to + 1, 2 * same_up_to)):
                raise UnsupportedModelError(
                    f"rope_type: got {self._fresh.rope_type!r}, which {self._fresh.config.model_type} applies in a way "
                    "of its own that is not proven"
                )

    def _is_exact(self, length: int) -> bool:
        x, positions = torch.zeros(1), torch.tensor([[0, 1, length - 1]])
        expected = copy.deepcopy(self._fresh)(x, positions)
        table = self._table(self._lengths.counted(length), x.device)
        for rows in (positions, positions[:, :2]):
            found = table(x, rows)
            if not isinstance(found, tuple):
                return False
            if not all(torch.equal(a, b[:, : rows.shape[1]]) for a, b in zip(found, expected, strict=True)):
                return False
        return True
