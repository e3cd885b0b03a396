"""Experts computed only for the tokens that chose them, where Transformers computes every expert for every token.

Holds the forward of Llama 4's mixtures. Must not know plans, ranks or rows.
Read next: `longspan.models.adaptations`; `longspan.models.experts`, which counts the experts that a token meets.

Transformers scales each token by its score for each expert, which is 0 for those that it did not choose, and runs all
experts on all tokens. Experts map 0 to 0, so those can be left out. Its other families do so, by functions that scale
what an expert returns; here each token is scaled before, and the functions get scores of 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from longspan.models.cpu_experts import compute_by_expert


def compute_chosen_experts_(model: Any) -> int:
    """Let the mixtures of a Llama 4 compute the chosen experts alone.

    Returns:
        Number of changed mixtures.
    """
    if model.config.model_type != "llama4_text":
        return 0
    mixtures = [layer.feed_forward for layer in model.model.layers if layer.is_moe_layer]
    for mixture in mixtures:
        experts: Any = mixture.experts
        # What Transformers' functions read of the modules that they serve.
        experts.has_gate, experts.has_bias, experts.has_post_expert_norm = True, False, False
        experts.is_transposed, experts.is_concatenated = True, True
        experts._is_expert_parallel = False
        experts._apply_gate = partial(_gated, experts.act_fn)
        experts.forward = partial(_experts, experts)
        mixture.forward = partial(_mixture, mixture)
    return len(mixtures)


def _gated(activation: Any, gate_up: Tensor) -> Tensor:
    """[n, 2 I] to [n, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    gated: Tensor = up * activation(gate)
    return gated


def _mixture(mixture: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Output [T, width] of a mixture, shared expert included, and the router's logits [T, experts]."""
    hidden = hidden_states.reshape(-1, mixture.hidden_dim)  # [T, width]
    scores, logits = mixture.router(hidden)
    chosen = torch.topk(logits, mixture.top_k, dim=1).indices  # [T, k], as the router finds them
    out = mixture.shared_expert(hidden)
    return out.add_(mixture.experts(hidden, chosen, scores.gather(1, chosen))), logits


def _experts(experts: Any, hidden: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
    """Sum [T, width] of what the chosen experts [T, k] make of the tokens [T, width] scaled by their scores [T, k]."""
    rows = (hidden[:, None] * scores[:, :, None]).flatten(0, 1)  # [T k, width]
    compute = _compute(hidden.device.type)
    each: Tensor = compute(experts, rows, chosen.reshape(-1, 1), torch.ones_like(scores).reshape(-1, 1))
    return each.view(*chosen.shape, hidden.shape[1]).sum(dim=1)


def _compute(device_type: str) -> Callable[..., Tensor]:
    """Function that computes one chosen expert per row."""
    if device_type == "cpu":
        return compute_by_expert
    # batched_mm runs on the meta device, and is far too slow to run; grouped_mm needs data.
    found: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS["batched_mm" if device_type == "meta" else "grouped_mm"]
    return found
