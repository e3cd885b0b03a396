"""Repositories of quantised weights: which methods are read, and how tensors become dense weights.

Holds the table of methods, and the refusal of everything else. Must not know ranks, or how a model is built.
Read next: `longspan.models.dequantize`, for the arithmetic; `longspan.models.packed_linear`, for weights that stay
small; `docs/decisions/0034-quantised-weights.md`.

A quantised weight is several tensors, whose names differ in their ends. They are made one dense tensor before
Transformers' loader sees them, so it loads the dense model: no method's library is needed, and everything that works
on dense weights (conversions, fused layers, experts) works.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from longspan.errors import UnsupportedModelError
from longspan.models import dequantize
from longspan.models.checkpoint import Checkpoint, LazyTensor
from longspan.models.dequantize import Options, Parts
from longspan.models.text_part import text_name
from longspan.native.packed import PackedMatrix

FIELD = "quantization_config"

_DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
"""Formats of compressed-tensors that are read."""

TORCHAO_TYPES = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")
"""Methods of torchao that are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one quantised weight lies in files: tensors whose names have a stem in common, and their own ends."""

    weight: str
    """End of the dense weight's name."""
    parts: Mapping[str, str]
    """End of every tensor that must be there, by role; the first one tells such weights from others."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """End of every tensor that may be there."""
    dense: Callable[[Parts, Options], Tensor]
    """Makes the dense weight."""
    packed: Callable[[Parts, Options], PackedMatrix | None] = lambda _parts, _options: None
    """Makes the packed matrix that keeps the weight small, from tensors on the meta device too; None where no kernel
    takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """Quantisation method that is read."""

    layouts: tuple[Layout, ...]
    unread: tuple[str, ...] = ()
    """Ends of tensors that only rounded activations and rounded KV need: both stay as they are here."""
    check: Callable[[Options], None] = lambda _options: None
    """Refuses options that are not proven."""


def _refuse(name: str, value: object, legal: str) -> None:
    raise UnsupportedModelError(f"{FIELD}: got {name} {value!r}, proven is {legal}")


def _check_gptq(options: Options) -> None:
    if options.get("bits") not in (4, 8):
        _refuse("bits", options.get("bits"), "4, 8")
    dequantize.group_size(options)
    if options.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        _refuse("checkpoint_format", options["checkpoint_format"], "gptq, gptq_v2")


def _check_awq(options: Options) -> None:
    if options.get("bits") != 4:
        _refuse("bits", options.get("bits"), "4")
    dequantize.group_size(options)
    if str(options.get("version", "gemm")).lower() != "gemm":
        _refuse("version", options["version"], "gemm")


def _check_bitsandbytes(options: Options) -> None:
    if not options.get("load_in_4bit"):
        raise UnsupportedModelError(
            f"{FIELD}: got load_in_8bit {options.get('load_in_8bit')!r}, proven is load_in_4bit: LLM.int8 looks at the "
            "outliers of all rows, so tokens would depend on what shares a step"
        )


def _check_compressed(options: Options) -> None:
    groups = options.get("config_groups") or {}
    for format_ in [options.get("format"), *(group.get("format") for group in groups.values())]:
        if format_ is not None and format_ not in (*COMPRESSED_FORMATS, "mixed-precision"):
            _refuse("format", format_, ", ".join(COMPRESSED_FORMATS))
    for group in groups.values():
        num_bits = (group.get("weights") or {}).get("num_bits")
        if num_bits not in (4, 8):
            _refuse("num_bits", num_bits, "4, 8")
    dequantize.blocks(options)
    if len(bits := dequantize.packed_bits(options)) > 1:
        _refuse("num_bits", sorted(bits), "one number for all packed groups")
    sparsity = (options.get("sparsity_config") or {}).get("format")
    if sparsity not in (None, "dense"):
        _refuse("sparsity_config.format", sparsity, "dense")
    if (options.get("transform_config") or {}).get("config_groups"):
        _refuse("transform_config", "transforms", "none")


