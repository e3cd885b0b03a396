"""Facts of a model, found by running it on the meta device: KV specs, windows, scales.

Reads the facts off the model's own attention calls instead of guessing them from config fields, and refuses models
that are not proven exact. Allocates no weights. Must not know ranks or plans.
Read next: `longspan.models.loader`.
"""

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from longspan.errors import LongspanError, UnsupportedModelError
from longspan.kv.layout import KVGroup, KVSpec
from longspan.models.adaptations import adapt_
from longspan.models.experts import ExpertRecorder
from longspan.models.families import check_family
from longspan.models.generation import end_token_ids
from longspan.models.hook import ATTENTION_NAME, AttentionCall
from longspan.models.latent import latent_spec
from longspan.models.mask_rule import check_mask, find_chunk
from longspan.models.quantization import check_quantization, dense_config
from longspan.models.recurrent import TraceCache, recurrent_modules
from longspan.models.rope import check_applied, check_rope, longest_request, rope_lengths
from longspan.models.state_proof import check_recurrence
from longspan.models.tensor_parallel import check_divisible, check_part, cut_
from longspan.models.tensor_part import Part
from longspan.types import AttentionParams, ModelSpec

MAX_SIZES = {
    "num_hidden_layers": 10_000,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "vocab_size": 2**31,
    "max_position_embeddings": 2**48,
}
"""Upper bounds of config fields, above those of any model: building one of a billion layers would never end."""


TRACED_EXPERTS = "batched_mm"
"""Transformers' computation of experts that runs on the meta device: others look at data, or refuse float32 there. It
is far too slow to run."""


def check_proven(config: PreTrainedConfig) -> None:
    """Refuse a model that is not proven exact.

    Raises:
        UnsupportedModelError: the model is not proven; the message names the field, its value and the proven values.
    """

    def refuse(field: str, value: object, legal: str) -> None:
        raise UnsupportedModelError(f"{field}: got {value!r}, proven is {legal}")

    check_family(config.model_type)
    check_rope(config)
    check_quantization(config)
    if getattr(config, "use_bidirectional_attention", None):
        refuse("use_bidirectional_attention", True, "false")
    if (dual := getattr(config, "dual_chunk_attention_config", None)) is not None:
        refuse("dual_chunk_attention_config", dual, "none: Transformers passes over it, and long texts come out wrong")


def _check_sizes(config: PreTrainedConfig) -> None:
    """Raise `UnsupportedModelError` for sizes with which no model can be built."""
    values = config.to_dict()  # an attribute that differs per layer raises
    for field, most in MAX_SIZES.items():
        value = values.get(field)
        for size in value if isinstance(value, (list, tuple)) else [value]:  # some families have one per layer
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= most):
                raise UnsupportedModelError(f"{field}: got {size!r}, legal is an integer from 1 to {most}")


