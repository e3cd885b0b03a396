"""Fused decoder layers for float32 on a CPU: a few kernel calls instead of forty small operators.

Holds the replacement of a layer's forward. Must not know plans, ranks or strategies.
Read next: `longspan.native.layer`, for few rows; `longspan.models.fused_layer_gemm`, for more;
`docs/decisions/0014-fused-layers.md` for the gain.

Note [Nothing is assumed]
    A layer is read by the names of its modules, and every guess (what scales a norm, which activation, whether there is
    a rotary embedding) is held against the modules themselves. Then all forms of the layer compute random rows. Where
    anything is unknown, or they disagree, the model keeps its own layers. So a family that is built differently is
    slower, never wrong.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longspan.models import fused_layer_adapted, fused_layer_gemm, fused_layer_part
from longspan.models.adapters import WITH_ADAPTERS
from longspan.models.fused_layer_part import Joints
from longspan.models.hook import AttendFunction, AttentionCall
from longspan.models.last_layer import READ_ROWS
from longspan.models.packed_linear import PackedLinear
from longspan.models.same_result import activation_name, agree, random_rows
from longspan.models.tensor_part import JOINT, Joint, bias_behind
from longspan.native.kernels import MAX_LINEAR_ROWS, MAX_ROWS
from longspan.native.layer import ACTIVATIONS, FusedLayer, LayerWeights
from longspan.native.matrix import Matrix

_log = logging.getLogger(__name__)

FAR = 9973
"""Distance between the positions of the rows that prove a layer: together they span a million tokens, so that a factor
that depends on the position beyond some length shows."""


def fuse_layers_(model: nn.Module) -> int:
    """Let a loaded model's decoder layers use the kernels, if these are proven to compute the same.

    Args:
        model: model in evaluation mode, with the `longspan` attention function and its weights in place.

    Returns:
        Number of layers that use the kernels: all or none.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return 0
    forwards: list[Callable[..., Tensor]] = []
    with torch.inference_mode():
        for layer in layers:
            try:
                forwards.append(_fused_forward(layer, is_last=layer is layers[-1]))
            except (_UnknownLayerError, ValueError, AttributeError, TypeError, RuntimeError) as error:
                _log.debug("layers are not fused: %s", error)
                return 0
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
    return len(layers)


class _UnknownLayerError(Exception):
    """A layer for which the kernels are not proven."""


def _fused_forward(layer: Any, *, is_last: bool) -> Callable[..., Tensor]:
    """Make a forward of the layer that gives its rows to the kernels."""
    fused, joints = _fused(layer), _joints(layer)
    call, angles_width = _prove(layer, fused, joints)
    own_forward: Callable[..., Tensor] = layer.forward

    def compute(
        has_adapters: bool,
        hidden_states: Tensor,
        *args: object,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        longspan_attend: AttendFunction | None = None,
        **others: Any,
    ) -> Tensor:
        if (
            longspan_attend is None
            or position_embeddings is None
            or position_embeddings[0].shape[-1] != angles_width  # such as those of a part of a head
        ):
            return own_forward(
                hidden_states,
                *args,
                position_embeddings=position_embeddings,
                longspan_attend=longspan_attend,
                **others,
            )
        x = hidden_states[0].contiguous()
        cos, sin = (_full_width(angles[0], fused.width) for angles in position_embeddings)
        if has_adapters:
            q, k, v = fused_layer_adapted.before_attention(fused, layer.self_attn, x, cos, sin)
            behind = partial(fused_layer_adapted.behind_attention, fused, layer)
        else:
            q, k, v = _before_attention(fused, x, cos, sin)
            behind = partial(_behind_attention, fused, joints)
        attended = longspan_attend(replace(call, q=q, k=k, v=v)).contiguous()
        read = others.get(READ_ROWS) if is_last else None
        mlp = None if fused.inner else partial(_compute_mlp, layer.mlp, read, len(x))
        if read is None:
            return behind(attended, x, mlp)[None]
        return x.index_copy(0, read, behind(attended[read], x[read], mlp))[None]

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return compute(False, *args, **kwargs)

    setattr(forward, WITH_ADAPTERS, partial(compute, True))
    return forward


def _full_width(angles: Tensor, width: int) -> Tensor:
    """Return cosines or sines [T, D] of a rotary embedding from [T, D], or from [T, D / 2], the half that repeats."""
    return torch.cat([angles, angles], dim=-1) if 2 * angles.shape[-1] == width else angles.contiguous()


