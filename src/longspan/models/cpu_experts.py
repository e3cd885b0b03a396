"""Experts of a mixture on a CPU: by a kernel while tokens are few, else expert by expert.

Holds both, and the forward that chooses between them. Must not know plans, ranks or rows.
Read next: `longspan.native.experts`; `longspan.models.speedups`, which applies it.

For one product over all experts Transformers gathers rows and results at full size, which takes longer than the
products: 296 ms where expert by expert takes 164 (2048 tokens, 8 of 64 experts of 384, two cores). A decode step needs
few of the weights, and the kernel reads those where they lie.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longspan.models.same_result import activation_name, agree, random_rows
from longspan.native import onednn
from longspan.native.experts import NativeExperts

_log = logging.getLogger(__name__)

_PLAIN = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
"""What Transformers says of experts that are a gated MLP without biases."""


def replace_experts_(model: nn.Module) -> int:
    """Let mixtures on a CPU compute expert by expert, and by the kernel, where these are proven to compute the same.

    Returns:
        Number of changed mixtures.
    """
    count = 0
    with torch.inference_mode():
        for _, experts in mixtures_of(model):
            by_expert = partial(compute_by_expert, experts)
            try:
                _prove(experts, by_expert)
            except (ValueError, AttributeError, TypeError, RuntimeError) as error:
                _log.debug("experts keep their forward: %s", error)
                continue
            experts.forward = partial(_forward, _kernel_of(experts), by_expert)
            count += 1
    return count


def sum_by_expert(
    compute: Callable[[int, Tensor], Tensor],
    num_experts: int,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Sum what the chosen experts make of each token, scaled by its scores; in the order of the experts.

    Args:
        compute: function from an expert's number and rows [n, width] to its output [n, width].
        num_experts: number of experts.
        hidden_states: [T, width].
        top_k_index: [T, k] numbers of experts.
        top_k_weights: [T, k] scores.

    Returns:
        [T, width] of the dtype of `hidden_states`.
    """
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)
    tokens, scores = order // top_k_index.shape[1], top_k_weights.flatten()[order, None]
    out = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    start = 0
    for expert, count in enumerate(flat.bincount(minlength=num_experts).tolist()):
        if count:
            some = slice(start, start + count)
            each = compute(expert, hidden_states[tokens[some]])
            out.index_add_(0, tokens[some], each.to(out.dtype).mul_(scores[some]))
            start += count
    return out.to(hidden_states.dtype)


def compute_by_expert(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute `sum_by_expert` of a module with the weights and the gate of Transformers' mixtures."""
    compute = partial(_expert, experts)
    return sum_by_expert(compute, experts.down_proj.shape[0], hidden_states, top_k_index, top_k_weights)


def is_plain(experts: Any) -> bool:
    """Whether experts are gated MLPs without biases, with Transformers' own gate.

    A comparison cannot prove a gate: some families bound what enters theirs, which random rows need not reach.
    """
    gate = type(experts)._apply_gate
    return gate.__module__ == "transformers.integrations.moe" and all(
        getattr(experts, name, value) is value for name, value in _PLAIN.items()
    )


def mixtures_of(model: nn.Module) -> list[tuple[str, Any]]:
    """Modules of a model that hold the weights of all experts of a mixture, by name."""
    names = ("_apply_gate", "has_bias", "is_transposed")
    return [(name, module) for name, module in model.named_modules() if all(hasattr(module, part) for part in names)]


def _expert(experts: Any, expert: int, rows: Tensor) -> Tensor:
    """Compute one expert's output [n, width] for rows [n, width]."""
    if experts.has_gate:
        inner = experts._apply_gate(_product(experts, "gate_up_proj", expert, rows))
    else:
        inner = experts.act_fn(_product(experts, "up_proj", expert, rows))
    out = _product(experts, "down_proj", expert, inner)
    return experts.post_expert_norm(out) if getattr(experts, "has_post_expert_norm", False) else out


def _product(experts: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    """Multiply rows by one expert's weight, and add its bias."""
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    if experts.is_transposed:
        return rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    if weight.dtype is rows.dtype is torch.float32 and onednn.is_available():
        return onednn.linear(rows, weight, bias)
    return F.linear(rows, weight, bias)


def _forward(
    kernel: NativeExperts | None,
    many: Callable[..., Tensor],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Sum [T, width] of what the chosen experts [T, k] make of the tokens [T, width]."""
    if (
        kernel is not None
        and 0 < hidden_states.shape[0] <= kernel.max_tokens
        and hidden_states.dtype is top_k_weights.dtype is torch.float32
    ):
        return kernel(hidden_states, top_k_index, top_k_weights)
    return many(hidden_states, top_k_index, top_k_weights)


def _kernel_of(experts: Any) -> NativeExperts | None:
    """Kernel that computes what the experts do, if there is one."""
    if not is_plain(experts):
        return None
    gate_up, down = experts.gate_up_proj.data, experts.down_proj.data
    try:
        kernel = NativeExperts(gate_up.flatten(0, 1), down.flatten(0, 1), len(down), activation_name(experts.act_fn))
        _prove(experts, kernel)
    except (ValueError, AttributeError, TypeError) as error:
        _log.debug("experts without a kernel: %s", error)
        return None
    return kernel


def _prove(experts: Any, replacement: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Compare a replacement with the experts' own forward on random rows.

    Raises:
        ValueError: they disagree.
    """
    num_experts, width = experts.down_proj.shape[0], experts.down_proj.shape[1 + experts.is_transposed]
    num_tokens, num_chosen = 5, min(3, num_experts)
    scores = random_rows(num_tokens, num_experts).softmax(-1)
    weights, chosen = scores.topk(num_chosen, dim=-1)
    hidden = random_rows(num_tokens, width)
    if not agree(replacement(hidden, chosen, weights), experts(hidden, chosen, weights)):
        raise ValueError(f"{type(experts).__name__} computes something else")
