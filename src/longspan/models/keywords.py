"""Handing of forward keyword arguments to attention, in families whose layers drop them.

Holds the two hooks. Must not know what the arguments mean.
Read next: `longspan.models.hook`, which expects `longspan_attend` in every attention call.

Layers of `nemotron` and `stablelm` take keyword arguments and call attention without them.
"""

import threading
from typing import Any

from torch import nn

from longspan.models.families import PROVEN_FAMILIES, Need

PREFIX = "longspan_"
"""Beginning of the names of arguments that are handed on."""


class _Current(threading.local):
    """Arguments of the layer's call that is under way; per thread, as ranks that are threads share the modules."""

    arguments: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed


def hand_on_keywords_(model: Any) -> int:
    """Let attention receive the layer's `longspan_` arguments, in a family that needs it.

    Returns:
        Number of changed layers.
    """
    family = PROVEN_FAMILIES.get(model.config.model_type)
    if family is None or Need.KEYWORDS not in family.needs:
        return 0
    for layer in model.model.layers:
        _connect(layer, layer.self_attn)
    return len(model.model.layers)


def _connect(layer: nn.Module, attention: nn.Module) -> None:
    current = _Current()

    def note(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        current.arguments = {name: value for name, value in kwargs.items() if name.startswith(PREFIX)}

    def add(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, **current.arguments}

    layer.register_forward_pre_hook(note, with_kwargs=True)
    attention.register_forward_pre_hook(add, with_kwargs=True)
