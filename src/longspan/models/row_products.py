"""Matrix products of recurrent modules over all rows of a step at once, in place of one for every run of rows.

Holds the change of a module's linear layers. Must not know states, ranks or families.
Read next: `longspan.models.recurrent`, which runs modules run by run.

A recurrent module multiplies its input by matrices, carries a state through the rows, and multiplies what comes out by
one more. Only what is between depends on the rows before, and has to wait for the rank that computes them:

    in_proj(all rows)  ->  convolution, recurrence: run by run  ->  out_proj(all rows)

So linear layers that take the module's input as it is are computed before the first run, and hand out the run's rows
when the module calls them. One whose output is the module's gives its input back, and is computed behind the last run.
Which they are is found by running the module on the meta device.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from longspan.models.packed_linear import PackedLinear

LINEAR = (nn.Linear, PackedLinear)


class _Current(threading.local):
    """Run that is under way; per thread, as ranks that are threads share the modules."""

    outputs: Mapping[nn.Module, Tensor] | None = None
    """Rows of the run, by the layer that computed them; None outside of runs."""


class ProductNames(NamedTuple):
    """Names of a module's linear layers that can be computed for all rows at once."""

    first: tuple[str, ...] = ()
    """Those that take the module's input as it is."""
    last: str | None = None
    """The one whose output is the module's; None if there is none."""


class RowProducts:
    """Linear layers of one module that are computed for all rows at once."""

    def __init__(self, module: nn.Module, names: ProductNames) -> None:
        """Change the layers of these names in a recurrent module."""
        self._current = _Current()
        self._first = [module.get_submodule(name) for name in names.first]
        self._last = None if names.last is None else module.get_submodule(names.last)
        for layer in self._first:
            layer.forward = self._served(layer)
        if self._last is not None:
            self._last.forward = self._passed(self._last)

    def first(self, hidden: Tensor) -> dict[nn.Module, Tensor]:
        """Outputs [1, T, out] of all layers that take the module's input [1, T, width]."""
        return {layer: _compute(layer, hidden) for layer in self._first}

    def last(self, rows: Tensor) -> Tensor:
        """The module's output [1, T, out] from what came out of its runs."""
        return rows if self._last is None else _compute(self._last, rows)

    @contextmanager
    def run(self, outputs: Mapping[nn.Module, Tensor]) -> Iterator[None]:
        """Let the module's call inside take these outputs, of its rows alone."""
        self._current.outputs = outputs
        try:
            yield
        finally:
            self._current.outputs = None

    def _served(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(rows: Tensor) -> Tensor:
            outputs = self._current.outputs
            return _compute(layer, rows) if outputs is None else outputs[layer]

        return forward

    def _passed(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(rows: Tensor) -> Tensor:
            return _compute(layer, rows) if self._current.outputs is None else rows

        return forward


def _compute(layer: Any, rows: Tensor) -> Tensor:
    """Call a layer whose `forward` was replaced by what its class does; speed-ups change the class."""
    out: Tensor = type(layer).forward(layer, rows)
    return out


def _dtype(module: nn.Module) -> torch.dtype:
    """Dtype of a module's weights; what packed matrices are stored in does not count."""
    parts = [part for part in module.modules() if not isinstance(part, PackedLinear)]
    weights = [weight for part in parts for weight in part.parameters(recurse=False) if weight.is_floating_point()]
    return weights[0].dtype if weights else torch.float32


def find_products(module: nn.Module, cache: object, width: int) -> ProductNames:
    """Find linear layers that can be computed for all rows at once.

    None are found in a module that does not run on the meta device.

    Args:
        module: a recurrent module that nothing has changed.
        cache: cache for one call without a state.
        width: elements of a row.
    """
    layers: dict[nn.Module, str] = {child: name for name, child in module.named_children() if isinstance(child, LINEAR)}
    hidden = torch.empty(1, 1, width, device="meta", dtype=_dtype(module))
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers.values()}

    def note(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        calls[layers[layer]].append((args[0], out))

    hooks = [layer.register_forward_hook(note) for layer in layers]
    weights = {name: torch.empty_like(one, device="meta") for name, one in module.named_parameters()}
    weights |= {name: torch.empty_like(one, device="meta") for name, one in module.named_buffers()}
    try:
        with torch.inference_mode():
            result = functional_call(module, weights, (hidden,), {"cache": cache})
    except Exception:  # weights that other libraries hold fail on the meta device in their own ways
        return ProductNames()
    finally:
        for hook in hooks:
            hook.remove()
    once = [(name, *found[0]) for name, found in calls.items() if len(found) == 1]
    first = tuple([name for name, given, _ in once if given is hidden])
    last = [name for name, _, out in once if out is result and name not in first]
    return ProductNames(first, last[0] if last else None)
