"""Predicted time of a step's recurrent layers, whose states ranks hand on, and the number of parts that take least.

Holds arithmetic. Must not know kernels, or what a layer multiplies before and behind its recurrence: those are matrix
products like others, and shared.
Read next: `longspan.costmodel.model_time`, which adds it; `longspan.scheduler.state_parts`, which goes by it;
`longspan.cp.relay`, whose order of work this is; `longspan.cp.handover`, Note [Parts of a state].

    seconds of a run and part = tokens * FLOPS * elements of the part / rate
    a part of a run begins      when the rank is done with the part before, and the same part of the run before is here:
                                bytes over the link, a message per tensor and part
    seconds of a layer        = until the last rank is done with its last part
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import TypeAlias

from longspan.costmodel.parameters import Costs
from longspan.kv.state_layout import StateGroup
from longspan.plan.types import QueryRun

FLOPS = 8
"""Per token and element of a recurrence's state: it decays, is read by a key, is written, and is read by a query."""

Spans: TypeAlias = tuple[tuple[int, int], ...]
"""(rank, tokens) of every run of a request, in the order of positions."""


def predict_recurrence(
    groups: Sequence[StateGroup], runs: Sequence[QueryRun], costs: Costs, num_parts: int | None = 1
) -> float:
    """Predict the seconds of all recurrent layers in a step of one request.

    Args:
        groups: recurrent layers and their states.
        runs: runs of the request, in the order of positions.
        costs: rates and links of one device per rank.
        num_parts: parts of a state; None: as many as `choose_parts` finds.
    """
    if num_parts is None:
        num_parts = choose_parts(groups, runs, costs)
    return _predict(groups, spans_of(runs), costs, num_parts)


def choose_parts(groups: Sequence[StateGroup], runs: Sequence[QueryRun], costs: Costs) -> int:
    """Choose the number of parts with the least predicted time, the fewest among equals; 1 where nothing was measured.
    Arguments: `predict_recurrence`."""
    if not costs.are_measured:
        return 1
    return _choose(tuple(groups), spans_of(runs), costs)


def spans_of(runs: Sequence[QueryRun]) -> Spans:
    """Ranks and tokens of runs."""
    return tuple([(run.compute_rank, run.num_tokens) for run in runs])


@lru_cache(maxsize=1024)  # a prompt's chunks are alike
def _choose(groups: tuple[StateGroup, ...], spans: Spans, costs: Costs) -> int:
    most = max((group.num_heads for group in groups), default=1)
    if len({rank for rank, _ in spans}) == 1:
        return 1
    numbers = [2**i for i in range((most - 1).bit_length())] + [most]
    best: int = min(numbers, key=lambda num_parts: _predict(groups, spans, costs, num_parts))
    return best


def _predict(groups: Sequence[StateGroup], spans: Spans, costs: Costs, num_parts: int) -> float:
    return sum(len(group.layers) * _layer_s(group, spans, costs, num_parts) for group in groups)


def _layer_s(group: StateGroup, spans: Spans, costs: Costs, num_parts: int) -> float:
    """Seconds of one layer."""
    headed = max(group.components, key=lambda component: component.num_heads)
    parts = headed.parts(num_parts)
    shares = [len(heads) / headed.num_heads for heads in parts]
    messages = [share * headed.num_bytes for share in shares]
    others = [component.num_bytes for component in group.components if component is not headed]
    num_busy = 1 if len(parts) == 1 else len({rank for rank, _ in spans})
    free_s: dict[int, float] = {}  # by rank
    ready_s, before = [0.0] * len(parts), spans[0][0] if spans else 0
    for rank, num_tokens in spans:
        exchange_s = 0.0
        if rank != before:
            link, exchange_s = costs.topology.link(before, rank), costs.rates.exchange_s
            left_s = ready_s[0] + sum(link.message_s(num_bytes) for num_bytes in others)
            for i, num_bytes in enumerate(messages):
                left_s = max(left_s, ready_s[i]) + num_bytes / link.bytes_per_s
                ready_s[i] = left_s + link.latency_of(num_bytes)
        run_s = _run_s(group, rank, num_tokens, costs, num_busy)
        now = free_s.get(rank, 0.0)
        for i, share in enumerate(shares):
            now = max(now, ready_s[i]) + share * run_s + 2 * exchange_s
            ready_s[i] = now
        free_s[rank], before = now, rank
    return max(free_s.values(), default=0.0)


def _run_s(group: StateGroup, rank: int, num_tokens: int, costs: Costs, num_busy: int) -> float:
    """Seconds of one run in one layer, while so many ranks compute."""
    rates = costs.rates
    elements = sum(prod(component.shape) for component in group.components if component.role == "recurrent")
    by_flops = num_tokens * FLOPS * elements / rates.attention_rate(num_tokens)
    # a state is read and written once at least
    by_bytes = 2 * group.state_bytes / len(group.layers) / rates.read_bytes_per_s
    # Rates are those of ranks that all compute; where they share a device, few of them are faster.
    sharing = max(1.0, rates.ranks_per_device * num_busy / costs.topology.num_ranks)
    return max(by_flops, by_bytes) / costs.speed(rank) * sharing / rates.ranks_per_device
