"""Layers with a state, computed from the state before their rows: the change of modules that keep one in a cache.

Holds the stand-ins for a cache. Must not know plans, ranks or requests: whoever calls the model passes a `StepCache`.
Read next: `longspan.models.state_proof`, which proves that a module goes on from a state; `longspan.cp.relay`, which
computes with it; `longspan.models.adaptations`.

Modules of every family that keep a state (gated delta rule, Mamba 2, short convolution) do so by the same calls of
Transformers' cache, and go on from what it returns. A step packs rows of several requests, and a rank has some rows of
each. So a module is not called with the step's cache, but once for each run of rows, with a cache that holds the state
before them and takes that behind them. No family needs code of its own.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from longspan.cp.handover import Handover, State, StateByHeads
from longspan.cp.relay import ComputeLayer, Rows
from longspan.errors import UnsupportedModelError
from longspan.kv.state_layout import StateComponent, StateGroup
from longspan.models.row_products import RowProducts, find_products

CACHE_CALLS = ("update_conv_state", "update_recurrent_state")
"""Calls in a module's source that say that it keeps a state."""

TAKES_HEADS = "longspan_takes_heads"
"""Attribute of a module's class that computes a recurrence head by head: the state that its cache gives it may be a
`StateByHeads`."""

HEADED = ("gated_delta_rule", "kimi_delta_attention")
"""In the names of functions that compute a recurrence of independent heads, the first dimension of its state."""

RunLayer: TypeAlias = Callable[[int, ComputeLayer], Tensor]
"""Function of (layer, the layer's arithmetic) that returns output rows [T, out]."""

Key: TypeAlias = tuple[Literal["conv", "recurrent"], int]
"""Role and index of a tensor of a layer's state."""


