"""Binding of the compiled kernels `delta.c` and `convolution.c`: what recurrent layers do between their products.

Holds the calls. Must not know Transformers, or where a state is kept.
Read next: `longspan.models.cpu_recurrence`, which calls them.
"""

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor

from longspan.native.kernels import LANES, library

MAX_WIDTH = 256
"""MOST_WIDTH of delta.c."""


class _Delta(ctypes.Structure):
    """Call as `delta.c` declares it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "gate", "rate", "state", "out")),
        *((f"{name}_strides", ctypes.c_long * 3) for name in ("q", "k", "v", "gate", "rate")),
        *((name, ctypes.c_long) for name in ("batch", "tokens", "heads", "v_heads", "width", "v_width")),
        *((name, ctypes.c_long) for name in ("has_channel_gates", "is_normed")),
    ]


def can_carry(width: int, v_width: int) -> bool:
    """Whether `delta_rule` takes these head sizes of keys and values."""
    fits = width % LANES == 0 and 0 < width <= MAX_WIDTH and v_width % LANES == 0 and v_width > 0
    return fits and library() is not None


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    rate: Tensor,
    state: Tensor,
    *,
    is_normed: bool,
    heads: Iterable[range] | None = None,
) -> Tensor:
    """Compute the gated delta rule over consecutive tokens of B requests.

    Args:
        q: [B, t, H, D] float32, like all others; t >= 1.
        k: [B, t, H, D].
        v: [B, t, Hv, Dv]; each head of queries and keys serves Hv / H heads of values. `can_carry` admits D and Dv.
        gate: logarithm of the decay, at most 0: [B, t, Hv], or [B, t, Hv, D] for one per channel.
        rate: [B, t, Hv], how much of the state's error a token corrects.
        state: [B, Hv, D, Dv], contiguous; becomes that behind the last token.
        is_normed: whether queries and keys are divided by their length first.
        heads: ranges of heads of values, which are computed one after the other, each when it is asked for: `state` may
            be written up to then. All heads must be among them. None: all at once.

    Returns:
        [B, t, Hv, Dv].
    """
    found = library()
    assert found is not None
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    batch, num_tokens, num_heads, width = k.shape
    num_v_heads, v_width = v.shape[2:]
    has_channel_gates = gate.ndim == 4
    if has_channel_gates and gate.stride(-1) != 1:
        gate = gate.contiguous()
    assert state.is_contiguous()
    assert state.shape == (batch, num_v_heads, width, v_width)
    assert all(tensor.dtype is torch.float32 for tensor in (q, k, v, gate, rate, state))
    out = torch.empty(batch, num_tokens, num_v_heads, v_width)
    call = _Delta(
        *(tensor.data_ptr() for tensor in (q, k, v, gate, rate, state, out)),
        *((ctypes.c_long * 3)(*tensor.stride()[:3]) for tensor in (q, k, v, gate, rate)),
        *(batch, num_tokens, num_heads, num_v_heads, width, v_width, has_channel_gates, is_normed),
    )
    num_threads = torch.get_num_threads()
    scratch = torch.empty(num_threads * found.longspan_delta_scratch())
    for some in [range(num_v_heads)] if heads is None else heads:
        status = found.longspan_delta_rule(ctypes.byref(call), some.start, some.stop, num_threads, scratch.data_ptr())
        assert status == 0, f"delta kernel refused {some} of {num_v_heads} heads of {width} and {v_width}"
    return out


def can_convolve(num_channels: int) -> bool:
    """Whether `convolve` and `convolve_step` take this number of channels."""
    return num_channels % LANES == 0 and num_channels > 0 and library() is not None


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *, is_silu: bool) -> Tensor:
    """Convolve every channel with its own taps; zeros stand before the first token.

    Args:
        x: [B, t, C] float32, contiguous in the last dimension; `can_convolve` admits C.
        weight: [C, taps], of which the last is the token's own.
        bias: [C] or None.
        is_silu: whether the activation `silu` follows.

    Returns:
        [B, t, C].
    """
    found = library()
    assert found is not None
    assert x.stride(-1) == 1
    out = torch.empty(x.shape)
    by_tap = weight.t().contiguous()
    status = found.longspan_convolve(
        *(x.data_ptr(), x.stride(0), x.stride(1), by_tap.data_ptr(), None if bias is None else bias.data_ptr()),
        *(*x.shape, weight.shape[1], is_silu, torch.get_num_threads(), out.data_ptr()),
    )
    assert status == 0, f"convolution kernel refused {tuple(x.shape)}"
    return out


def convolve_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, *, is_silu: bool) -> Tensor:
    """Convolve one token of each request, behind the inputs that were kept of it.

    Args:
        x: [B, C] float32, contiguous; `can_convolve` admits C.
        state: [B, C, taps] last inputs, contiguous; takes in the token.
        weight: [C, taps], contiguous.
        bias: [C] or None.
        is_silu: whether the activation `silu` follows.

    Returns:
        [B, C].
    """
    found = library()
    assert found is not None
    out = torch.empty(x.shape)
    status = found.longspan_convolve_step(
        *(x.data_ptr(), state.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr()),
        *(*x.shape, weight.shape[1], is_silu, torch.get_num_threads(), out.data_ptr()),
    )
    assert status == 0, f"convolution kernel refused {tuple(x.shape)}"
    return out
