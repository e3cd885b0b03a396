"""True positions of rows, for layers that count a step's rows on from the length of a cache.

Holds the stand-in for a cache. Must not know plans, ranks or requests.
Read next: `longspan.models.adaptations`; `longspan.models.chosen_experts`, the other change of the same family.

Layers of Llama 4 without RoPE scale queries by a function of the position (attention temperature). They take row i of a
step to be at position `cache length + i`, which holds for one request on one device alone: a step packs several
requests, and a rank has some of the rows. They get a cache whose length is what each row must be moved by.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn


class RowPositions:
    """Stands where layers expect a cache. It stores nothing: keys and values are those of the step."""

    def __init__(self, positions: Tensor) -> None:
        """Take the positions [1, T] of a step's rows."""
        self._offsets = positions[0] - torch.arange(positions.shape[1], device=positions.device)

    def get_seq_length(self, _layer_idx: int = 0) -> Tensor:
        """[T] what to add to a row's index to get its position."""
        return self._offsets

    def update(self, k: Tensor, v: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Return keys and values as they are."""
        return k, v


def give_positions_(model: Any) -> int:
    """Let layers whose queries have a temperature find the true position of every row.

    Returns:
        Number of changed layers.
    """
    if not getattr(model.config, "attn_temperature_tuning", False) or model.config.model_type != "llama4_text":
        return 0
    tuned = [layer for layer in model.model.layers if not layer.self_attn.use_rope]
    for layer in tuned:
        _connect(layer)
    return len(tuned)


def _connect(layer: nn.Module) -> None:
    # Transformers renamed the argument.
    name = "cache" if "cache" in inspect.signature(layer.forward).parameters else "past_key_values"

    def add(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, name: RowPositions(kwargs["position_ids"])}

    layer.register_forward_pre_hook(add, with_kwargs=True)
