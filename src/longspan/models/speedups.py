"""Every speed-up of a Transformers model: what it wants of the model, and in which order they are applied.

Holds the list and its order. Must not know how a speed-up works, nor plans, ranks or strategies.
Read next: `longspan.models.linear`, `longspan.models.last_layer`, `longspan.models.fused_layer`,
`longspan.models.compiled`, one speed-up each; `docs/decisions/0028-speed-ups-in-order.md`.

To add one, write `def name_(model) -> int` in a file of its own, and a `Speedup` in `SPEEDUPS`, in its place, with what
it must come behind in `after`; `tests/models/test_speedups.py` then runs it in every combination.

Note [Order of speed-ups]
    Each works alone, and computes what the model's own modules do. Together they replace modules' classes and `forward`
    of modules and of layers, and a replacement that keeps the `forward` it found must find the fast one. With o_proj of
    the last layer, `linear` behind `last_layer` would come to nothing:

        linear, last_layer        o_proj.forward = some rows of CPULinear.forward
        last_layer, linear        o_proj.forward = some rows of nn.Linear.forward; the class is not asked any more
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longspan.models.compiled import compile_dense_
from longspan.models.fused_layer import fuse_layers_
from longspan.models.last_layer import skip_unread_rows_
from longspan.models.linear import replace_linears_

APPLIED = "longspan_speedups"
"""Attribute of a model: its `Speedup`s. So a model that several engines share is changed once, and in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """One change of a loaded model that leaves what it computes as it is."""

    name: str
    apply_: Callable[[nn.Module], int]
    """Changes a model; returns how many of its modules it changed, 0 if the model has none that it knows."""
    after: tuple[str, ...] = ()
    """Names of the speed-ups that come before this one. See Note [Order of speed-ups]."""
    device_type: str | None = None
    """Where all weights must lie; None for anywhere."""
    dtype: torch.dtype | None = None
    """What all weights must be, in plain tensors (a quantised one is none); None if each module is looked at."""

    def takes(self, model: nn.Module) -> bool:
        """Whether a model's weights are as this speed-up wants them."""
        return all(
            (self.device_type is None or weight.device.type == self.device_type)
            and (self.dtype is None or (type(weight.data) is Tensor and weight.dtype is self.dtype))
            for weight in model.parameters()
        )


LINEAR = Speedup(name="linear", apply_=replace_linears_, device_type="cpu")
LAST_LAYER = Speedup(name="last_layer", apply_=skip_unread_rows_, after=("linear",))
FUSED_LAYERS = Speedup(
    name="fused_layers",
    apply_=fuse_layers_,
    after=("linear", "last_layer"),  # a layer is compared with what else would run
    device_type="cpu",
    dtype=torch.float32,
)
COMPILED = Speedup(
    name="compiled",
    apply_=compile_dense_,
    after=("linear", "last_layer", "fused_layers"),  # it leaves modules alone whose forward was replaced
    device_type="cuda",
)

SPEEDUPS = (LINEAR, LAST_LAYER, FUSED_LAYERS, COMPILED)
"""All of them, in their order."""

ALWAYS = (LINEAR, LAST_LAYER, FUSED_LAYERS)
"""Those that no option asks for."""


def speed_up_(model: nn.Module, speedups: Sequence[Speedup] = ALWAYS) -> None:
    """Let a loaded model compute faster, where its weights allow it.

    Args:
        model: with the `longspan` attention function, evaluating, its weights in place.
        speedups: in their order; those that the model has already do nothing.

    Raises:
        ValueError: one of them comes too late, behind another one here or in the model; nothing was changed.
    """
    applied = speedups_of(model)
    names = {speedup.name for speedup in applied}
    new = [speedup for speedup in speedups if speedup.name not in names]
    for place, speedup in enumerate(new):
        for other in (*applied, *new[:place]):
            if speedup.name in other.after:
                raise ValueError(f"speedups: got {speedup.name} behind {other.name}, legal is before it")
    for speedup in new:
        if speedup.takes(model) and speedup.apply_(model):
            applied = (*applied, speedup)
    setattr(model, APPLIED, applied)


def speedups_of(model: nn.Module) -> tuple[Speedup, ...]:
    """What a model has been changed by, in that order."""
    applied: tuple[Speedup, ...] = getattr(model, APPLIED, ())
    return applied
