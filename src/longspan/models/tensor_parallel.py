"""One process's part of a model whose weights several processes of a rank share.

Holds which weights are cut and how, the places where parts are put together, and the refusal of models that cannot be
cut. Must not know plans, pages, or how processes reach each other.
Read next: `longspan.comm.peers`, the sums; `longspan.models.inspect`, which reads the facts of a part off a cut model;
docs/tensor-parallel.md.

Note [Parts of a layer]
    Transformers says for every family which weights go together (`tp_plan`). Two processes, a layer of four heads:

        process   q, k, v, gate, up (colwise)        attention            o, down (rowwise)            then
        0         rows of heads 0, 1                 heads 0, 1, its KV   columns of heads 0, 1        sum
        1         rows of heads 2, 3                 heads 2, 3, its KV   columns of heads 2, 3        sum

    Rows and columns are those of the weight [out, in]. Each process has the whole input of a layer and, behind each
    sum, the whole output; what a plan does not name is whole in each. A bias behind a sum is added once, to the sum.
    Where there are fewer KV heads than processes, neighbours have the same one. The vocabulary's logits are cut as
    well, and joined in the first process, which samples.

    A part is copied and the rest let go, one weight after the other; embeddings stay as they are, and logits that are
    tied to them use their rows.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from msgspec import structs
from torch import Tensor, nn

from longspan.comm.peers import Peers, span
from longspan.config import MAX_RANKS
from longspan.costmodel.shapes import is_divisible
from longspan.errors import UnsupportedModelError
from longspan.kv.layout import KVGroup, KVLayout
from longspan.types import ModelSpec

JOINT = "longspan_joint"
"""Attribute of a module whose output is a part of a sum: its `Joint`."""

_PEERS = "longspan_peers"
"""Attribute of a cut model: its `PartPeers`."""

_WHOLE = frozenset({"replicated_with_grad_allreduce", "embedding_rowwise"})
"""Styles of Transformers' plans whose weights stay whole here: norms per head, and embeddings, which are read one row
per token and often serve as output embeddings too."""

_EXPERTS = "moe_tp_experts"
_LOGITS = "colwise_gather_output"
_KV_NAMES = ("k_proj", "v_proj")


class Part(NamedTuple):
    """Which part of a model a process has."""

    tp_index: int
    """Position of the process in its rank."""
    size: int
    """Processes of the rank."""

    def of(self, width: int) -> slice:
        """This part of so many rows or columns."""
        return span(width, self.tp_index, self.size)

    def rows(self, width: int, least: int) -> slice:
        """This part of so many rows, `least` of which stay together: several parts may have the same ones."""
        count = max(width // self.size, least)
        first = self.of(width).start // count * count
        return slice(first, first + count)


class PartPeers:
    """The other processes of a part's rank; until they are there, sums are of this part alone."""

    peers: Peers | None = None

    def sum(self, part: Tensor) -> Tensor:
        return part if self.peers is None else self.peers.sum(part)

    def gather(self, part: Tensor, width: int) -> Tensor:
        return part if self.peers is None else self.peers.gather(part, width)


class Joint(NamedTuple):
    """Place behind a module where the parts of all processes are added."""

    peers: PartPeers
    bias: Tensor | None
    """Bias of the module, which is added to the sum."""

    def __call__(self, part: Tensor) -> Tensor:
        """Add the parts, and the bias."""
        total = self.peers.sum(part)
        return total if self.bias is None else total + self.bias


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
    peers, embeddings = PartPeers(), model.get_input_embeddings()
    for name, module, style in _cut_modules(model):
        if style == "colwise":
            _cut_rows_(module, part.rows(module.out_features, _head_width(name, layouts)))
        elif style == "rowwise":
            _cut_columns_(module, part.of(module.in_features))
            bias = None if module.bias is None else module.bias.data
            module.register_parameter("bias", None)
            _join_(module, Joint(peers, bias))
        elif style == _LOGITS:
            _cut_logits_(module, embeddings, part, peers)
        else:
            _cut_experts_(module, part)
            _join_(module, Joint(peers, None))
    setattr(model, _PEERS, peers)


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
    modules = _cut_modules(model)
    for name, module, style in modules:
        if not _is_known(module, style, is_head=module is model.get_output_embeddings()):  # type: ignore[operator]
            raise _refusal(size, f"{spec.architecture}, in which Transformers' plan cuts {name} as {style!r}")
    if not any(style == "colwise" for _, _, style in modules):
        raise _refusal(size, f"{spec.architecture}, for which Transformers has no plan that cuts attention")
    widths = sorted({width for name, module, style in modules for width in _widths(name, module, style)})
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
            raise _refusal(size, f"{whole.architecture}, for which Transformers has no plan that cuts attention")


