"""Binding of the compiled kernel `experts.c`: a mixture's chosen experts for few tokens.

Holds the mixture as the kernel sees it. Must not know Transformers, or when the kernel is worth calling.
Read next: `longspan.models.cpu_experts`, which calls it.
"""

import ctypes

import torch
from torch import Tensor

from longspan.native.kernels import LANES, MAX_LINEAR_ROWS, library
from longspan.native.layer import ACTIVATIONS


class _Mixture(ctypes.Structure):
    """Mixture as `experts.c` declares it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gate_up", "down")),
        *((name, ctypes.c_long) for name in ("experts", "hidden", "inner", "activation")),
    ]


class NativeExperts:
    """Experts of one mixture that the kernel can run."""

    max_tokens = MAX_LINEAR_ROWS
    """Most tokens of a call."""

    def __init__(self, gate_up: Tensor, down: Tensor, activation: str) -> None:
        """Take the weights.

        Args:
            gate_up: [experts, 2 * inner, hidden] float32, contiguous, on the CPU; an expert's gate, then its up. This
                object keeps it; it must not change.
            down: [experts, hidden, inner], likewise.
            activation: one of `ACTIVATIONS`.

        Raises:
            ValueError: the kernel is not available, or does not take these weights.
        """
        found = library()
        experts, hidden, inner = down.shape
        if found is None or hidden % LANES or inner % LANES or gate_up.shape != (experts, 2 * inner, hidden):
            raise ValueError("no kernel for these experts")
        if any(
            w.dtype is not torch.float32 or not w.is_contiguous() or w.device.type != "cpu" for w in (gate_up, down)
        ):
            raise ValueError("no kernel for these weights")
        self._weights = gate_up, down  # the kernel has their addresses
        self._mixture = _Mixture(
            gate_up.data_ptr(), down.data_ptr(), experts, hidden, inner, ACTIVATIONS.index(activation)
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
