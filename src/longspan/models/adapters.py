"""LoRA adapters of requests: a product of low rank, added to those of linear layers for the rows of one adapter.

Holds the adapters that a model has, and the replacement of the forward of modules that one of them changes. Must not
know plans or requests: whoever calls the model passes the adapter of every row.
Read next: `longspan.models.adapter_files`, which modules may be changed; `longspan.worker.forward`, which passes rows;
docs/decisions/0087-adapters-per-request.md.

Note [Rows of an adapter]
    A step packs rows of many requests. Rows that follow each other and have one adapter are a span, and each span is
    two products in every module that its adapter changes:

        row         0  1  2  3  4  5        out           = W x
        adapter     -  -  7  7  7  9        out[2:5]     += (x[2:5] A7) B7
                                            out[5:6]     += (x[5:6] A9) B9

    Modules behind the last layer's attention may get the rows that are read alone. The number of rows says which they
    are: rows that are read keep their order, so if there are as many of them as rows, they are the same.

    A step without adapters pays a look at one attribute in those modules, or in fused layers once per layer: these
    have another form for steps with adapters.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor, nn

from longspan.models.adapter_files import LowRank, adaptable_modules, files_of
from longspan.models.last_layer import READ_ROWS
from longspan.types import Adapter

ROW_ADAPTERS = "longspan_row_adapters"
"""Forward keyword argument: list of the number of every row's adapter, None for a row without."""

WITH_ADAPTERS = "longspan_with_adapters"
"""Attribute of a layer's forward that goes past its modules' own: the forward for steps with adapters."""

_STORE = "longspan_adapters"
"""Attribute of a model: its `ModelAdapters`."""


class Span(NamedTuple):
    """Rows `[start, end)` of one adapter."""

    adapter_id: int
    start: int
    end: int


class _CurrentSpans(threading.local):
    """Spans of the call that is under way; per thread, as ranks that are threads share the modules."""

    by_rows: Mapping[int, Sequence[Span]] | None = None
    """Spans by the number of rows that a module gets; None in a step without adapters."""


def adapters_of(model: nn.Module) -> "ModelAdapters":
    """The adapters of a model, which ranks that are threads share."""
    found: ModelAdapters | None = getattr(model, _STORE, None)
    if found is None:
        found = ModelAdapters(model)
        setattr(model, _STORE, found)
    return found


