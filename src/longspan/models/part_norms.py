"""RMS norms over a width of which a process has a part: squares are added over the processes of its rank.

Holds the norm and the proof that it computes what Transformers' does. Must not know attention, plans or pages.
Read next: `longspan.models.tensor_parallel`, Note [Parts of a layer]; `longspan.models.tensor_plans`, which finds these
norms.

Note [Squares over a width]
    A norm over all heads needs one number per row of the other processes, so this is added, and heads are not gathered.
    Where several processes have the same KV heads, the mean of their means is that of all elements all the same, since
    every head is in equally many of them:

        width 6, three processes of 2     mean of squares = (mean of part 0 + mean of part 1 + mean of part 2) / 3
"""

import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan.models.cpu_norms import EPSILONS
from longspan.models.same_result import agree, random_rows


class NormForm(NamedTuple):
    """What a family's RMS norm does beside dividing by the root of the mean square."""

    epsilon: float
    adds_one: bool
    """Whether the factor is the weight plus one."""
    rounds_first: bool
    """Whether rows get their dtype before they are scaled, and not behind that."""

    def apply(self, x: Tensor, weight: Tensor, mean_square: Tensor) -> Tensor:
        """Norm rows [..., width], given the mean of their squares [..., 1] in float32."""
        normed = x.to(torch.float32) * torch.rsqrt(mean_square + self.epsilon)
        factor = 1 + weight.to(torch.float32) if self.adds_one else weight
        return factor * normed.to(x.dtype) if self.rounds_first else (factor * normed).to(x.dtype)


def norm_form(norm: Any) -> NormForm:
    """Find what a norm computes, by comparing it with all forms on random rows.

    Args:
        norm: module with a weight [width], on any device; it is not changed.

    Raises:
        ValueError: it computes something else.
    """
    epsilon = next((getattr(norm, name) for name in EPSILONS if hasattr(norm, name)), None)
    weights = list(norm.parameters())
    if isinstance(epsilon, float) and len(weights) == 1 and weights[0].ndim == 1:
        for adds_one, rounds_first in product((False, True), repeat=2):
            form = NormForm(epsilon, adds_one, rounds_first)
            if all(_is_same(norm, form, dtype) for dtype in (torch.float32, torch.bfloat16)):
                return form
    raise ValueError(f"{type(norm).__name__}, which is no RMS norm that is known")


def cut_norm_(norm: Any, kept: slice, add: Callable[[Tensor], Tensor], size: int) -> None:
    """Leave a part of a norm, which then adds squares over the processes of the rank.

    Args:
        norm: whole norm that `norm_form` knows.
        kept: the part of its width that its input has from now on.
        add: sum over the processes of the rank of a float32 tensor.
        size: their number.

    Collective: the forward of the module is one of all processes of the rank; 4 bytes per row and part.
    """
    form = norm_form(norm)
    norm.weight = torch.nn.Parameter(norm.weight.data[kept].clone(), requires_grad=False)
    norm.forward = partial(_forward, form, norm, add, size)


def _forward(form: NormForm, norm: Any, add: Callable[[Tensor], Tensor], size: int, x: Tensor) -> Tensor:
    total = add(x.to(torch.float32).pow(2).mean(-1, keepdim=True))
    return form.apply(x, norm.weight, total / size)


def _is_same(norm: Any, form: NormForm, dtype: torch.dtype) -> bool:
    """Whether a norm and a form compute the same on rows of different lengths; in bfloat16, to the bit."""
    with torch.device("cpu"), torch.inference_mode():
        own = copy.deepcopy(norm).to_empty(device="cpu").to(dtype)
        weight = random_rows(1, len(norm.weight))[0].to(dtype)
        next(own.parameters()).copy_(weight)
        x = (random_rows(5, len(weight)) * torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e3])[:, None]).to(dtype)
        found = form.apply(x, weight, x.to(torch.float32).pow(2).mean(-1, keepdim=True))
        wanted = own(x)
        return torch.equal(found, wanted) if dtype is torch.bfloat16 else agree(found, wanted)
