"""Lending of threads: ranks that wait lend theirs to the rank that computes the dense part of a step.

Holds the rule. Must not know attention, or how kernels divide their work.
Read next: `longspan.worker.runner`, which sets the threads; docs/decisions/0018-waiting-ranks.md.
"""

from torch import nn

from longspan.cpu_binding import num_cores
from longspan.plan.types import Plan
from longspan.types import ModelSpec, Phase

MIN_LAYER_BYTES = 32 * 2**20
"""Fewest bytes of a layer's weights for which more threads pay: below, waking threads takes as long as they save."""


def lends(own_threads: int, model: nn.Module, spec: ModelSpec) -> bool:
    """Whether ranks of one machine, with `own_threads` each, lend their threads while they wait.

    Ranks with several threads do not lend, since their threads spin while they wait for their next piece of work.
    """
    read = spec.active_parameters / max(1, spec.num_parameters)  # of a mixture's experts a token meets some
    layer_bytes = read * sum(weight.nbytes for weight in model.parameters()) / spec.num_layers
    return own_threads == 1 and layer_bytes >= MIN_LAYER_BYTES


def borrowed_threads(plan: Plan, rank: int) -> int:
    """Number of threads for the dense part of a plan on a rank, borrowed ones included.

    In a decode whose tokens are all computed by one rank, the plan's other ranks only answer queries, so they sleep
    while the dense part of a layer is computed.
    """
    others = zip(plan.ranks, plan.num_tokens, strict=True)
    if plan.phase is not Phase.DECODE or any(count for other, count in others if other != rank):
        return 1
    return min(len(plan.ranks), num_cores())