def _before_attention(fused: FusedLayer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if fused.takes(x.shape[0]):
        return fused.before_attention(x, cos, sin)
    return fused_layer_gemm.before_attention(fused, x, cos, sin)


def _behind_attention(
    fused: FusedLayer, joints: Joints | None, attended: Tensor, x: Tensor, mlp: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Compute what lies behind attention.

    Args:
        fused: layer.
        joints: sums of a layer of which this process has a part; None if it has the whole layer.
        attended: [T, H, D].
        x: [T, hidden] input of the layer.
        mlp: function from [T, hidden] to [T, hidden] of a layer without the MLP's weights, else None.

    Returns:
        [T, hidden].
    """
    if joints is not None:
        return fused_layer_part.behind_attention(fused, joints, attended, x, mlp)
    is_few = fused.takes(x.shape[0])
    if mlp is None:
        return fused.behind_attention(attended, x) if is_few else fused_layer_gemm.behind_attention(fused, attended, x)
    if is_few:
        added, normed = fused.project_attention(attended, x)
    else:
        added, normed = fused_layer_gemm.project_attention(fused, attended, x)
    y = torch.empty_like(x)
    if len(x):
        fused.add_mlp(mlp(normed), added, y)
    return y


def _compute_mlp(mlp: Callable[..., Any], read: Tensor | None, num_rows: int, normed: Tensor) -> Tensor:
    """Call a layer's own MLP, such as a mixture of experts.

    Args:
        mlp: module from [1, num_rows, hidden] to the same shape, or to a tuple that begins with that. In the last layer
            it skips the rows that are not read by itself, and wants all of them.
        read: [n] rows that are read, or None for all.
        num_rows: number of rows of the step.
        normed: [n, hidden] rows that are read.

    Returns:
        [n, hidden], contiguous.
    """
    rows = normed if read is None else normed.new_zeros(num_rows, normed.shape[1]).index_copy(0, read, normed)
    out: Tensor | tuple[Tensor, ...] = mlp(rows[None])
    rows = (out[0] if isinstance(out, tuple) else out)[0]
    return rows.contiguous() if read is None else rows[read]


def _fused(layer: Any) -> FusedLayer:
    """Convert a layer for the kernels.

    Raises:
        _UnknownLayerError: the layer is built in an unknown way.
        ValueError: the kernels do not take its weights.
    """
    attention, mlp = layer.self_attn, layer.mlp
    is_sandwich = hasattr(layer, "pre_feedforward_layernorm")  # norms before and behind both halves
    norms = {"input_layernorm", "post_attention_layernorm"}
    if is_sandwich:
        norms |= {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
    _only(layer, {"self_attn", "mlp", *norms})
    _only(attention, {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"})
    is_mixture = hasattr(mlp, "experts")
    if not is_mixture:
        _only(mlp, {"gate_proj", "up_proj", "down_proj", "act_fn"})
        if any(bias_behind(linear) is not None for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
            raise _UnknownLayerError("a bias in the MLP")
    before, behind = layer.input_layernorm, layer.post_attention_layernorm
    before_mlp = layer.pre_feedforward_layernorm if is_sandwich else behind
    over_hidden = [before, behind, *([before_mlp, layer.post_feedforward_layernorm] if is_sandwich else [])]
    per_head = [norm for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None)) is not None]
    weights = LayerWeights(
        before_attention=_scale(before),
        q=_matrix(attention.q_proj),
        k=_matrix(attention.k_proj),
        v=_matrix(attention.v_proj),
        q_bias=attention.q_proj.bias,
        k_bias=attention.k_proj.bias,
        v_bias=attention.v_proj.bias,
        q_norm=_scale(attention.q_norm) if per_head else None,
        k_norm=_scale(attention.k_norm) if per_head else None,
        o=_matrix(attention.o_proj),
        o_bias=bias_behind(attention.o_proj),
        behind_attention=_scale(behind) if is_sandwich else None,
        before_mlp=_scale(before_mlp),
        gate=None if is_mixture else _matrix(mlp.gate_proj),
        up=None if is_mixture else _matrix(mlp.up_proj),
        down=None if is_mixture else _matrix(mlp.down_proj),
        behind_mlp=_scale(layer.post_feedforward_layernorm) if is_sandwich else None,
    )
    return FusedLayer(
        weights,
        width=attention.head_dim,
        has_rope=bool(getattr(attention, "use_rope", True)),
        activation=ACTIVATIONS[0] if is_mixture else activation_name(mlp.act_fn),
        epsilon=_epsilon(over_hidden),
        head_epsilon=_epsilon(per_head) if per_head else 0.0,
    )


def _joints(layer: Any) -> Joints | None:
    """Return the sums of a layer of which this process has a part; None if it has the whole layer.

    Raises:
        _UnknownLayerError: only one half of the layer is cut.
    """
    attention: Joint | None = getattr(layer.self_attn.o_proj, JOINT, None)
    down = getattr(layer.mlp, "down_proj", None)
    mlp: Joint | None = getattr(down, JOINT, None)
    if down is not None and (attention is None) != (mlp is None):
        raise _UnknownLayerError("a layer of which one half is cut")
    return None if attention is None else Joints(attention, mlp)


def _matrix(linear: Any) -> Matrix:
    """Return the weights of a linear layer."""
    return linear.matrix if isinstance(linear, PackedLinear) else linear.weight


def _only(module: nn.Module, known: set[str]) -> None:
    """Raise `_UnknownLayerError` if a module has a part with an unknown name."""
    unknown = {name for name, _ in module.named_children()} - known
    if unknown:
        raise _UnknownLayerError(f"{type(module).__name__} with {sorted(unknown)}")


def _epsilon(norms: Sequence[Any]) -> float:
    """Return the epsilon of norms, which keeps them from dividing by 0."""
    found = {norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps for norm in norms}
    if len(found) > 1:
        raise _UnknownLayerError(f"norms with {sorted(found)}")
    return float(found.pop())


def _scale(norm: Any) -> Tensor:
    """Return the factor of an RMS norm: its weight, or its weight plus one."""
    x = random_rows(2, norm.weight.shape[0])
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _epsilon([norm]))
    scale: Tensor
    for scale in (norm.weight, norm.weight + 1):
        if agree(normed * scale, norm(x)):
            return scale
    raise _UnknownLayerError(type(norm).__name__)


def _prove(layer: Any, fused: FusedLayer, joints: Joints | None) -> tuple[AttentionCall, int]:
    """Compare all forms of the layer on random rows.

    Returns:
        The layer's attention call, in which everything but q, k and v is the same every time, and the width of the
        rotary embedding's cosines with which the forms agree.

    Raises:
        _UnknownLayerError: the forms disagree.
    """
    calls: list[AttentionCall] = []

    def attend(call: AttentionCall) -> Tensor:
        calls.append(call)
        group_size = call.q.shape[1] // call.k.shape[0]
        k, v = (tensor.transpose(0, 1).repeat_interleave(group_size, dim=1) for tensor in (call.k, call.v))
        return call.q + 2 * k + 3 * v  # [T, H, D], whatever depends on all three

    x = random_rows(MAX_LINEAR_ROWS + 1, fused.hidden)
    angles = random_rows(MAX_LINEAR_ROWS + 1, fused.width) * 3
    given = partial(
        layer,
        x[None],
        attention_mask=None,
        position_ids=torch.arange(len(x))[None] * FAR,
        longspan_attend=attend,
    )
    try:
        wanted = given(position_embeddings=(angles.cos()[None], angles.sin()[None]))
    except RuntimeError:  # this family says half of them
        angles = angles[:, : fused.width // 2]
        wanted = given(position_embeddings=(angles.cos()[None], angles.sin()[None]))
    (call,) = calls
    cos, sin = (_full_width(some, fused.width) for some in (angles.cos(), angles.sin()))
    for num_rows in (2, MAX_ROWS + 1, len(x)):  # few, some, and many
        q, k, v = _before_attention(fused, x[:num_rows], cos[:num_rows], sin[:num_rows])
        attended = attend(replace(call, q=q, k=k, v=v)).contiguous()
        mlp = None if fused.inner else partial(_compute_mlp, layer.mlp, None, num_rows)
        found = _behind_attention(fused, joints, attended, x[:num_rows], mlp)
        if not (torch.is_tensor(wanted) and wanted.shape[0] == 1 and agree(found, wanted[0, :num_rows])):
            raise _UnknownLayerError(f"{type(layer).__name__} computes something else")
        if joints is None:  # a part of a layer has no adapters
            again = fused_layer_adapted.before_attention(
                fused, layer.self_attn, x[:num_rows], cos[:num_rows], sin[:num_rows]
            )
            found = fused_layer_adapted.behind_attention(fused, layer, attended, x[:num_rows], mlp)
            if not all(agree(*pair) for pair in ((found, wanted[0, :num_rows]), *zip(again, (q, k, v), strict=True))):
                raise _UnknownLayerError(f"{type(layer).__name__} computes something else where rows have adapters")
    return call, angles.shape[-1]