class ModelAdapters:
    """Adapters that one model has loaded."""

    def __init__(self, model: nn.Module) -> None:
        """Begin without an adapter; the model is left as it is until there is one."""
        self._model = model
        self._current = _CurrentSpans()
        self._adapted: dict[str, _Adapted] = {}
        self._num_loaded: dict[int, int] = {}  # ranks that have loaded an adapter, by its number
        self._lock = threading.Lock()

    def __deepcopy__(self, _memo: object) -> "ModelAdapters":
        raise TypeError("a model with adapters is not copied: they change its own modules")

    def load(self, adapter: Adapter) -> None:
        """Load an adapter; where ranks share a model, each of them does.

        Raises:
            ConfigError: its files do not fit this model, or are not those that the driver has read.
        """
        with self._lock:
            if self._num_loaded.get(adapter.adapter_id, 0):
                self._num_loaded[adapter.adapter_id] += 1
                return
            weight = next(weight for weight in self._model.parameters() if weight.is_floating_point())
            modules = adaptable_modules(self._model)
            products = files_of(adapter).products(modules, weight.dtype, weight.device)
            if not self._num_loaded:
                self._model.register_forward_pre_hook(self._note, with_kwargs=True)
            for name, product in products.items():
                self._adapt(name).products[adapter.adapter_id] = product
            self._num_loaded[adapter.adapter_id] = 1

    def unload(self, adapter_id: int) -> None:
        """Let go of an adapter, once all ranks that share the model have done so: another may still compute with it."""
        with self._lock:
            count = self._num_loaded.get(adapter_id, 0)
            if not count:
                return  # it could not be loaded
            self._num_loaded[adapter_id] = count - 1
            if count == 1:
                for adapted in self._adapted.values():
                    adapted.products.pop(adapter_id, None)

    def _adapt(self, name: str) -> "_Adapted":
        """Let a module add products, if it does not yet."""
        if name not in self._adapted:
            module: Any = self._model.get_submodule(name)
            self._adapted[name] = module.forward = _Adapted(module.forward, self._current)
            self._adapt_layer(name)
        return self._adapted[name]

    def _adapt_layer(self, name: str) -> None:
        """Let the layer around a module compute in its form for adapters, in steps with adapters."""
        outer = name
        while outer := outer.rpartition(".")[0]:
            layer: Any = self._model.get_submodule(outer)
            own = getattr(layer.forward, WITH_ADAPTERS, None)
            if own is not None:
                layer.forward = _of_two(layer.forward, own, self._current)

    def _note(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Take the adapters of the step's rows, before the model's forward."""
        adapter_ids: Sequence[int | None] | None = kwargs.pop(ROW_ADAPTERS, None)
        if adapter_ids is None:
            self._current.by_rows = None
            return args, kwargs
        read: Tensor | None = kwargs.get(READ_ROWS)
        by_rows = {}
        if read is not None:
            rows = read.tolist()
            assert rows == sorted(rows), "rows that are read keep their order"
            by_rows[len(rows)] = spans_of([adapter_ids[row] for row in rows])
        self._current.by_rows = {**by_rows, len(adapter_ids): spans_of(adapter_ids)}
        return args, kwargs


def spans_of(adapter_ids: Sequence[int | None]) -> list[Span]:
    """Spans of rows; rows without an adapter are in none."""
    found: list[Span] = []
    start = 0
    for adapter_id, same in groupby(adapter_ids):
        end = start + len(list(same))
        if adapter_id is not None:
            found.append(Span(adapter_id, start, end))
        start = end
    return found


class _Adapted:
    """Forward of a linear layer that adds the products of its rows' adapters."""

    def __init__(self, own: Callable[[Tensor], Tensor], current: _CurrentSpans) -> None:
        """Take the module's own forward."""
        self._own, self._current = own, current
        self.products: dict[int, LowRank] = {}
        """What adapters add here, by their numbers; one that leaves this module alone is missing."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Multiply [..., width] and return [..., num_out]."""
        out = self._own(hidden)
        if self._current.by_rows is not None:
            self.add_(hidden.flatten(0, -2), out.view(-1, out.shape[-1]))
        return out

    def add_(self, rows: Tensor, out: Tensor) -> None:
        """Add to products `out` [n, num_out] of rows [n, width] what their adapters add."""
        by_rows = self._current.by_rows
        assert by_rows is not None, "a step with adapters"
        assert len(rows) in by_rows, f"a module with adapters got {len(rows)} rows of {max(by_rows)}"
        for adapter_id, start, end in by_rows[len(rows)]:
            product = self.products.get(adapter_id)
            if product is not None:
                out[start:end].addmm_(rows[start:end] @ product.a, product.b)


def add_products_(module: nn.Module, rows: Tensor, out: Tensor) -> None:
    """Add what adapters add in a module to its products, computed elsewhere; in a step without adapters, nothing.

    Args:
        module: the linear layer, which may have no adapter.
        rows: [n, width] of the step, or those that are read.
        out: [n, num_out] products of `rows`, changed in place.
    """
    adapted = vars(module).get("forward")
    if isinstance(adapted, _Adapted):
        adapted.add_(rows, out)


def _of_two(fused: Callable[..., Any], own: Callable[..., Any], current: _CurrentSpans) -> Callable[..., Any]:
    """A forward that is `fused` in steps without adapters, and `own`, which knows them, in others."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (fused if current.by_rows is None else own)(*args, **kwargs)

    return forward
