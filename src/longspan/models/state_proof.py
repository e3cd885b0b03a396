"""Proof that recurrent modules go on from a state: several pieces give what one piece gives.

Holds the proof, run on random weights before a model's own are loaded. Must not know plans, ranks or families.
Read next: `longspan.models.recurrent`, whose stand-in for a cache is what is proven here;
`docs/decisions/0061-recurrence-is-proven.md`.

A module that ignores its state, or one that Transformers computes wrongly in pieces, gives wrong tokens without an
error. So one module of every class goes over the same random rows twice: in one piece, and cut where it hurts (an odd
length, fewer rows than a convolution reaches, a single row, which most modules compute by another formula).
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import UnsupportedModelError
from longspan.kv.state_layout import StateComponent
from longspan.models.recurrent import LayerCache

PIECES = (20, 2, 14, 1)
"""Rows of each piece."""

MOST_ERROR = 1e-3
"""Largest difference of outputs in float32, in units of the largest output. Modules that are right differ by 4e-8 to
2e-4, those that are wrong by 0.3 and more."""


def check_recurrence(modules: Iterable[Any], layouts: Mapping[int, Sequence[StateComponent]], width: int) -> None:
    """Prove that modules of every class go on from a state.

    Args:
        modules: recurrent modules of a model on the meta device.
        layouts: layout of every layer's state.
        width: elements of a row.

    Raises:
        UnsupportedModelError: one does not.
    """
    first_of = {type(module): module for module in reversed(list(modules))}
    for module in first_of.values():
        error = _error(module, layouts[int(module.layer_idx)], width)
        if not error <= MOST_ERROR:  # NaN too
            raise UnsupportedModelError(
                f"recurrent layers: {type(module).__name__} in pieces of {'+'.join(map(str, PIECES))} rows differs "
                f"from one piece by {error:.1e} of the largest output, proven is at most {MOST_ERROR:.0e}; this "
                "Transformers does not continue its state"
            )


@torch.inference_mode()
def _error(module: Any, components: Sequence[StateComponent], width: int) -> float:
    """Largest difference between one piece and several, in units of the largest output."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        network = _with_random_weights(module, generator)
        rows = torch.randn(1, sum(PIECES), width, generator=generator)
        (whole,) = _outputs(network, components, [rows])
        parts = torch.cat(_outputs(network, components, rows.split(PIECES, dim=1)), dim=1)
    return float((whole - parts).abs().max() / whole.abs().max())


def _with_random_weights(module: Any, generator: torch.Generator) -> nn.Module:
    """Copy of a module on the CPU, in float32, that keeps the size of what it is given."""
    network: nn.Module = copy.deepcopy(module).float().to_empty(device="cpu")
    for changed in network.modules():
        changed.__dict__.pop("forward", None)  # of the module that was copied
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5)
        else:
            weight.copy_(-1 - torch.rand(weight.shape, generator=generator))
    for buffer in network.buffers():
        buffer.fill_(1)
    return network


def _outputs(network: Any, components: Sequence[StateComponent], pieces: Iterable[Tensor]) -> list[Tensor]:
    """Outputs of pieces that follow each other."""
    state = [torch.empty(1, *component.shape) for component in components]
    return [network(piece, cache=LayerCache(components, state, is_new=i == 0)) for i, piece in enumerate(pieces)]