def bias_behind(linear: Any) -> Tensor | None:
    """Bias that is added to a linear layer's product, or to the sum of its parts."""
    joint: Joint | None = getattr(linear, JOINT, None)
    bias: Tensor | None = linear.bias if joint is None else joint.bias
    return bias


def _refusal(size: int, why: str, legal: str = "1") -> UnsupportedModelError:
    return UnsupportedModelError(f"tensor_parallel_size: got {size} with {why}, legal is {legal}")


def _cut_modules(model: Any) -> list[tuple[str, Any, str]]:
    """Modules whose weights are cut: name, module, style of Transformers' plan."""
    styles = [(name, module, model.tp_plan.get(_pattern(name))) for name, module in model.named_modules()]
    return [(name, module, style) for name, module, style in styles if style not in (None, *_WHOLE)]


def _is_known(module: nn.Module, style: str, *, is_head: bool) -> bool:
    """Whether `cut_` knows how to cut a module."""
    if style == _EXPERTS:
        names = {name for name, _ in module.named_parameters()}
        return names == {"gate_up_proj", "down_proj"} and not getattr(module, "is_transposed", False)
    return isinstance(module, nn.Linear) and style in ("colwise", "rowwise", *[_LOGITS] * is_head)


def _pattern(name: str) -> str:
    """Name of a module in Transformers' plans, which say `*` for the number of a layer."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _head_width(name: str, layouts: Mapping[int, KVLayout]) -> int:
    """Rows of a matrix that stay together where there are fewer KV heads than parts."""
    layer = re.search(r"\.(\d+)\.", name)
    layout = None if layer is None else layouts.get(int(layer[1]))
    last = name.rpartition(".")[2]
    if layout is None or last not in _KV_NAMES:
        return 1
    return layout.k_width if last == "k_proj" else layout.v_width


def _widths(name: str, module: Any, style: str) -> list[int]:
    """Numbers of rows or columns that parts must divide; heads are looked at elsewhere."""
    if style == "colwise" and name.rpartition(".")[2] not in _KV_NAMES:
        return [module.out_features]
    if style == "rowwise":
        return [module.in_features]
    return [module.down_proj.shape[-1]] if style == _EXPERTS else []


def _cut_rows_(module: nn.Linear, rows: slice) -> None:
    module.weight = _kept(module.weight, rows)
    if module.bias is not None:
        module.bias = _kept(module.bias, rows)
    module.out_features = len(module.weight)


def _cut_logits_(module: nn.Linear, embeddings: Any, part: Part, peers: PartPeers) -> None:
    width, rows, weight = module.out_features, part.of(module.out_features), module.weight
    _cut_rows_(module, rows)
    if weight is embeddings.weight:  # which stay whole
        module.weight = nn.Parameter(weight.data[rows], requires_grad=False)
    module.register_forward_hook(lambda _module, _args, out: peers.gather(out, width))


def _cut_columns_(module: nn.Linear, columns: slice) -> None:
    module.weight = nn.Parameter(module.weight.data[:, columns].contiguous(), requires_grad=False)
    module.in_features = module.weight.shape[1]


def _cut_experts_(module: Any, part: Part) -> None:
    """Cut the inner width of all experts of a mixture."""
    gate, up = module.gate_up_proj.data.chunk(2, dim=1)  # [E, inner, hidden]
    rows = part.of(gate.shape[1])
    module.gate_up_proj = nn.Parameter(torch.cat([gate[:, rows], up[:, rows]], dim=1), requires_grad=False)
    down = module.down_proj.data[..., rows].contiguous()  # [E, hidden, inner]
    module.down_proj = nn.Parameter(down, requires_grad=False)


def _kept(weight: Tensor, rows: slice) -> nn.Parameter:
    """Rows of a weight in memory of their own, so that the rest can go."""
    return nn.Parameter(weight.data[rows].clone(), requires_grad=False)


def _join_(module: nn.Module, joint: Joint) -> None:
    setattr(module, JOINT, joint)
    module.register_forward_hook(lambda _module, _args, out: joint(out))
