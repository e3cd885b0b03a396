"""How long a whole prompt takes: the steps of a lone, striped request, of which some are predicted.

Holds which steps are predicted, and how they are added up. Must not know clocks, files, or what a step's parts cost.
Read next: `longspan.costmodel.model_time`, which predicts a step.

Note [Sampled steps]
    Between two chunks of a prompt only the context grows, so a step's time is nearly straight in it while the strategy
    stays the same. Of many chunks some are predicted, and those between them interpolated; where two neighbours choose
    different strategies the change is searched by halving. From about 100 ranks on stripes are taken to be longer than
    they are (two per rank and chunk), and two steps are predicted. So a prediction takes seconds at most.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import msgspec

from longspan.costmodel.model_time import (
    StepOptions,
    StepPrediction,
    predict_last_row,
    predict_step,
    striped_table,
)
from longspan.costmodel.parameters import Costs
from longspan.costmodel.shapes import ModelShape
from longspan.sharding.geometry import StepGeometry
from longspan.types import Strategy

SEGMENT_BUDGET = 60_000
"""Segments of all predicted steps of one prompt together: what bounds the time of a prediction."""

MIN_SAMPLES, MAX_SAMPLES = 2, 12
"""Steps of one prompt that are predicted before changes of strategy are searched."""

STEP_SEGMENTS = 70_000
"""Segments of one step from which on its stripes are taken to be longer than the engine's."""


class StrategyChange(msgspec.Struct, frozen=True):
    """From a position of the prompt on, every KV group uses a strategy."""

    position: int
    strategies: tuple[Strategy, ...]


class PrefillPrediction(msgspec.Struct, frozen=True):
    """Time of a whole prompt."""

    total_s: float
    dense_s: float
    attention_s: float
    sums_s: float
    recurrence_s: float
    fixed_s: float
    num_steps: int
    chunk_len: int
    changes: tuple[StrategyChange, ...]
    """The first is at position 0; the last is in force at the end of the prompt."""


def predict_prefill(
    shape: ModelShape,
    prompt_len: int,
    costs: Costs,
    options: StepOptions,
    *,
    tensor_parallel_size: int = 1,
) -> PrefillPrediction:
    """Predict the time to the first token of a lone request.

    Args:
        shape: one device's part of the model.
        prompt_len: tokens, at least one.
        costs: of one device each; its topology says how many ranks there are.
        options: of the engine.
        tensor_parallel_size: devices per rank.
    """
    geometry = _coarser(options.geometry(costs.topology.num_ranks))
    table, chunk = striped_table(prompt_len, geometry), geometry.chunk_len

    @cache
    def step(index: int) -> StepPrediction:
        start, end = index * chunk, min(prompt_len, (index + 1) * chunk)
        return predict_step(shape, table, start, end, costs, options, tensor_parallel_size=tensor_parallel_size)

    segments_per_step = 2 * len(table.owners(0, min(prompt_len, chunk))) * geometry.num_ranks
    num_samples = max(MIN_SAMPLES, min(MAX_SAMPLES, SEGMENT_BUDGET // segments_per_step))
    num_full, num_steps = prompt_len // chunk, -(-prompt_len // chunk)
    weights = interpolation_weights(_sampled_indices(step, num_full, num_samples))
    if num_full < num_steps:  # a last chunk that is shorter than the others is not interpolated
        weights[num_full] = 1.0
    steps = {index: step(index) for index in weights}

    def over_steps(name: str) -> float:
        return float(sum(getattr(steps[index], name) * weight for index, weight in weights.items()))

    # The last token is read: what it takes of the last layer and for its logits is a decode's, but for all before.
    read_s, last_attention_s = predict_last_row(shape, table, prompt_len, costs)
    return PrefillPrediction(
        total_s=over_steps("total_s") + read_s + last_attention_s,
        dense_s=over_steps("dense_s") + read_s,
        attention_s=over_steps("attention_s") + last_attention_s,
        sums_s=over_steps("sums_s"),
        recurrence_s=over_steps("recurrence_s"),
        fixed_s=over_steps("fixed_s"),
        num_steps=num_steps,
        chunk_len=chunk,
        changes=_changes(steps, chunk),
    )


def _coarser(geometry: StepGeometry) -> StepGeometry:
    """Longer stripes, of chunks as long, where a step would have too many segments to look at each."""
    num_ranks, chunk, stripe_len = geometry.num_ranks, geometry.chunk_len, geometry.stripe_len
    most = max(geometry.tokens_per_rank)
    while 2 * chunk // stripe_len * num_ranks > STEP_SEGMENTS and most % (4 * stripe_len) == 0:
        stripe_len *= 2
    return replace(geometry, stripe_len=stripe_len)


def _sampled_indices(step: Callable[[int], StepPrediction], num_full: int, num_samples: int) -> list[int]:
    """The full steps to predict, ascending: some, evenly spread, and those beside a change of strategy."""
    spread = _spread(num_full, num_samples)
    if num_samples == MIN_SAMPLES:
        return spread
    found = set(spread)
    for low, high in pairwise(spread):
        first = step(low).strategies
        while high - low > 1 and first != step(high).strategies:
            middle = (low + high) // 2
            found.add(middle)
            low, high = (middle, high) if step(middle).strategies == first else (low, middle)
    return sorted(found)


def _spread(count: int, num_samples: int) -> list[int]:
    """Up to so many of `range(count)`, evenly, with both ends."""
    if count <= num_samples:
        return list(range(count))
    return sorted({round(i * (count - 1) / (num_samples - 1)) for i in range(num_samples)})


def interpolation_weights(indices: Sequence[int]) -> dict[int, float]:
    """How often each of some steps counts if those between two of them are interpolated."""
    weights = dict.fromkeys(indices, 1.0)
    for low, high in pairwise(indices):
        weights[low] += (high - low - 1) / 2
        weights[high] += (high - low - 1) / 2
    return weights


def _changes(steps: Mapping[int, StepPrediction], chunk_len: int) -> tuple[StrategyChange, ...]:
    """Where the strategies change over predicted steps, which come in ascending order."""
    changes: list[StrategyChange] = []
    for index, step in steps.items():
        if not changes or changes[-1].strategies != step.strategies:
            changes.append(StrategyChange(index * chunk_len, step.strategies))
    return tuple(changes)
