"""Prompt length from which a lone request is faster striped over all ranks than packed on one.

Holds one pure function of predictions. Must not know free memory or other requests: what does not fit one rank is
striped anyway, and a server may have reasons to pack longer prompts.
Read next: `longspan.costmodel.prompt_time`, which predicts; `longspan.scheduler.page_placer`, which goes by it.
"""

import msgspec

from longspan.costmodel.model_time import StepOptions, predict_decode
from longspan.costmodel.parameters import Costs, Topology
from longspan.costmodel.prompt_time import predict_prefill
from longspan.costmodel.shapes import ModelShape

OUTPUT_LEN = 128
"""Tokens that a request is assumed to generate; if it is striped, each one costs messages in every layer."""

LONGEST_LEN = 1 << 20
"""Longest prompt that is looked at, in tokens."""


def request_s(shape: ModelShape, prompt_len: int, costs: Costs, options: StepOptions) -> float:
    """Predicted seconds of a lone request on all ranks of `costs`: its prompt and `OUTPUT_LEN` output tokens."""
    prefill = predict_prefill(shape, prompt_len, costs, options)
    return prefill.total_s + OUTPUT_LEN * predict_decode(shape, prompt_len, costs, options).total_s


def on_one_rank(costs: Costs) -> Costs:
    """Costs of one rank, the fastest, whose peers are idle."""
    rates = costs.rates
    sharing = rates.ranks_per_device * max(costs.speeds or (1.0,))
    alone = msgspec.structs.replace(
        rates,
        matmul_flops_per_s=rates.matmul_flops_per_s * sharing,
        read_bytes_per_s=rates.read_bytes_per_s * sharing,
        copy_bytes_per_s=rates.copy_bytes_per_s * sharing,
        attention_flops_per_s=tuple((n, rate * sharing) for n, rate in rates.attention_flops_per_s),
        ranks_per_device=1.0,
    )
    return Costs(Topology((0,), costs.topology.inside, costs.topology.between), alone)


def shortest_striped_len(
    shape: ModelShape, costs: Costs, options: StepOptions, longest_len: int = LONGEST_LEN
) -> int | None:
    """Length of the shortest prompt whose request is predicted to end sooner striped than packed.

    Both the time to the first token and the time of `OUTPUT_LEN` more count: a short prompt's prefill may gain less
    from striping than its decode loses.

    Args:
        shape: the model's shape.
        costs: topology and rates of all ranks.
        options: the engine's options.
        longest_len: tokens of the longest prompt that is looked at.

    Returns:
        Tokens, in whole pages; None if no prompt up to `longest_len` gains.
    """
    packed, alone = on_one_rank(costs), msgspec.structs.replace(options, rank_weights=None)

    def gains(num_pages: int) -> bool:
        prompt_len = num_pages * options.page_size
        return request_s(shape, prompt_len, costs, options) < request_s(shape, prompt_len, packed, alone)

    high = 1
    while not gains(high):
        high *= 2
        if high * options.page_size > longest_len:
            return None
    low = high // 2  # does not gain, or is 0
    while high - low > 1 and high - low > high // 16:
        middle = (low + high) // 2
        low, high = (low, middle) if gains(middle) else (middle, high)
    return high * options.page_size
