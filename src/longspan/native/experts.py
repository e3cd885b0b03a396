"""Binding of the compiled kernel `experts.c`: a mixture's chosen experts for few tokens.

Holds the mixture as the kernel sees it. Must not know Transformers, or when the kernel is worth calling.
Read next: `longspan.models.cpu_experts`, which calls it.
"""

import ctypes

import torch
from torch import Tensor

from longspan.native import packed
from longspan.native.kernels import LANES, MAX_LINEAR_ROWS, library
from longspan.native.layer import ACTIVATIONS
from longspan.native.matrix import CMatrix, Matrix, c_matrix
from longspan.native.packed import PackedMatrix


class _Mixture(ctypes.Structure):
    """Mixture as `experts.c` declares it."""

    _fields_ = [
        *((name, CMatrix) for name in ("gate_up", "down")),
        *((name, ctypes.c_long) for name in ("experts", "hidden", "inner", "activation")),
    ]


class NativeExperts:
    """Experts of one mixture that the kernel can run."""

    def __init__(self, gate_up: Matrix, down: Matrix, num_experts: int, activation: str) -> None:
        """Take the weights.

        Args:
            gate_up: [experts * 2 * inner, hidden] float32, contiguous, on the CPU, or packed; an expert's gate, then
                its up. This object keeps it; it must not change.
            down: [experts * hidden, inner], likewise.
            num_experts: number of experts.
            activation: one of `ACTIVATIONS`.

        Raises:
            ValueError: the kernel is not available, or does not take these weights.
        """
        found = library()
        (num_out, hidden), (num_down, inner) = gate_up.shape, down.shape
        if found is None or hidden % LANES or inner % LANES:
            raise ValueError("no kernel for these experts")
        if (num_out, num_down) != (num_experts * 2 * inner, num_experts * hidden):
            raise ValueError(f"weights {(num_out, hidden)} and {(num_down, inner)} of {num_experts} experts")
        is_packed = isinstance(gate_up, PackedMatrix) or isinstance(down, PackedMatrix)
        self.max_tokens = packed.MAX_ROWS if is_packed else MAX_LINEAR_ROWS
        """Most tokens of a call."""
        self._weights = gate_up, down  # the kernel has their addresses
        self._mixture = _Mixture(
            c_matrix(gate_up), c_matrix(down), num_experts, hidden, inner, ACTIVATIONS.index(activation)
        )
        self._address = ctypes.addressof(self._mixture)
        self._kernel = found.longspan_experts

    def __call__(self, x: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        """Compute the sum of what the chosen experts make of each token, scaled by its scores.

        Args:
            x: [T, hidden] float32, 1 to `max_tokens` tokens.
            chosen: [T, k] int64 numbers of experts.
            scores: [T, k] float32.

        Returns:
            [T, hidden] float32.
        """
        num_tokens, num_chosen = chosen.shape
        pairs, mixture = num_tokens * num_chosen, self._mixture
        x, chosen, scores = x.contiguous(), chosen.contiguous(), scores.contiguous()
        numbers = torch.empty(mixture.experts + 1 + pairs, dtype=torch.int64)
        scratch = torch.empty(pairs * 2 * (mixture.hidden + mixture.inner))
        out = torch.empty_like(x)
        status = self._kernel(
            *(self._address, x.data_ptr(), chosen.data_ptr(), scores.data_ptr(), num_tokens, num_chosen),
            *(torch.get_num_threads(), numbers.data_ptr(), scratch.data_ptr(), out.data_ptr()),
        )
        assert status == 0, f"experts kernel refused {num_tokens} tokens with {num_chosen} of {mixture.experts} experts"
        return out
