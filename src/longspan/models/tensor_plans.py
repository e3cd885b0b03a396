"""Which weights of a model the processes of a rank share, and how each of them is cut.

Holds Transformers' plans as we read them, and what they lack. Must not know processes, sizes, or how a weight is cut.
Read next: `longspan.models.tensor_cuts`, one function per `Cut`; `longspan.models.tensor_parallel`, which calls them.

Note [Plans]
    Transformers says for every family which weights go together (`tp_plan`), in styles for its own tensors. Some of
    these gather a product and go on with all heads in every process: behind one matrix for several things, whose parts
    do not lie one after the other, and before a norm over all heads. Here such a matrix is cut in each of the things it
    holds, and such a norm adds its squares over the processes (`longspan.models.part_norms`):

        Transformers' plan                               what it means here
        qkv_proj        colwise_gather_output            QKV: rows of a part's queries, of its keys, of its values
        gate_up_proj    colwise_gather_output            GATE_UP: a part's rows of the upper half, and of the lower
        q_proj          colwise_gather_output            ROWS, and NORM of the norm beside it
        o_proj          rowwise_split_input              COLUMNS

    Families whose plan passes over attention have one here (`OWN_PLANS`). What no plan names is whole in each process.
"""

import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple

from torch import nn


class Cut(Enum):
    """How a weight is cut. Rows and columns are those of [out, in]."""

    ROWS = "rows"
    """Rows of a matrix, with its bias."""
    COLUMNS = "columns"
    """Columns of a matrix; parts of its output are added."""
    LOGITS = "logits"
    """Rows of the output embeddings, joined in the process that samples."""
    GATE_UP = "gate_up"
    """Rows of two matrices that lie one above the other."""
    QKV = "qkv"
    """Rows of the queries', keys' and values' matrices that lie one above the other."""
    EXPERTS = "experts"
    """Inner width of all experts of a mixture; parts of the output are added."""
    HEADS = "heads"
    """Entries of a parameter that has one per head, such as sinks."""
    HEAD_NORMS = "head_norms"
    """Norms of a list that has one per head."""
    NORM = "norm"
    """Weights of an RMS norm over a width that is cut, whose squares are added."""


class CutModule(NamedTuple):
    """A module with weights that are cut."""

    name: str
    """Name of the module in the model; of the parameter, for `Cut.HEADS`."""
    module: Any
    cut: Cut


class UnknownStyleError(Exception):
    """Transformers' plan cuts a module in a way that is not known here."""

    def __init__(self, name: str, style: str) -> None:
        super().__init__(f"cuts {name} as {style!r}")


_WHOLE = frozenset({"replicated_with_grad_allreduce", "embedding_rowwise", "local_params"})
"""Styles of modules whose own weights stay whole here: norms per head; embeddings, which are read one row per token and
often serve as output embeddings too; and modules with parameters that have a style of their own."""

_EXPERTS, _GATHERED, _SPLIT = "moe_tp_experts", "colwise_gather_output", "rowwise_split_input"

