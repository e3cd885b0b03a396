"""Models whose weights several processes of a rank share: what each has, and the refusal of those that cannot be cut.

Holds the order of the cuts, and the checks. Must not know plans of steps, pages, or how processes reach each other.
Read next: `longspan.models.tensor_plans`, which weights are cut; `longspan.models.tensor_cuts`, how;
`longspan.models.tensor_part`, the sums; `longspan.models.inspect`, which reads the facts of a part off a cut model;
docs/tensor-parallel.md.

Note [Parts of a layer]
    Two processes, a layer of four heads:

        process   q, k, v, gate, up (rows)           attention            o, down (columns)            then
        0         rows of heads 0, 1                 heads 0, 1, its KV   columns of heads 0, 1        sum
        1         rows of heads 2, 3                 heads 2, 3, its KV   columns of heads 2, 3        sum

    Rows and columns are those of the weight [out, in]. Each process has the whole input of a layer and, behind each
    sum, the whole output; what a plan does not name is whole in each. A bias behind a sum is added once, to the sum.
    Where there are fewer KV heads than processes, neighbours have the same one. What belongs to one head (a sink, or a
    norm of its own) goes with it. A norm over all heads has a sum of its own. The vocabulary's logits are cut as well,
    and joined in the first process, which samples; embeddings stay whole.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import structs
from torch import nn

from longspan.comm.peers import Peers
from longspan.config import MAX_RANKS
from longspan.costmodel.shapes import is_divisible
from longspan.errors import UnsupportedModelError
from longspan.kv.layout import KVGroup, KVLayout
from longspan.models.part_norms import cut_norm_, norm_form
from longspan.models.tensor_cuts import (
    count_heads_,
    cut_columns_,
    cut_experts_,
    cut_gate_up_,
    cut_head_norms_,
    cut_heads_,
    cut_logits_,
    cut_qkv_,
    cut_rows_,
    inner_width,
)
from longspan.models.tensor_part import Part, PartPeers
from longspan.models.tensor_plans import Cut, CutModule, UnknownStyleError, cut_modules
from longspan.types import ModelSpec

_PEERS = "longspan_peers"
"""Attribute of a cut model: its `PartPeers`."""

_KV_WIDTHS = {"k_proj": "k_width", "k_norm": "k_width", "v_proj": "v_width"}
"""Modules whose rows are those of KV heads: the width of a head in a `KVLayout`."""


def copy_of(model: nn.Module) -> nn.Module:
    """Return a model with the same weights, not copied, and with modules of its own, which can be cut.

    Speed-ups of the model would stay bound to its own modules.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def connect_(model: nn.Module, peers: Peers) -> None:
    """Let a cut model's sums reach the other processes of its rank."""
    getattr(model, _PEERS).peers = peers


def cut_(model: Any, part: Part, groups: Sequence[KVGroup]) -> None:
    """Leave one part of a model, whose sums are this part's alone until `connect_`.

    Args:
        model: whole model that `check_divisible` admits, with weights or on the meta device, without speed-ups.
        part: which part.
        groups: KV groups of the whole model, or of a part: the widths of heads count.
    """
    layouts = {layer: group.spec.layout for group in groups for layer in group.layers}
    peers = PartPeers()
    modules = cut_modules(model)
    for one in modules:
        _cut_module_(model, one, part, layouts, peers)
    for name, _, cut in modules:
        parent, _, last = name.rpartition(".")
        if cut is Cut.QKV or (cut is Cut.ROWS and last == "q_proj"):
            count_heads_(model.get_submodule(parent), part.size)
    setattr(model, _PEERS, peers)


def _cut_module_(model: Any, one: CutModule, part: Part, layouts: Mapping[int, KVLayout], peers: PartPeers) -> None:
    """Cut one module."""
    name, module, cut = one
    parent, _, last = name.rpartition(".")
    match cut:
        case Cut.ROWS:
            cut_rows_(module, part.rows(module.out_features, _least_rows(name, layouts)))
        case Cut.COLUMNS:
            cut_columns_(module, part.of(module.in_features), peers)
        case Cut.LOGITS:
            cut_logits_(module, model.get_input_embeddings(), part, peers)
        case Cut.GATE_UP:
            cut_gate_up_(module, part)
        case Cut.QKV:
            cut_qkv_(model.get_submodule(parent), module, part)
        case Cut.EXPERTS:
            cut_experts_(module, part, peers)
        case Cut.HEADS:
            cut_heads_(module, last, part)
        case Cut.HEAD_NORMS:
            cut_head_norms_(module, part)
        case Cut.NORM:
            rows = part.rows(len(module.weight), _least_rows(name, layouts))
            cut_norm_(module, rows, peers.sum, part.size)


