"""Mask rule of a model's attention calls: which of the proven rules it is, and the refusal of every other one.

Holds probes of the rule that Transformers' mask functions make. Must not know ranks, plans or families.
Read next: `longspan.kv.layout`, `KVSpec`, which carries the rule; `longspan.models.inspect`, which calls this.
"""

from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor

from longspan.errors import UnsupportedModelError
from longspan.models.hook import AttentionCall, MaskRule

FAR = 1_000_000
"""A position behind any window or chunk's first edge, near which the rule is probed."""


def find_chunk(call: AttentionCall) -> int | None:
    """Tokens of the chunks of a layer's attention, or None: its mask is local, and attention was told no window.

    Attention is not told of chunks; `check_mask` checks that this is what the mask does.

    Raises:
        UnsupportedModelError: chunks have no tokens.
    """
    chunk = call.mask.local_size if isinstance(call.mask, MaskRule) and call.window is None else None
    if chunk is not None and chunk < 1:
        raise UnsupportedModelError(f"attention_chunk_size: got {chunk}, legal is an integer from 1")
    return chunk


def check_mask(call: AttentionCall) -> None:
    """Check that the model's mask rule is the causal rule, with the window or the chunks of the layer.

    Raises:
        UnsupportedModelError: it is another rule.
    """
    if not isinstance(call.mask, MaskRule):
        raise UnsupportedModelError(
            f"attention mask of layer {call.layer}: got {type(call.mask).__name__}, proven is a rule made by "
            "Transformers' mask functions"
        )
    window, chunk = call.window, find_chunk(call)
    rule = _with_values(call.mask.mask_function)
    start = FAR // (chunk or 1) * (chunk or 1)  # of a chunk
    zero = torch.tensor(0)
    for query in (FAR, start, start - 1):
        first = 0 if chunk is None else query // chunk * chunk
        if window is not None:
            first = max(first, query - window + 1)
        for key in sorted({0, first - 1, first, first + 1, query - 2, query - 1, query, query + 1}):
            is_seen = bool(rule(zero, zero, torch.tensor(query), torch.tensor(key)))
            if key >= 0 and is_seen != (first <= key <= query):
                named = f"window {window}" if chunk is None else f"chunks of {chunk}"
                raise UnsupportedModelError(
                    f"attention mask of layer {call.layer}: position {query} and key {key} break the rule 'causal, "
                    f"{named}', the only one that is proven"
                )


def _with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy of a mask function made on the meta device, which can be called.

    Chunks hold a tensor, the left padding of each row, which has no values there. A step has no padding: zeros.
    """
    if not isinstance(function, FunctionType) or function.__closure__ is None:
        return function
    cells = tuple(CellType(_value(cell.cell_contents)) for cell in function.__closure__)
    return FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)


def _value(constant: Any) -> Any:
    if isinstance(constant, Tensor) and constant.is_meta:
        return torch.zeros(constant.shape, dtype=constant.dtype, device="cpu")
    if isinstance(constant, tuple):
        return tuple(_value(item) for item in constant)
    return _with_values(constant) if isinstance(constant, FunctionType) else constant
