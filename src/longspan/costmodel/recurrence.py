"""Predicted time of a step's recurrent layers, which ranks compute one after the other.

Holds arithmetic. Must not know kernels, or what a layer multiplies before and behind its recurrence: those are matrix
products like others, and shared.
Read next: `longspan.costmodel.model_time`, which adds it; `longspan.cp.relay`, whose order of work this is.

    seconds of all layers = tokens of all ranks * FLOPS * elements of a state / rate      a run waits for the run before
                          + changes of rank * (bytes of a state over the link, a message per tensor)
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from longspan.costmodel.parameters import Costs
from longspan.kv.state_layout import StateGroup
from longspan.plan.types import QueryRun

FLOPS = 8
"""Per token and element of a recurrence's state: it decays, is read by a key, is written, and is read by a query."""


def predict_recurrence(groups: Sequence[StateGroup], runs: Sequence[QueryRun], costs: Costs) -> float:
    """Predict the seconds of all recurrent layers in a step of one request.

    Args:
        groups: recurrent layers and their states.
        runs: runs of the request, in the order of positions.
        costs: rates and links of one device per rank.
    """
    elements = sum(
        len(group.layers) * prod(component.shape)
        for group in groups
        for component in group.components
        if component.role == "recurrent"
    )
    state_bytes = sum(group.state_bytes for group in groups)
    total_s = 0.0
    for run in runs:
        by_flops = run.num_tokens * FLOPS * elements / costs.rates.attention_rate(run.num_tokens)
        by_bytes = 2 * state_bytes / costs.rates.read_bytes_per_s  # a state is read and written once at least
        total_s += max(by_flops, by_bytes) / costs.speed(run.compute_rank) / costs.rates.ranks_per_device
    for before, after in pairwise(runs):
        if before.compute_rank != after.compute_rank:
            link = costs.topology.link(before.compute_rank, after.compute_rank)
            total_s += sum(
                len(group.layers) * link.message_s(component.num_bytes)
                for group in groups
                for component in group.components
            )
    return total_s