class StepCache:
    """Stands where a model expects a cache. It stores no keys and values: attention has those of the step."""

    def __init__(self, layouts: Mapping[int, Sequence[StateComponent]], run_layer: RunLayer) -> None:
        """Take the layout of every layer's state, and what computes recurrent layers."""
        self._layouts, self._run_layer = layouts, run_layer

    def update(self, k: Tensor, v: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Return keys and values as they are."""
        return k, v

    def get_seq_length(self, _layer_idx: int = 0) -> int:
        """Return 0: nothing is stored."""
        return 0

    def get_query_offset(self, _layer_idx: int = 0) -> int:
        """Return 0, as for `get_seq_length`. Mask builders ask for it."""
        return 0

    def get_mask_sizes(self, query_len: int, _layer_idx: int = 0) -> tuple[int, int]:
        """Keys that queries see and the first one's position, without a cache."""
        return query_len, 0

    def run(
        self, layer: int, hidden: Tensor, forward: Callable[..., Any], products: RowProducts, cls: type[nn.Module]
    ) -> Tensor:
        """Compute a recurrent layer, for its module.

        Args:
            layer: layer of the model.
            hidden: [1, T, width] input.
            forward: the module's own.
            products: what is computed for all rows at once.
            cls: the module's class.
        """
        components, first = self._layouts[layer], products.first(hidden)
        takes_heads = hasattr(cls, TAKES_HEADS)

        def compute(rows: Rows, state: State, is_new: bool, handover: Handover | None) -> Tensor:
            if handover is not None and not takes_heads:
                handover.arrive()
            cache = LayerCache(components, state, is_new=is_new, handover=handover if takes_heads else None)
            with products.run({module: _some(out, rows) for module, out in first.items()}):
                out: Tensor = forward(_some(hidden, rows), cache=cache)
            return out[0] if rows.are_of_one else out[:, 0]

        return products.last(self._run_layer(layer, compute)[None])


def _some(hidden: Tensor, rows: Rows) -> Tensor:
    """Rows of [1, T, width], as a module takes them: [1, t, width] of one request, or [B, 1, width] of B."""
    some = hidden[0, rows.index]
    return some[None] if rows.are_of_one else some[:, None]


class LayerCache:
    """Stands where a module expects a cache: the state of one layer, of B requests."""

    def __init__(
        self, components: Sequence[StateComponent], state: State, *, is_new: bool, handover: Handover | None = None
    ) -> None:
        """Take a state.

        Args:
            components: its layout.
            state: [B, *shape] per component, which the module's calls change.
            is_new: whether there is none yet, and values of `state` do not count.
            handover: brings the state, and takes it on; None if it is there and stays.
        """
        self._tensors: dict[Key, Tensor] = {
            (component.role, component.idx): tensor for component, tensor in zip(components, state, strict=True)
        }
        self._is_new, self._handover = is_new, handover
        self._places = {key: i for i, key in enumerate(self._tensors)}

    def get_conv_state(self, _layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Last inputs [B, channels, kernel] of a convolution, or None; the caller may change them in place."""
        if self._handover is not None:
            self._handover.arrive(self._places["conv", state_idx])
        return None if self._is_new else self._tensors["conv", state_idx]

    def get_recurrent_state(self, _layer_idx: int, state_idx: int = 0) -> Tensor | StateByHeads | None:
        """State [B, ...] of a recurrence, or None; one that is handed on is never None, but zeros."""
        tensor = self._tensors["recurrent", state_idx]
        if self._handover is None:
            return None if self._is_new else tensor
        if self._is_new:
            tensor.zero_()
        return StateByHeads(tensor, self._handover, self._places["recurrent", state_idx])

    def update_conv_state(
        self, inputs: Tensor, _layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int | None = None
    ) -> Tensor:
        """Keep the last inputs of [B, channels, t], and return them all behind those that were kept."""
        kept = self._tensors["conv", state_idx]
        width = kept.shape[-1]
        assert conv_kernel_size in (None, width), "another kernel than was traced"
        batch, num_channels, num_tokens = inputs.shape
        num_before = max(0, width - num_tokens) if self._is_new else width
        # Token by token in memory, as the inputs are made and kernels read them.
        found = inputs.new_empty(batch, num_before + num_tokens, num_channels).transpose(1, 2)
        if num_before:
            found[..., :num_before] = 0 if self._is_new else kept
        found[..., num_before:] = inputs
        kept.copy_(found[..., -width:])
        if self._handover is not None:
            self._handover.note_written(self._places["conv", state_idx])
        return found

    def update_recurrent_state(self, state: Tensor, layer_idx: int = 0, state_idx: int = 0) -> Tensor:
        """Keep the state [B, ...] of a recurrence."""
        return self._tensors["recurrent", state_idx].copy_(state)

    def is_recording_past(self, _layer_idx: int) -> bool:
        """Return False: no earlier state is kept."""
        return False


class TraceCache(StepCache):
    """Finds the layout of every layer's state while a model runs on the meta device."""

    def __init__(self) -> None:
        super().__init__({}, lambda _layer, _compute: torch.empty(0))
        self.layers: dict[int, tuple[StateComponent, ...]] = {}
        """Layout by layer, in the order of calls."""

    def run(
        self, layer: int, hidden: Tensor, forward: Callable[..., Any], products: RowProducts, cls: type[nn.Module]
    ) -> Tensor:
        """Note the state that a module keeps. See `StepCache.run`."""
        recorder = _LayerRecorder(has_heads=_has_heads(cls))
        out: Tensor = forward(hidden, cache=recorder)
        if layer in self.layers or not recorder.components or not isinstance(out, Tensor):
            raise UnsupportedModelError(
                f"recurrent layers: layer {layer} gives {type(out).__name__} and {len(recorder.components)} states, "
                "proven is one module per layer that keeps a state and gives a tensor"
            )
        self.layers[layer] = tuple([recorder.components[key] for key in sorted(recorder.components)])
        return out

    def groups(self) -> tuple[StateGroup, ...]:
        """Layers with like states as groups."""
        layers_of: dict[tuple[StateComponent, ...], list[int]] = {}
        for layer in sorted(self.layers):
            layers_of.setdefault(self.layers[layer], []).append(layer)
        return tuple([StateGroup(tuple(layers), components) for components, layers in layers_of.items()])


class _LayerRecorder:
    """Cache of one layer, without a state, that notes what is to be kept."""

    def __init__(self, *, has_heads: bool = False) -> None:
        self._has_heads = has_heads
        self.components: dict[Key, StateComponent] = {}

    def get_conv_state(self, _layer_idx: int, state_idx: int = 0) -> None:
        """Return None."""

    def get_recurrent_state(self, _layer_idx: int, state_idx: int = 0) -> None:
        """Return None."""

    def update_conv_state(
        self, inputs: Tensor, _layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int | None = None
    ) -> Tensor:
        """Note a convolution's inputs. See `LayerCache.update_conv_state`."""
        width = inputs.shape[-1] if conv_kernel_size is None else conv_kernel_size
        self._note("conv", state_idx, (*inputs.shape[1:-1], width), inputs.dtype)
        return inputs

    def update_recurrent_state(self, state: Tensor, layer_idx: int = 0, state_idx: int = 0) -> Tensor:
        """Note the state of a recurrence."""
        self._note("recurrent", state_idx, tuple(state.shape[1:]), state.dtype)
        return state

    def is_recording_past(self, _layer_idx: int) -> bool:
        """Return False."""
        return False

    def _note(
        self, role: Literal["conv", "recurrent"], state_idx: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        name = str(dtype).removeprefix("torch.")
        num_heads = shape[0] if self._has_heads and role == "recurrent" else 1
        self.components[role, state_idx] = StateComponent(role, state_idx, shape, name, num_heads)


def recurrent_modules(model: nn.Module) -> list[Any]:
    """Modules of a model that keep a state, in the order of layers."""
    found: list[Any] = [module for module in model.modules() if _keeps_state(module)]
    return sorted(found, key=lambda module: int(module.layer_idx))


def _keeps_state(module: nn.Module) -> bool:
    cls: Any = type(module)
    return hasattr(module, "layer_idx") and any(_cache_calls(cls))


@functools.cache  # Python parses the class's whole file to find it
def _cache_calls(cls: Any) -> tuple[bool, ...]:
    """Per call of `CACHE_CALLS`, whether a class (`type[nn.Module]`) makes it."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return ()
    return tuple(name in source for name in CACHE_CALLS)


def _has_heads(cls: type[nn.Module]) -> bool:
    """Whether a class computes a recurrence whose heads are independent."""
    code = inspect.unwrap(cls.forward).__code__
    return any(part in name for name in code.co_names for part in HEADED)


def compute_runs_(model: Any) -> int:
    """Let modules that keep a state compute a step's rows run by run, where they are called with a `StepCache`.

    Returns:
        Number of changed modules.
    """
    modules = recurrent_modules(model)
    first_of = {type(module): module for module in reversed(modules)}
    width = int(model.config.hidden_size)
    names = {kind: find_products(module, _LayerRecorder(), width) for kind, module in first_of.items()}
    for module in modules:
        products = RowProducts(module, names[type(module)])
        module.forward = _by_runs(module, int(module.layer_idx), products)
    return len(modules)


def _by_runs(module: nn.Module, layer: int, products: RowProducts) -> Callable[..., Any]:
    """Wrap a module's `forward`. A step has no padding, so that nothing but the input counts beside the cache."""

    def own(*args: Any, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs)  # speed-ups change the class

    def forward(hidden_states: Tensor, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        if isinstance(cache, StepCache):
            return cache.run(layer, hidden_states, own, products, type(module))
        return own(hidden_states, *args, cache=cache, **kwargs)

    return forward