def check_divisible(model: nn.Module, spec: ModelSpec, size: int) -> None:
    """Refuse a model that cannot be cut into `size` parts.

    Args:
        model: whole model, on the meta device.
        spec: its facts.
        size: processes of a rank.

    Raises:
        UnsupportedModelError: names the sizes that work.
    """
    if spec.state_groups:
        raise _refusal(size, "recurrent layers, whose states no plan cuts")
    if any(group.spec.latent is not None for group in spec.kv_groups):
        raise _refusal(size, "latents, which every process would need")
    try:
        modules = cut_modules(model)
        norms = {(type(one.module), len(one.module.weight)): one.module for one in modules if one.cut is Cut.NORM}
        for norm in norms.values():
            norm_form(norm)
    except UnknownStyleError as error:
        raise _refusal(size, f"{spec.architecture}, in which Transformers' plan {error}") from error
    except ValueError as error:
        raise _refusal(size, f"{spec.architecture}, whose heads go through {error}") from error
    if not any(cut in (Cut.ROWS, Cut.QKV) for _, _, cut in modules):
        raise _refusal(size, f"{spec.architecture}, for which there is no plan that cuts attention")
    widths = sorted({width for one in modules for width in _widths(one)})
    legal = [
        number
        for number in range(1, MAX_RANKS + 1)
        if all(is_divisible(group, number) for group in spec.kv_groups) and not any(width % number for width in widths)
    ]
    if size not in legal:
        heads = {(group.num_query_heads, group.spec.layout.num_kv_heads) for group in spec.kv_groups}
        shown = " and ".join(f"{query} query and {kv} KV heads" for query, kv in sorted(heads))
        why = f"{shown}, and weights of {', '.join(map(str, widths))} rows or columns"
        raise _refusal(size, why, ", ".join(map(str, legal)))


def check_part(whole: ModelSpec, part: ModelSpec, size: int) -> None:
    """Check that the attention calls of a cut model are a part of the whole model's.

    Raises:
        UnsupportedModelError: heads are not what they should be, so that something was not cut as was meant.
    """
    layers = [{layer: group for group in spec.kv_groups for layer in group.layers} for spec in (whole, part)]
    for layer, group in layers[0].items():
        cut, kv_heads = layers[1][layer], max(1, group.spec.layout.num_kv_heads // size)
        wanted = structs.replace(group.spec, layout=group.spec.layout.with_kv_heads(kv_heads))
        if (cut.spec, cut.num_query_heads * size) != (wanted, group.num_query_heads):
            raise _refusal(size, f"{whole.architecture}, for which there is no plan that cuts attention")


def _refusal(size: int, why: str, legal: str = "1") -> UnsupportedModelError:
    return UnsupportedModelError(f"tensor_parallel_size: got {size} with {why}, legal is {legal}")


def _least_rows(name: str, layouts: Mapping[int, KVLayout]) -> int:
    """Rows of a module that stay together where there are fewer KV heads than parts."""
    layer = re.search(r"\.(\d+)\.", name)
    layout = None if layer is None else layouts.get(int(layer[1]))
    width = _KV_WIDTHS.get(name.rpartition(".")[2])
    return 1 if layout is None or width is None else getattr(layout, width)


def _widths(one: CutModule) -> list[int]:
    """Numbers of rows or columns that parts must divide; heads are looked at elsewhere."""
    name, module, cut = one
    match cut:
        case Cut.ROWS:
            return [] if name.rpartition(".")[2] in _KV_WIDTHS else [module.out_features]
        case Cut.COLUMNS:
            return [module.in_features]
        case Cut.GATE_UP:
            return [module.out_features // 2]
        case Cut.EXPERTS:
            return [inner_width(module)]
        case _:
            return []