_ATTENTION = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.o_proj": "rowwise",
}
_MLP = {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
_GRANITE_SHARED = {"shared_mlp.input_linear": "gate_up", "shared_mlp.output_linear": "rowwise"}

OWN_PLANS: Mapping[str, Mapping[str, str]] = {
    "afmoe": {
        **_ATTENTION,
        **_MLP,
        "self_attn.gate_proj": "colwise",
        "mlp.shared_experts.gate_proj": "colwise",
        "mlp.shared_experts.up_proj": "colwise",
        "mlp.shared_experts.down_proj": "rowwise",
    },
    "bitnet": {**_ATTENTION, **_MLP},
    "gpt_oss": {**_ATTENTION, "self_attn.sinks": "colwise", "mlp.experts": _EXPERTS},
    "granitemoe": _ATTENTION,
    "granitemoe_swa": _GRANITE_SHARED,
    "granitemoeshared": {**_ATTENTION, **_GRANITE_SHARED},
    "hunyuan_v1_dense": {**_ATTENTION, **_MLP},
    "hunyuan_v1_moe": {
        **_ATTENTION,
        "mlp.shared_mlp.gate_proj": "colwise",
        "mlp.shared_mlp.up_proj": "colwise",
        "mlp.shared_mlp.down_proj": "rowwise",
    },
    "phimoe": _ATTENTION,
    "stablelm": {**_ATTENTION, **_MLP},
}
"""Model type: styles of a layer's modules, beside those of Transformers' own plan, which lacks them."""

_INPUT_OF_NORM = {
    "q_norm": ("q_proj", "out_features"),
    "k_norm": ("k_proj", "out_features"),
    "q_layernorm": ("q_proj", "out_features"),
    "k_layernorm": ("k_proj", "out_features"),
    "attn_sub_norm": ("o_proj", "in_features"),
    "ffn_sub_norm": ("down_proj", "in_features"),
}
"""Norms between two products: the matrix beside, and which of its widths the norm's input has."""


def cut_modules(model: Any) -> list[CutModule]:
    """Find what is cut in a whole model.

    Raises:
        UnknownStyleError: Transformers' plan names a style that is not known.
    """
    plan, head = _plan_of(model), model.get_output_embeddings()
    found: dict[str, CutModule] = {}
    for name, module in model.named_modules():
        style = plan.get(pattern(name))
        if style is not None and style not in _WHOLE:
            found[name] = CutModule(name, module, _cut_of(name, module, style, is_head=module is head))
    heads = [
        CutModule(name, model.get_submodule(name.rpartition(".")[0]), Cut.HEADS)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and plan.get(pattern(name)) == "colwise"
    ]
    norms = [norm for name, module in model.named_modules() for norm in _norms_of(name, module, found)]
    return [*heads, *norms, *found.values()]


def pattern(name: str) -> str:
    """Name of a module in Transformers' plans, which say `*` for the number of a layer."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _plan_of(model: Any) -> dict[str, str]:
    """Styles of Transformers and our own by pattern."""
    own = OWN_PLANS.get(model.config.model_type, {})
    return {**(model.tp_plan or {}), **{f"model.layers.*.{name}": style for name, style in own.items()}}


def _cut_of(name: str, module: Any, style: str, *, is_head: bool) -> Cut:
    last = name.rpartition(".")[2]
    if style == _EXPERTS and _is_mixture(module):
        return Cut.EXPERTS
    if isinstance(module, nn.Linear):
        if style == "colwise" or (style == _GATHERED and last in ("q_proj", "k_proj", "v_proj")):
            return Cut.ROWS
        if style == "rowwise" or (style == _SPLIT and last in ("o_proj", "down_proj")):
            return Cut.COLUMNS
        if style == _GATHERED and is_head:
            return Cut.LOGITS
        if style == "gate_up" or (style == _GATHERED and last == "gate_up_proj"):
            return Cut.GATE_UP
        if style == _GATHERED and last == "qkv_proj":
            return Cut.QKV
    raise UnknownStyleError(name, style)


def _is_mixture(module: Any) -> bool:
    """Whether a module holds experts that are gated MLPs, all in one weight, with what Transformers says of these."""
    names = {name for name, _ in module.named_parameters()}
    wanted = {"gate_up_proj", "down_proj"}
    if getattr(module, "has_bias", False):
        wanted |= {"gate_up_proj_bias", "down_proj_bias"}
    return names == wanted


def _norms_of(name: str, parent: Any, found: Mapping[str, CutModule]) -> Iterator[CutModule]:
    """Find the norms of a module that are cut: all but those of each head alone with the same weights."""
    for norm_name, (linear_name, width_name) in _INPUT_OF_NORM.items():
        norm, linear = getattr(parent, norm_name, None), found.get(f"{name}.{linear_name}")
        if norm is None or linear is None:
            continue
        weight, width = getattr(norm, "weight", None), getattr(linear.module, width_name)
        if isinstance(getattr(norm, "norms", None), nn.ModuleList):
            yield CutModule(f"{name}.{norm_name}", norm, Cut.HEAD_NORMS)
        elif weight is not None and weight.ndim == 2:
            yield CutModule(f"{name}.{norm_name}.weight", norm, Cut.HEADS)
        elif weight is not None and len(weight) == width and width != getattr(parent, "head_dim", None):
            yield CutModule(f"{name}.{norm_name}", norm, Cut.NORM)
