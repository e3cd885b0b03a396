"""All speed-ups of a Transformers model: what each requires of the model, and the order in which they are applied.

Holds the list and its order. Must not know how a speed-up works, nor plans, ranks or strategies.
Read next: `longspan.models.linear`, `longspan.models.last_layer`, `longspan.models.cpu_experts`,
`longspan.models.cpu_recurrence`, `longspan.models.cpu_norms`, `longspan.models.fused_layer`,
`longspan.models.compiled`, one speed-up each;
`docs/decisions/0028-speed-ups-in-order.md`.

To add one, write `def name_(model) -> int` in a file of its own, and put a `Speedup` into `SPEEDUPS`, after those that
its `after` names; `tests/models/test_speedups.py` then runs it in every combination.

Note [Order of speed-ups]
    Each speed-up works alone, and computes the same as the model's own modules. Together they replace classes of
    modules and `forward` of modules and layers, and a replacement that wraps the `forward` it found must find the fast
    one. For o_proj of the last layer, `linear` after `last_layer` would have no effect:

        linear, last_layer        o_proj.forward = some rows of CPULinear.forward
        last_layer, linear        o_proj.forward = some rows of nn.Linear.forward; the class no longer matters
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longspan.models.compiled import compile_dense_
from longspan.models.cpu_experts import replace_experts_
from longspan.models.cpu_norms import replace_norms_
from longspan.models.cpu_recurrence import replace_recurrences_
from longspan.models.fused_layer import fuse_layers_
from longspan.models.last_layer import skip_unread_rows_
from longspan.models.linear import replace_linears_

TRIED = "longspan_speedups"
"""Attribute of a model that holds the `Speedup`s tried on it, each with whether it changed the model, so that a model
shared by engines is changed once, and in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """Change of a loaded model that does not change its results."""

    name: str
    apply_: Callable[[nn.Module], int]
    """Function that changes a model and returns the number of changed modules, 0 if it knows none of them."""
    after: tuple[str, ...] = ()
    """Names of the speed-ups that must be applied before this one. See Note [Order of speed-ups]."""
    device_type: str | None = None
    """Device type on which all weights must lie; None for any."""
    dtype: torch.dtype | None = None
    """Dtype that all weights must have, as plain tensors, or None if the speed-up checks each module. Whole numbers are
    those of packed layers, which compute in float32."""

    def takes(self, model: nn.Module) -> bool:
        """Whether a model's weights meet this speed-up's requirements."""
        return all(
            (self.device_type is None or weight.device.type == self.device_type)
            and (self.dtype is None or (type(weight.data) is Tensor and _computed_dtype(weight) is self.dtype))
            for weight in model.parameters()
        )


def _computed_dtype(weight: Tensor) -> torch.dtype:
    return weight.dtype if weight.is_floating_point() else torch.float32


LINEAR = Speedup(name="linear", apply_=replace_linears_, device_type="cpu")
LAST_LAYER = Speedup(name="last_layer", apply_=skip_unread_rows_, after=("linear",))
EXPERTS = Speedup(
    name="experts",
    apply_=replace_experts_,
    after=("linear", "last_layer"),  # it is indifferent to them; one order is easier to test than three
    device_type="cpu",
)
RECURRENCE = Speedup(
    name="recurrence",
    apply_=replace_recurrences_,
    after=("linear", "last_layer", "experts"),  # it is indifferent to them, too
    device_type="cpu",
)
NORMS = Speedup(
    name="norms",
    apply_=replace_norms_,
    after=("linear", "last_layer", "experts", "recurrence"),
    device_type="cpu",
)
FUSED_LAYERS = Speedup(
    name="fused_layers",
    apply_=fuse_layers_,
    after=("linear", "last_layer", "experts", "recurrence", "norms"),  # a layer is compared with what else would run
    device_type="cpu",
    dtype=torch.float32,
)
COMPILED = Speedup(
    name="compiled",
    apply_=compile_dense_,
    after=(
        "linear",
        "last_layer",
        "experts",
        "recurrence",
        "fused_layers",
    ),  # it leaves modules alone whose forward was replaced
    device_type="cuda",
)

SPEEDUPS = (LINEAR, LAST_LAYER, EXPERTS, RECURRENCE, NORMS, FUSED_LAYERS, COMPILED)
"""All speed-ups, in the order in which they are applied."""

ALWAYS = (LINEAR, LAST_LAYER, EXPERTS, RECURRENCE, NORMS, FUSED_LAYERS)
"""Speed-ups that are applied without an option."""


def speed_up_(model: nn.Module, speedups: Sequence[Speedup] = ALWAYS) -> None:
    """Let a loaded model compute faster, where its weights allow it.

    Args:
        model: model in evaluation mode, with the `longspan` attention function and its weights in place.
        speedups: speed-ups in their order; those that were tried on the model already do nothing.

    Raises:
        ValueError: a speed-up would come after one that must follow it, here or in the model; nothing was changed.
    """
    tried, applied = _tried(model), speedups_of(model)
    names = {speedup.name for speedup in tried}
    new = [speedup for speedup in speedups if speedup.name not in names]
    for place, speedup in enumerate(new):
        for other in (*applied, *new[:place]):
            if speedup.name in other.after:
                raise ValueError(f"speedups: got {speedup.name} behind {other.name}, legal is before it")
    changes = {speedup: speedup.takes(model) and speedup.apply_(model) > 0 for speedup in new}
    setattr(model, TRIED, tried | changes)


def speedups_of(model: nn.Module) -> tuple[Speedup, ...]:
    """Speed-ups that a model has, in the order in which they were applied."""
    return tuple(speedup for speedup, has_changed in _tried(model).items() if has_changed)


def _tried(model: nn.Module) -> dict[Speedup, bool]:
    tried: dict[Speedup, bool] = getattr(model, TRIED, {})
    return tried
