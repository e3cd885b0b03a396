"""Report of a model on a cluster: memory fit, predicted times, hardware needed.

Holds the answers of `longspan plan` as data, and makes them. Must not know how they are shown.
Read next: `longspan.costmodel.prompt_time` (time), `longspan.planner.memory_fit` (memory), `longspan.cli.plan`.
"""

from collections.abc import Sequence

import msgspec

from longspan.costmodel.model_time import StepOptions, StepPrediction, decode_bytes, predict_decode, prefill_flops
from longspan.costmodel.prompt_time import PrefillPrediction, predict_prefill
from longspan.costmodel.published import check_number
from longspan.costmodel.shapes import ModelShape, PlannedDType
from longspan.errors import ConfigError
from longspan.planner.clusters import Cluster, check_count
from longspan.planner.memory_fit import (
    Fit,
    fit,
    fits,
    needed_bytes,
    relative_shares,
    request_kv_bytes,
    smallest_cluster,
)

DEFAULT_UTILIZATION = 0.9


class ContextPlan(msgspec.Struct, frozen=True):
    """Memory and time of one context: a prompt of `context_len` tokens, and one output token."""

    context_len: int
    fits: bool
    exceeds_model: bool
    """Whether the context is longer than the model's config admits."""
    prefill: PrefillPrediction | None
    """Predicted prefill; None where the context does not fit."""
    decode: StepPrediction | None
    """Predicted decode step right after the prompt; None where the context does not fit."""
    prefill_floor_s: float
    """Time of all flops at the peak rate of all devices."""
    decode_floor_s: float
    """Time of reading all weights and KV at the full bandwidth of all devices."""
    memory_bytes: float
    """Weights and KV on the device that holds most."""
    needed_device_bytes: float
    """Least memory of one device with which the context fits this cluster."""
    smallest_devices: int | None
    """Devices of the smallest cluster of this kind that holds the context; None if none of at most 128 ranks does."""
    kv_bytes: float
    """KV of the context on all devices."""
    load_s: float | None
    """Time of loading this KV from a tier instead of computing it; None where no rate was given, or it does not fit."""
    fitting_tensor_parallel_size: int | None
    """Fewest devices per rank with which a context that does not fit would fit this cluster; None if none would do."""


class PlanReport(msgspec.Struct, frozen=True):
    """Everything that `longspan plan` reports."""

    model: str
    architecture: str
    not_run: str | None
    """Reason why the engine does not run this model yet, or None."""
    cluster: Cluster
    dtype: PlannedDType
    num_devices: int
    num_ranks: int
    tensor_parallel_size: int
    memory_utilization: float
    options: StepOptions
    placement: str
    chunk_len: int
    """Tokens of a full prefill step, over all ranks."""
    num_weights: float
    kv_token_bytes: int
    """KV bytes of one token in the whole model; heads that several devices hold count once."""
    state_bytes: int
    """Bytes of one request's state in all recurrent layers; 0 where there are none."""
    max_position: int | None
    fit: Fit
    contexts: tuple[ContextPlan, ...]


def make_plan(
    shape: ModelShape,
    cluster: Cluster,
    contexts: Sequence[int],
    *,
    model: str,
    tensor_parallel_size: int = 1,
    memory_utilization: float = DEFAULT_UTILIZATION,
    max_num_batched_tokens: int = StepOptions().max_num_batched_tokens,
    rank_weights: tuple[float, ...] | None = None,
    load_bytes_per_s: float | None = None,
) -> PlanReport:
    """Predict memory and time of every context.

    Args:
        shape: the whole model.
        cluster: the cluster, all of which is used.
        contexts: context lengths in tokens.
        model: the model's name, as the user gave it.
        tensor_parallel_size: devices per rank.
        memory_utilization: share of a device's memory that weights and KV may take.
        max_num_batched_tokens: most tokens that one rank computes in one step.
        rank_weights: weight of every rank, where they are unequal: the cluster's device is that of the rank with the
            largest one, and the others have KV memory and speed in proportion.
        load_bytes_per_s: rate at which a rank loads KV from a tier, or None.

    Raises:
        ConfigError: a value is illegal, or the model cannot be divided by `tensor_parallel_size`.
    """
    cluster.check_parallel(tensor_parallel_size)
    check_number("memory_utilization", memory_utilization, most=1.0)
    check_count("max_num_batched_tokens", max_num_batched_tokens, 2**31 - 1)
    if not contexts:
        raise ConfigError("context: got none, legal is at least one length")
    part = shape.divided(tensor_parallel_size)
    num_ranks = cluster.num_devices // tensor_parallel_size
    if rank_weights is not None and (len(rank_weights) != num_ranks or min(rank_weights) <= 0):
        raise ConfigError(
            f"rank_weights: got {rank_weights!r}, legal is one number above 0 for each of the cluster's {num_ranks} "
            f"rank{'s' * (num_ranks > 1)}"
        )
    options = StepOptions(
        max_num_batched_tokens=max_num_batched_tokens, step_s=cluster.assumptions.step_s, rank_weights=rank_weights
    )
    setup = _Setup(shape, part, cluster, tensor_parallel_size, memory_utilization, options, load_bytes_per_s)
    return PlanReport(
        model=model,
        architecture=shape.spec.architecture,
        not_run=shape.not_run,
        cluster=cluster,
        dtype=shape.dtype,
        num_devices=cluster.num_devices,
        num_ranks=setup.num_ranks,
        tensor_parallel_size=tensor_parallel_size,
        memory_utilization=memory_utilization,
        options=options,
        placement="striped",
        chunk_len=options.geometry(setup.num_ranks).chunk_len,
        num_weights=shape.num_weights,
        kv_token_bytes=shape.kv_token_bytes,
        state_bytes=shape.spec.state_bytes,
        max_position=shape.spec.max_position,
        fit=setup.fit,
        contexts=tuple(setup.plan(context_len) for context_len in contexts),
    )