class _Recorder:
    """Attention function that records its calls, and returns tensors of the right shape."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def __call__(self, call: AttentionCall) -> Tensor:
        self.calls.append(call)
        return call.q.new_empty(*call.q.shape[:2], call.out_width)


def inspect_model(
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None,
    dtype: torch.dtype,
    tensor_parallel_size: int = 1,
) -> ModelSpec:
    """Find the facts of a model that the engine needs.

    Args:
        config: the model's config.
        generation_config: for the end tokens, beside those of `config`.
        dtype: dtype of weights and KV.
        tensor_parallel_size: processes that share a rank's weights.

    Returns:
        The model's facts, or those of the first process's part of it: heads, weights, bytes. Layers that share KV
        widths and window form one KV group.

    Raises:
        UnsupportedModelError: the model does something that is not proven exact.
    """
    check_proven(config)
    try:
        spec, model = trace_model(config, generation_config, dtype)
        if spec.state_groups:
            layouts = {layer: group.components for group in spec.state_groups for layer in group.layers}
            check_recurrence(recurrent_modules(model), layouts, config.hidden_size)
        if tensor_parallel_size > 1:
            check_divisible(model, spec, tensor_parallel_size)
            cut_(model, Part(0, tensor_parallel_size), spec.kv_groups)
            whole, spec = spec, _traced(model, config, generation_config, dtype)
            check_part(whole, spec, tensor_parallel_size)
        return spec
    except LongspanError:
        raise
    except Exception as error:  # sizes that do not go together fail wherever the model divides by them
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnsupportedModelError(f"config: got a {config.model_type} that cannot be built: {reason}") from error


def trace_model(
    config: PreTrainedConfig, generation_config: GenerationConfig | None, dtype: torch.dtype
) -> tuple[ModelSpec, nn.Module]:
    """Find the facts of a model of any family, and return them with the model on the meta device.

    See `inspect_model` for arguments and errors; a model that calls attention in an unknown way is refused.
    """
    _check_sizes(config)
    with torch.device("meta"), torch.inference_mode():
        model: Any = AutoModelForCausalLM.from_config(
            dense_config(config),
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            experts_implementation=TRACED_EXPERTS,
        )
        adapt_(model)
        check_applied(config, model)
    return _traced(model, config, generation_config, dtype), model


def _traced(
    model: Any, config: PreTrainedConfig, generation_config: GenerationConfig | None, dtype: torch.dtype
) -> ModelSpec:
    """Find the facts of a model on the meta device by running it."""
    with torch.device("meta"), torch.inference_mode():
        recorder, states = _Recorder(), TraceCache()
        experts = ExpertRecorder(model)
        token = torch.zeros(1, 1, dtype=torch.long)
        model.eval()(
            input_ids=token,
            position_ids=token,
            # A padding mask keeps Transformers from looking for packed rows, which needs data.
            attention_mask=torch.ones(1, 1, dtype=torch.long),
            use_cache=False,
            longspan_attend=recorder,
            **({"cache": states} if recurrent_modules(model) else {}),
        )
    calls = recorder.calls
    num_layers: int = config.num_hidden_layers
    _check_layers([call.layer for call in calls], states.layers, num_layers)
    groups: dict[tuple[KVSpec, int], list[int]] = {}
    for call in calls:
        check_mask(call)
        if not call.is_causal:
            raise UnsupportedModelError(f"is_causal: got False in layer {call.layer}, proven is True")
        if call.other_arguments:
            raise UnsupportedModelError(
                f"attention arguments: layer {call.layer} got {', '.join(sorted(call.other_arguments))}, which "
                "longspan does not know"
            )
        if call.sinks is not None and call.sinks.shape != call.q.shape[1:2]:
            shape = tuple(call.sinks.shape)
            raise UnsupportedModelError(f"sinks: got {shape} in layer {call.layer}, proven is ({call.q.shape[1]},)")
        spec = _kv_spec(call, str(dtype).removeprefix("torch."))
        groups.setdefault((spec, call.q.shape[1]), []).append(call.layer)
    _check_reaches([spec for spec, _ in groups])
    params = {call.layer: AttentionParams(call.scale, call.softcap, call.window) for call in calls}
    return ModelSpec(
        architecture=type(model).__name__,
        num_layers=num_layers,
        vocab_size=config.vocab_size,
        max_position=longest_request(config),
        eos_token_ids=end_token_ids(config, generation_config),
        kv_groups=tuple(KVGroup(tuple(layers), spec, heads) for (spec, heads), layers in groups.items()),
        layer_params=tuple([params.get(layer) for layer in range(num_layers)]),
        num_parameters=_count_parameters(model),
        weight_bytes=sum(weight.nbytes for weight in model.parameters()),
        experts=experts.weights(),
        rope_lengths=rope_lengths(config),
        state_groups=states.groups(),
    )


def _check_layers(with_attention: Sequence[int], with_state: Collection[int], num_layers: int) -> None:
    """Refuse a model whose layers are not of the kinds that are proven: attention, recurrent, both; in a hybrid,
    neither. Layers are given in the order of calls."""
    ascends = all(a < b for order in (with_attention, list(with_state)) for a, b in pairwise(order))
    is_whole = bool(with_state) or len(with_attention) == num_layers
    if not with_attention or not ascends or not is_whole or not {*with_attention, *with_state} <= {*range(num_layers)}:
        raise UnsupportedModelError(
            f"num_hidden_layers: got {num_layers} layers, of which {len(with_attention)} called attention in order; "
            "proven is one attention call per layer"
            + f", or less beside layers with a state, of which there are {len(with_state)}"
            * bool(with_state)
        )


def _kv_spec(call: AttentionCall, dtype: str) -> KVSpec:
    """Spec of a layer, from its attention call."""
    if call.latent is None:
        num_kv_heads, _, k_width = call.k.shape
        return KVSpec.uniform(num_kv_heads, k_width, call.v.shape[-1], dtype, call.window, find_chunk(call))
    if any(value is not None for value in (call.window, find_chunk(call), call.softcap, call.sinks)):
        raise UnsupportedModelError(
            f"attention of layer {call.layer}: got latents with window {call.window}, chunks, softcap {call.softcap} "
            "or sinks, proven is latents without any"
        )
    return latent_spec(call.latent, call.q, call.k, dtype)


def _check_reaches(specs: Sequence[KVSpec]) -> None:
    """Refuse chunks of several sizes, or beside windows: prefix hits rely on an order of what groups still see."""
    local = {(spec.window, spec.chunk) for spec in specs if spec.reach is not None}
    if len(local) > 1 and any(chunk is not None for _, chunk in local):
        found = ", ".join(
            f"chunks of {chunk}" if window is None else f"a window of {window}" for window, chunk in local
        )
        raise UnsupportedModelError(f"attention_chunk_size: got layers with {found}, proven is one size for all layers")


def _count_parameters(model: Any) -> int:
    """Count the weights of the model without its input and output embeddings."""
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    skipped = {id(weight) for module in ends for weight in module.parameters()}
    return sum(weight.numel() for weight in model.parameters() if id(weight) not in skipped)
