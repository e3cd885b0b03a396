"""Proof, when a model is loaded, that a replacement computes what a module of Transformers does.

Holds the comparison on random rows, and the activations that kernels know. Must not know kernels or layers.
Read next: `longspan.models.fused_layer`, `longspan.models.cpu_experts`, which replace modules.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

TOLERANCE = 1e-5
"""Largest difference between two forms of a module, relative to the largest output: float32 sums in another order."""

KNOWN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def activation_name(function: Callable[[Tensor], Tensor]) -> str:
    """Name of an activation function, one of `KNOWN_ACTIVATIONS`.

    Raises:
        ValueError: it is another one.
    """
    x = torch.linspace(-12, 12, 999)
    for name, known in KNOWN_ACTIVATIONS.items():
        if agree(known(x), function(x)):
            return name
    raise ValueError(f"activation {function}")


def agree(found: Tensor, wanted: Tensor) -> bool:
    """Whether two results are equal up to rounding."""
    largest = max(1.0, float(wanted.abs().max()))
    return found.shape == wanted.shape and float((found - wanted).abs().max()) <= TOLERANCE * largest


def random_rows(*shape: int) -> Tensor:
    """Random numbers that are the same in every process."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