def _check_torchao(options: Options) -> None:
    kind = options.get("quant_type")
    kind = kind.get("default", kind) if isinstance(kind, Mapping) else kind
    name = kind.get("_type") if isinstance(kind, Mapping) else kind
    if name not in TORCHAO_TYPES:
        reason = ": it rounds activations, which turns a last bit into another token" if "Dynamic" in str(name) else ""
        _refuse("quant_type", name, ", ".join(TORCHAO_TYPES) + reason)


def _bitsandbytes(kind: str) -> Layout:
    """Layout of one of the two tables of values, which the name of a tensor tells."""
    return Layout(
        weight="",
        parts={
            "state": f".quant_state.bitsandbytes__{kind}",
            "weight": "",
            "absmax": ".absmax",
            "quant_map": ".quant_map",
        },
        optional={"nested_absmax": ".nested_absmax", "nested_quant_map": ".nested_quant_map"},
        dense=dequantize.nf4,
    )


_COMPRESSED_OPTIONAL = {"zero": "weight_zero_point", "g_idx": "weight_g_idx"}
_ROUNDED_ACTIVATIONS = (".input_scale", ".input_zero_point", ".output_scale", ".activation_scale")

METHODS: Mapping[str, Method] = {
    "awq": Method(
        layouts=(
            Layout(
                weight="weight",
                parts={"qweight": "qweight", "qzeros": "qzeros", "scales": "scales"},
                dense=dequantize.awq,
                packed=dequantize.awq_packed,
            ),
        ),
        check=_check_awq,
    ),
    "bitsandbytes": Method(layouts=(_bitsandbytes("nf4"), _bitsandbytes("fp4")), check=_check_bitsandbytes),
    "compressed-tensors": Method(
        layouts=(
            Layout(
                weight="weight",
                parts={"packed": "weight_packed", "scale": "weight_scale", "shape": "weight_shape"},
                optional=_COMPRESSED_OPTIONAL,
                dense=dequantize.compressed,
                packed=dequantize.compressed_packed,
            ),
            Layout(
                weight="weight",
                parts={"scale": "weight_scale", "weight": "weight"},
                optional=_COMPRESSED_OPTIONAL,
                dense=dequantize.compressed,
                packed=dequantize.compressed_packed,
            ),
        ),
        unread=(*_ROUNDED_ACTIVATIONS, ".k_scale", ".v_scale", ".q_scale"),
        check=_check_compressed,
    ),
    "fp8": Method(
        layouts=(Layout(weight="", parts={"scale": "_scale_inv", "weight": ""}, dense=dequantize.fp8),),
        unread=_ROUNDED_ACTIVATIONS,
    ),
    "gptq": Method(
        layouts=(
            Layout(
                weight="weight",
                parts={"qweight": "qweight", "qzeros": "qzeros", "scales": "scales"},
                optional={"g_idx": "g_idx"},
                dense=dequantize.gptq,
                packed=dequantize.gptq_packed,
            ),
        ),
        check=_check_gptq,
    ),
    "mxfp4": Method(
        layouts=(Layout(weight="", parts={"blocks": "_blocks", "scale": "_scales"}, dense=dequantize.mxfp4),)
    ),
    "torchao": Method(
        layouts=(
            Layout(
                weight="weight",
                parts={"data": "_weight_qdata", "scale": "_weight_scale"},
                optional={"zero": "_weight_zero_point"},
                dense=dequantize.torchao,
                packed=dequantize.torchao_packed,
            ),
        ),
        check=_check_torchao,
    ),
}
"""Methods that are read, by the field `quant_method`."""


def quantization_of(config: PreTrainedConfig) -> Options | None:
    """Return how a repository's weights are quantised, or None if they are dense."""
    found = getattr(config, FIELD, None)
    if found is None:
        return None
    options: Options = found if isinstance(found, Mapping) else found.to_dict()
    return options


def check_quantization(config: PreTrainedConfig) -> None:
    """Refuse a repository whose quantised weights are not read.

    Raises:
        UnsupportedModelError: names the field, its value and what is proven.
    """
    try:
        options = quantization_of(config)
        if options is not None:
            _method(options).check(options)
    except UnsupportedModelError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # a field of another type
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"{FIELD}: got {getattr(config, FIELD)!r:.300}, proven are fields as their library writes them: {reason}"
        ) from error


