"""Which of a model's weights stay small, and what they take, before any are loaded.

Holds the refusal of models for which the option `quantization` has no kernel. Must not know ranks.
Read next: `longspan.models.packed_linear`; `longspan.models.loader`, which does the same to loaded weights.
"""

import torch
from msgspec import structs
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from longspan.config import QuantizationName
from longspan.errors import UnsupportedModelError
from longspan.models.cpu_experts import mixtures_of
from longspan.models.loader import ROUNDED_BITS, model_on_meta, open_quantized
from longspan.models.packed_experts import can_round, round_experts_
from longspan.models.packed_linear import linear_names, replace_, round_linears_
from longspan.native.packed import BLOCK
from longspan.types import ExpertWeights, ModelSpec


def with_small_weights(
    spec: ModelSpec, model: str, config: PreTrainedConfig, dtype: torch.dtype, quantization: QuantizationName
) -> ModelSpec:
    """Return a model's facts with the bytes of the weights that are loaded.

    Args:
        spec: facts of the model with dense weights.
        model: model as the user named it.
        config: its config.
        dtype: dtype of dense weights.
        quantization: which linear layers stay or become small.

    Raises:
        UnsupportedModelError: no kernel takes the model's weights.
    """
    if quantization == "none":
        return spec
    network = model_on_meta(config, dtype)
    bits = ROUNDED_BITS.get(quantization)
    if bits is None:
        stored = open_quantized(model, config)
        kept = {} if stored is None else stored.packed(linear_names(network), on_meta=True)
        if not kept:
            reason = "dense weights" if stored is None else "quantised weights that no kernel takes as they are"
            raise UnsupportedModelError(f"quantization: got 'keep' for {reason}, legal is none, int8 or int4")
        for name, matrix in kept.items():
            replace_(network, name, matrix)
    elif spec.experts is not None and not _can_round_all(spec.experts, network):
        raise UnsupportedModelError(
            f"quantization: got {quantization!r} for a {config.model_type}, whose experts have no kernel, legal is none"
            f" (the kernel takes gated MLPs without biases, of widths that are multiples of {BLOCK})"
        )
    elif any(isinstance(module, Conv1D) for module in network.modules()):
        raise UnsupportedModelError(
            f"quantization: got {quantization!r} for a {config.model_type}, whose layers are transposed (Conv1D) and "
            "would stay dense, legal is none"
        )
    elif not round_linears_(network, bits) + round_experts_(network, bits):
        raise UnsupportedModelError(
            f"quantization: got {quantization!r} for a {config.model_type} without plain linear layers, legal is none"
        )
    return structs.replace(spec, weight_bytes=sum(weight.nbytes for weight in network.parameters()))


def _can_round_all(experts: ExpertWeights, network: nn.Module) -> bool:
    """Whether all experts of a model can be rounded: none is of a kind that is not found."""
    found = [module for _, module in mixtures_of(network)]
    num_parameters = sum(weight.numel() for module in found for weight in module.parameters(recurse=False))
    return num_parameters == experts.num_parameters and all(map(can_round, found))
