"""Cuts of a module's weights, one function per kind of `longspan.models.tensor_plans.Cut`.

Holds what is kept of a weight, and where. Must not know plans, pages, or how processes reach each other.
Read next: `longspan.models.tensor_part`; `longspan.models.tensor_parallel`, Note [Parts of a layer].

A part is copied and the rest let go, one weight after the other; logits that are tied to embeddings use their rows.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longspan.models.tensor_part import Joint, Part, PartPeers, join_

_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads")
"""Attributes of attention modules that count heads, where a family has them."""


def cut_rows_(module: nn.Linear, *runs: slice) -> None:
    """Keep runs of a matrix's rows, one behind the other, and the same of its bias."""
    module.weight = _rows_of(module.weight, runs)
    if module.bias is not None:
        module.bias = _rows_of(module.bias, runs)
    module.out_features = len(module.weight)


def cut_columns_(module: nn.Linear, columns: slice, peers: PartPeers) -> None:
    """Keep columns of a matrix, and add the parts of its output; its bias is added to the sum."""
    module.weight = nn.Parameter(module.weight.data[:, columns].contiguous(), requires_grad=False)
    module.in_features = module.weight.shape[1]
    bias = None if module.bias is None else module.bias.data
    module.register_parameter("bias", None)
    join_(module, Joint(peers, bias))


def cut_logits_(module: nn.Linear, embeddings: Any, part: Part, peers: PartPeers) -> None:
    """Keep rows of the output embeddings, and join the logits in the first process."""
    width, rows, weight = module.out_features, part.of(module.out_features), module.weight
    cut_rows_(module, rows)
    if weight is embeddings.weight:  # which stay whole
        module.weight = nn.Parameter(weight.data[rows], requires_grad=False)
    module.register_forward_hook(lambda _module, _args, out: peers.gather(out, width))


def cut_gate_up_(module: nn.Linear, part: Part) -> None:
    """Keep the same rows of both halves of a matrix, gate above up."""
    half = module.out_features // 2
    rows = part.of(half)
    cut_rows_(module, rows, _moved(rows, half))


def cut_qkv_(attention: Any, module: nn.Linear, part: Part) -> None:
    """Keep the rows of a part's queries, keys and values, which lie in this order.

    The module of attention tells them apart by numbers of heads: its own, and those of its config, of which it gets a
    copy.
    """
    kv_width = attention.num_key_value_heads * attention.head_dim
    width = module.out_features - 2 * kv_width
    keys = part.rows(kv_width, attention.head_dim)
    cut_rows_(module, part.of(width), _moved(keys, width), _moved(keys, width + kv_width))
    attention.config = copy.copy(attention.config)
    count_heads_(attention.config, part.size)


def cut_experts_(module: Any, part: Part, peers: PartPeers) -> None:
    """Cut the inner width of all experts of a mixture, and add the parts of its output.

    A bias of the inner width goes with it; that of the output stays in the first process, so that a sum has it once.
    """
    gate_up, down = module.gate_up_proj.data, module.down_proj.data
    is_transposed, rows = _is_transposed(module), part.of(inner_width(module))
    axis = 2 if is_transposed else 1
    is_concatenated = getattr(module, "is_concatenated", True)
    module.gate_up_proj = _gate_up(gate_up, rows, axis, is_concatenated)
    module.down_proj = kept(down[:, rows] if is_transposed else down[..., rows])
    if hasattr(module, "gate_up_proj_bias"):
        module.gate_up_proj_bias = _gate_up(module.gate_up_proj_bias.data, rows, 1, is_concatenated)
        if part.tp_index:
            module.down_proj_bias = nn.Parameter(torch.zeros_like(module.down_proj_bias), requires_grad=False)
    join_(module, Joint(peers, None))


def _gate_up(weight: Tensor, rows: slice, axis: int, is_concatenated: bool) -> nn.Parameter:
    """Keep the same rows of gate and up, which lie one behind the other, or in turn."""
    if not is_concatenated:
        return kept(weight.narrow(axis, 2 * rows.start, 2 * (rows.stop - rows.start)))
    halves = [half.narrow(axis, rows.start, rows.stop - rows.start) for half in weight.chunk(2, dim=axis)]
    return nn.Parameter(torch.cat(halves, dim=axis), requires_grad=False)


def cut_heads_(module: Any, name: str, part: Part) -> None:
    """Keep a part's heads of a parameter [H, ...]."""
    weight = getattr(module, name).data
    setattr(module, name, kept(weight[part.rows(len(weight), 1)]))


def cut_head_norms_(module: Any, part: Part) -> None:
    """Keep a part's heads of a list of norms."""
    module.norms = module.norms[part.rows(len(module.norms), 1)]


def count_heads_(holder: Any, size: int) -> None:
    """Let a module of attention, or its config, where it counts heads, count those of a part."""
    for name in _COUNTS:
        number = getattr(holder, name, None)
        if isinstance(number, int):
            setattr(holder, name, max(1, number // size))


def inner_width(module: Any) -> int:
    """Inner width of the experts of a mixture."""
    down: Tensor = module.down_proj
    return down.shape[1] if _is_transposed(module) else down.shape[2]


def _is_transposed(module: Any) -> bool:
    """Whether a mixture's weights are [E, hidden, 2 inner] and [E, inner, hidden], and not both turned."""
    return bool(module.gate_up_proj.shape[1] == module.down_proj.shape[2])


def _moved(rows: slice, start: int) -> slice:
    return slice(rows.start + start, rows.stop + start)


def _rows_of(weight: Tensor, runs: Sequence[slice]) -> nn.Parameter:
    if len(runs) == 1:
        return kept(weight.data[runs[0]])
    return nn.Parameter(torch.cat([weight.data[rows] for rows in runs]), requires_grad=False)


def kept(part: Tensor) -> nn.Parameter:
    """Part of a weight in memory of its own, so that the rest can go."""
    return nn.Parameter(part.clone(memory_format=torch.contiguous_format), requires_grad=False)
