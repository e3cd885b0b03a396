"""What recurrent layers do between their products, on a CPU: by kernels in place of Transformers' torch forms.

Holds the replacement of functions that modules call, and their proof. Must not know plans, ranks or families.
Read next: `longspan.native.recurrence`; `longspan.models.speedups`, which applies it;
`docs/decisions/0064-functions-of-recurrent-modules.md`.

Modules of all families with a convolution or a delta rule call functions of the same names and arguments. A module's
class gets the same `forward` with other functions behind these names; the functions of Transformers stay as they are.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from longspan.cp.handover import StateByHeads
from longspan.models.recurrent import HEADED, TAKES_HEADS, recurrent_modules
from longspan.models.same_result import agree
from longspan.native import recurrence

_log = logging.getLogger(__name__)

Function: TypeAlias = Callable[..., Any]

SILU = ("silu", "swish")


def replace_recurrences_(model: nn.Module) -> int:
    """Let recurrent modules call the kernels, where these are proven to compute the same.

    Returns:
        Number of changed modules.
    """
    fast_of: dict[type, type | None] = {}
    count = 0
    for module in recurrent_modules(model):
        cls = type(module)
        if cls not in fast_of:
            fast_of[cls] = _fast_class(cls)
        if (fast := fast_of[cls]) is not None:
            module.__class__ = fast
            count += 1
    return count


def _fast_class(cls: type) -> type | None:
    """Class with the same `forward` that calls the kernels; None if there are none for what it calls."""
    own = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
    assert isinstance(own, FunctionType)
    functions = _proven(own.__globals__, own.__code__.co_names)
    if not functions:
        return None
    forward = FunctionType(
        own.__code__, {**own.__globals__, **functions}, own.__name__, own.__defaults__, own.__closure__
    )
    forward.__kwdefaults__ = own.__kwdefaults__
    headed = [name for name in own.__code__.co_names if any(part in name for part in HEADED)]
    takes_heads = headed and all(name in functions for name in headed)
    return type(cls.__name__, (cls,), {"forward": forward, **({TAKES_HEADS: True} if takes_heads else {})})


def _proven(names: Mapping[str, Any], used: tuple[str, ...]) -> dict[str, Function]:
    """Replacements, by name, of functions that are used and compute on random numbers what their replacement does."""
    found: dict[str, Function] = {}
    for name, (make, prove) in _REPLACEMENTS.items():
        if name not in used or not isinstance(names.get(name), FunctionType):
            continue
        own = names[name]
        replacement = partial(make, own)
        try:
            with torch.inference_mode():
                prove(own, replacement)
        except (ValueError, AttributeError, TypeError, RuntimeError) as error:
            _log.debug("%s stays Transformers': %s", name, error)
            continue
        found[name] = replacement
    return found


def _delta_rule(
    own: Function,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | StateByHeads | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule with Transformers' arguments; changes a float32 `initial_state` to the final one. Of one that
    comes by heads, they are computed as they come."""
    dtype, (batch, num_tokens, _, width) = query.dtype, key.shape
    num_heads, v_width = value.shape[2:]
    can_carry = num_tokens > 0 and value.device.type == "cpu" and recurrence.can_carry(width, v_width)
    heads: Iterator[range] | None = None
    if isinstance(initial_state, StateByHeads):
        if can_carry and initial_state.tensor.dtype is torch.float32:
            heads, initial_state = initial_state.heads(), initial_state.tensor
        else:
            initial_state = initial_state.whole()
    if not can_carry:
        out, state = own(
            query,
            key,
            value,
            g=g,
            beta=beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            **kwargs,
        )
        return out, state
    if initial_state is None:
        final = torch.zeros(batch, num_heads, width, v_width)
    else:
        final = initial_state.float().contiguous()
    query, key, value, g, beta = (tensor.float() for tensor in (query, key, value, g, beta))
    out = recurrence.delta_rule(query, key, value, g, beta, final, is_normed=use_qk_l2norm_in_kernel, heads=heads)
    return out.to(dtype), final if output_final_state else None


