"""Strategies that the policy chooses for steps of typical shapes, as a table of predictions.

Holds the shapes and pure functions. Must not know displays, or running requests.
Read next: `longspan.costmodel.choose`; `longspan.cli.topology`, which prints the table.
"""

from collections.abc import Sequence

import msgspec

from longspan.costmodel.choose import predict_candidates
from longspan.costmodel.model_time import StepOptions, step_runs, striped_table
from longspan.costmodel.parameters import Costs
from longspan.kv.layout import KVGroup
from longspan.plan.step_keys import step_keys
from longspan.types import Phase, Strategy

CHUNKS = (1, 128, 1024, 4096, 16384)
"""New tokens of a step, over all ranks; 1 is a decode."""

CONTEXTS = (0, 4096, 32768, 262144)
"""Tokens that precede the new tokens of a step."""


class StepChoice(msgspec.Struct, frozen=True):
    """Choice for one step of one striped request, in one KV group."""

    phase: Phase
    group_idx: int
    chunk: int
    context: int
    strategy: Strategy
    """Chosen strategy; `local` where every key is on the rank of its query."""
    predicted_s: dict[str, float]
    """Predicted seconds of one layer by candidate; empty where the strategy is `local`."""


def predict_step_choice(
    group: KVGroup, group_idx: int, chunk: int, context: int, costs: Costs, options: StepOptions
) -> StepChoice:
    """The policy's choice for a step of `chunk` tokens behind `context` others."""
    table = striped_table(context + chunk, options.geometry(costs.topology.num_ranks))
    runs = step_runs(table, context, context + chunk)
    keys = step_keys(runs, {0: table}, group.spec)
    phase = Phase.DECODE if chunk == 1 else Phase.PREFILL
    if not keys.participants:
        return StepChoice(phase, group_idx, chunk, context, Strategy.LOCAL, {})
    predicted = {found.strategy: found.prediction.total_s for found in predict_candidates(keys, group, costs)}
    strategy = min(predicted, key=lambda strategy: predicted[strategy])  # the first of equals
    return StepChoice(phase, group_idx, chunk, context, strategy, {s.value: t for s, t in predicted.items()})


def predict_grid(groups: Sequence[KVGroup], costs: Costs, options: StepOptions) -> list[StepChoice]:
    """Choices for all typical steps of all KV groups."""
    return [
        predict_step_choice(group, group_idx, chunk, context, costs, options)
        for group_idx, group in enumerate(groups)
        for chunk in CHUNKS
        for context in CONTEXTS
        if context or chunk > 1
    ]