def _method(options: Options) -> Method:
    name = options.get("quant_method")
    if name is None and (options.get("load_in_4bit") or options.get("load_in_8bit")):
        name = "bitsandbytes"  # old repositories do not name it
    if name not in METHODS:
        _refuse("quant_method", name, ", ".join(METHODS))
    return METHODS[str(name)]


def dense_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the model that has dense weights."""
    if getattr(config, FIELD, None) is None:
        return config
    dense = copy.deepcopy(config)
    delattr(dense, FIELD)
    return dense


@dataclass(frozen=True, slots=True)
class _Stored:
    """One quantised weight of a checkpoint."""

    layout: Layout
    names: Mapping[str, str]
    """Tensor in the checkpoint per role."""


class QuantizedCheckpoint:
    """Checkpoint of quantised weights, seen as one of dense weights.

    Quantised weights have the names that they have in the text model, also in a multimodal repository.
    """

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        """Find the parts of every quantised weight.

        Args:
            checkpoint: the repository's tensors.
            options: its `quantization_config`, which `check_quantization` admits.

        Raises:
            ValueError: a tensor of small numbers lacks what makes it a weight.
        """
        self._checkpoint, self._options = checkpoint, options
        method = _method(options)
        self._quantized: dict[str, _Stored] = {}
        for layout in method.layouts:
            self._find(layout)
        read = {name for stored in self._quantized.values() for name in stored.names.values()}
        self._dense = [name for name in checkpoint.names if name not in read and not name.endswith(method.unread)]
        for name in self._dense:
            if (dtype := checkpoint.read_meta(name).dtype) not in _DENSE_DTYPES:
                raise ValueError(f"{name} holds {dtype}, and there are no scales that make a weight of it")

    def _find(self, layout: Layout) -> None:
        """Note all weights of one layout that no layout before it explains."""
        names = set(self._checkpoint.names)
        end = next(iter(layout.parts.values()))
        for name in names:
            stem = name.removesuffix(end)
            found = {role: stem + part for role, part in layout.parts.items()}
            if (
                stem == name
                or not names.issuperset(found.values())
                or text_name(stem + layout.weight) in self._quantized
            ):
                continue
            found |= {role: stem + part for role, part in layout.optional.items() if stem + part in names}
            self._quantized[text_name(stem + layout.weight)] = _Stored(layout, found)

    def packed(self, names: Collection[str], *, on_meta: bool = False) -> dict[str, PackedMatrix]:
        """Return the matrices that can stay small.

        Args:
            names: modules that are linear layers.
            on_meta: whether to return shapes alone, as tensors on the meta device.

        Returns:
            Packed matrix by name of its module.
        """
        read = self._checkpoint.read_meta if on_meta else self._checkpoint.read
        found: dict[str, PackedMatrix] = {}
        for name in names:
            stored = self._quantized.get(f"{name}.weight")
            if stored is None:
                continue
            parts = {role: read(tensor) for role, tensor in stored.names.items()}
            matrix = stored.layout.packed(parts, self._options)
            if matrix is not None:
                found[name] = matrix
        return found

    def state_dict(self, packed: Mapping[str, PackedMatrix], dtype: torch.dtype) -> dict[str, LazyTensor]:
        """Return all tensors of the dense model, made one by one when Transformers' loader asks for them.

        Args:
            packed: matrices that stay small, by name of module; the loader gets zeros, which take no memory, for them.
            dtype: dtype in which the loader keeps weights.
        """
        tensors = {name: self._checkpoint.lazy(name) for name in self._dense}
        for name, stored in self._quantized.items():
            matrix = packed.get(name.removesuffix(".weight"))
            make = partial(self._make, stored) if matrix is None else partial(_zeros, matrix.shape, dtype)
            tensors[name] = LazyTensor(make)
        return tensors

    def _make(self, stored: _Stored) -> Tensor:
        parts = {role: self._checkpoint.read(name) for role, name in stored.names.items()}
        return stored.layout.dense(parts, self._options)


def _zeros(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype).expand(shape)