def _convolution(
    own: Function,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """Causal convolution of [B, C, t] with Transformers' arguments."""
    if not _can_convolve(hidden_states, weight, activation):
        kept: Tensor = own(hidden_states, weight, bias, activation=activation, **kwargs)
        return kept
    by_token = hidden_states.transpose(1, 2)
    by_token = by_token if by_token.stride(-1) == 1 else by_token.contiguous()
    return recurrence.convolve(by_token, weight, bias, is_silu=activation is not None).transpose(1, 2)


def _convolution_step(
    own: Function,
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Convolution of a single token [B, C, 1] with Transformers' arguments; the state takes it in."""
    is_one = hidden_states.shape[-1] == 1 and weight.shape[-1] == conv_state.shape[-1]
    if not (is_one and conv_state.is_contiguous() and conv_state.dtype is torch.float32) or not _can_convolve(
        hidden_states, weight, activation
    ):
        kept: Tensor = own(hidden_states, conv_state, weight, bias, activation)
        return kept
    x = hidden_states[..., 0].contiguous()
    is_silu = activation is not None
    return recurrence.convolve_step(x, conv_state, weight.contiguous(), bias, is_silu=is_silu)[..., None]


def _can_convolve(hidden: Tensor, weight: Tensor, activation: str | None) -> bool:
    is_float = hidden.dtype is weight.dtype is torch.float32 and hidden.device.type == "cpu"
    is_known = activation is None or activation in SILU
    return is_float and is_known and hidden.numel() > 0 and recurrence.can_convolve(hidden.shape[1])


def _prove_delta_rule(own: Function, replacement: Function, *, has_channel_gates: bool) -> None:
    """Compare the two from no state and from one, with tokens that make no whole chunk.

    Raises:
        ValueError: they disagree.
    """
    num_heads = 4 if has_channel_gates else 2
    for num_tokens, has_state in ((1, True), (70, False), (70, True)):
        q, k = _random(2, num_tokens, num_heads, 32, seed=1), _random(2, num_tokens, num_heads, 32, seed=2)
        v, state = _random(2, num_tokens, 4, 48, seed=3), _random(2, 4, 32, 48, seed=4)
        gates = (2, num_tokens, 4, 32) if has_channel_gates else (2, num_tokens, 4)
        given: dict[str, Any] = {"g": -_random(*gates, seed=5).abs()}
        given["beta"] = _random(2, num_tokens, 4, seed=6).sigmoid()
        for is_normed in (True, False) if num_tokens == 1 else (True,):
            if not is_normed:
                q, k = 0.2 * q, 0.2 * k
            given |= {"output_final_state": True, "use_qk_l2norm_in_kernel": is_normed}
            results = []
            for function in (replacement, own):
                given["initial_state"] = state.clone() if has_state else None
                results.append(function(q, k, v, **given))
            (out, final), (wanted, wanted_final) = results
            if not agree(out, wanted) or not agree(final, wanted_final):
                raise ValueError("another delta rule")


def _prove_convolution(own: Function, replacement: Function) -> None:
    """Compare the two with and without bias and activation.

    Raises:
        ValueError: they disagree.
    """
    x, weight = _random(2, 32, 9, seed=1), _random(32, 4, seed=2)
    for bias, activation in ((None, "silu"), (_random(32, seed=3), None)):
        if not agree(replacement(x, weight, bias, activation=activation), own(x, weight, bias, activation=activation)):
            raise ValueError("another convolution")


def _prove_convolution_step(own: Function, replacement: Function) -> None:
    """Compare the two, and the states that they leave.

    Raises:
        ValueError: they disagree.
    """
    x, weight = _random(2, 32, 1, seed=1), _random(32, 4, seed=2)
    for bias, activation in ((None, "silu"), (_random(32, seed=3), None)):
        states = [_random(2, 32, 4, seed=4) for _ in range(2)]
        found, wanted = (
            function(x, state, weight, bias, activation)
            for function, state in zip((replacement, own), states, strict=True)
        )
        if not agree(found, wanted) or not agree(*states):
            raise ValueError("another convolution")


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


_BY_HEAD, _BY_CHANNEL = (partial(_prove_delta_rule, has_channel_gates=by_channel) for by_channel in (False, True))

_REPLACEMENTS: dict[str, tuple[Function, Function]] = {
    "torch_chunk_gated_delta_rule": (_delta_rule, _BY_HEAD),
    "torch_recurrent_gated_delta_rule": (_delta_rule, _BY_HEAD),
    "chunk_kimi_delta_attention": (_delta_rule, _BY_CHANNEL),
    "recurrent_kimi_delta_attention": (_delta_rule, _BY_CHANNEL),
    "causal_conv1d_fn": (_convolution, _prove_convolution),
    "causal_conv1d_update": (_convolution_step, _prove_convolution_step),
}
"""Functions by their name in Transformers: the replacement, whose first argument is the function itself, and what
proves it."""