class _Setup:
    """Model on a cluster, divided in one way: everything that is the same for all contexts."""

    def __init__(
        self,
        shape: ModelShape,
        part: ModelShape,
        cluster: Cluster,
        tensor_parallel_size: int,
        memory_utilization: float,
        options: StepOptions,
        load_bytes_per_s: float | None,
    ) -> None:
        self._load_bytes_per_s = load_bytes_per_s
        self._shape, self._part, self._cluster, self._options = shape, part, cluster, options
        self._tensor_parallel_size, self._memory_utilization = tensor_parallel_size, memory_utilization
        self.num_ranks = cluster.num_devices // tensor_parallel_size
        self.fit = fit(part, self.num_ranks, cluster.memory_bytes, memory_utilization, options)
        self._costs = cluster.costs(cluster.num_devices, tensor_parallel_size, shape.dtype)
        self._shares = relative_shares(self.num_ranks, options)
        if options.rank_weights is not None:
            self._costs = msgspec.structs.replace(self._costs, speeds=self._shares)

    def plan(self, context_len: int) -> ContextPlan:
        """Memory and time of one context with one more token, and the floors of the whole cluster."""
        shape, part, cluster, options = self._shape, self._part, self._cluster, self._options
        size, used = self._tensor_parallel_size, self._memory_utilization
        num_tokens, max_position = context_len + 1, shape.spec.max_position
        is_held = fits(self.fit, num_tokens)
        prefill = decode = None
        if is_held:
            prefill = predict_prefill(part, context_len, self._costs, options, tensor_parallel_size=size)
            decode = predict_decode(part, context_len, self._costs, options, tensor_parallel_size=size)
        held = request_kv_bytes(part, context_len, self.num_ranks, options)
        rate = self._load_bytes_per_s
        num_devices = sum(self._shares) * size  # of the speed of the fastest
        peak_flops_per_s = cluster.peak_flops_per_s(shape.dtype) * num_devices
        return ContextPlan(
            context_len=context_len,
            fits=is_held,
            exceeds_model=max_position is not None and context_len > max_position,
            prefill=prefill,
            decode=decode,
            prefill_floor_s=prefill_flops(shape, context_len) / peak_flops_per_s,
            decode_floor_s=decode_bytes(shape, context_len) / (cluster.read_bytes_per_s * num_devices),
            memory_bytes=part.weight_bytes + held,
            kv_bytes=request_kv_bytes(shape, context_len, 1, options),
            load_s=None if rate is None or not is_held else held * size / rate,
            needed_device_bytes=needed_bytes(part, num_tokens, self.num_ranks, used, options),
            smallest_devices=smallest_cluster(part, cluster, size, num_tokens, used, options),
            fitting_tensor_parallel_size=None
            if is_held
            else _fitting_size(shape, cluster, size, num_tokens, used, options),
        )


def _fitting_size(
    shape: ModelShape,
    cluster: Cluster,
    tensor_parallel_size: int,
    num_tokens: int,
    memory_utilization: float,
    options: StepOptions,
) -> int | None:
    """The smallest larger `tensor_parallel_size` with which a request would fit the same devices; none is looked for
    where ranks are unequal."""
    if options.rank_weights is not None:
        return None
    for size in range(tensor_parallel_size + 1, cluster.devices_per_node + 1):
        if cluster.devices_per_node % size or not shape.is_divisible(size):
            continue
        num_ranks = cluster.num_devices // size
        if fits(fit(shape.divided(size), num_ranks, cluster.memory_bytes, memory_utilization, options), num_tokens):
            return size
    return None
