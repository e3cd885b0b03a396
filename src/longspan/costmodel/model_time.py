"""Predicted time of a whole model for a prompt and for an output token, on a cluster.

Holds the steps that the scheduler would make for one lone, striped request, and the times of their parts. Must not
know clocks, files, or how the cluster's costs were found.
Read next: `longspan.costmodel.predict`, which predicts attention; `longspan.planner.report`, which plans with this.

Note: parts of a step's time
    step      fixed time of the driver
    layers    fixed time each; matrix products of the rank with most tokens, or reading the weights if that takes
              longer; norms, rotations and activations, which move bytes
    heads     with tensor parallelism, two all-reduces over the devices of a rank in every layer
    attention strategy and time as `longspan.costmodel.choose` finds them, per KV group, from the same page tables, runs
              and segments that a plan would have
    logits    of one row, in the last step of a prompt and in every decode; of a prompt's other rows the last layer
              computes keys and values only

Note: sampled steps
    From one chunk of a prompt to the next only the context grows, and a step's time is nearly linear in it while the
    strategy stays the same. So some of many chunks are predicted and the others interpolated; where two neighbours
    choose different strategies, bisection finds the change. With about 100 ranks or more, stripes are taken to be
    longer than they are (two per rank and chunk), and two steps are predicted. A prediction takes seconds at most.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec

from longspan.costmodel.choose import best_candidate
from longspan.costmodel.parameters import Costs
from longspan.costmodel.shapes import ModelShape
from longspan.kv.layout import KVGroup
from longspan.plan.segments import make_segments
from longspan.plan.types import Literals, QueryRun
from longspan.sharding.pages import PageTable
from longspan.sharding.placement import chunk_len, place, stripe_lengths
from longspan.types import Placement, Strategy

HIDDEN_WRITES = 8
"""Elements written per token and layer by norms and residual sums, in widths of the model."""

HEAD_WRITES = 6
"""Elements written per token and layer by rotating, copying and casting queries, keys, values and outputs, in widths
of all query heads."""

INNER_WRITES = 2
"""Elements written per token and layer by the activation and the gate, in widths of the feed-forward part."""

SEGMENT_BUDGET = 60_000
"""Most segments of all predicted steps of one prompt together, which bounds the time of a prediction."""

MIN_SAMPLES, MAX_SAMPLES = 2, 12
"""Fewest and most steps of one prompt that are predicted before changes of strategy are searched."""

STEP_SEGMENTS = 70_000
"""Most segments of one step; with more, stripes are taken to be longer than the engine's."""

_REQUEST_ID = 0


class StepOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of the engine that shape a step; the defaults are `EngineConfig`'s."""

    page_size: int = 16
    stripe_size: int = 512
    max_num_batched_tokens: int = 2048
    step_s: float = 0.0
    """Fixed time of a step outside its layers."""

    @property
    def whole_pages_per_step(self) -> int:
        """Tokens of the whole pages that one rank may compute in a step."""
        return max(self.page_size, self.max_num_batched_tokens // self.page_size * self.page_size)

    @property
    def stripe_len(self) -> int:
        """Tokens per stripe."""
        return min(self.stripe_size, self.whole_pages_per_step)

    def chunk_len(self, num_ranks: int) -> int:
        """Tokens of a full chunk, over all ranks."""
        return chunk_len(self.whole_pages_per_step, self.stripe_len, num_ranks)


class StepPrediction(msgspec.Struct, frozen=True):
    """Time of one step and its parts."""

    strategies: tuple[Strategy, ...]
    """Strategy of each KV group."""
    dense_s: float
    """Time of matrix products (or of reading their weights), norms, rotations and activations."""
    attention_s: float
    """Time of attention in all layers, exchanges and waits included."""
    sums_s: float
    """Time of tensor parallelism's all-reduces."""
    fixed_s: float
    """Fixed times of all layers and of the step."""

    @property
    def total_s(self) -> float:
        return self.dense_s + self.attention_s + self.sums_s + self.fixed_s


class StrategyChange(msgspec.Struct, frozen=True):
    """Strategies that are used from one position of a prompt on."""

    position: int
    strategies: tuple[Strategy, ...]
    """Strategy of each KV group."""


class PrefillPrediction(msgspec.Struct, frozen=True):
    """Time of a whole prompt and its parts, which are those of `StepPrediction`."""

    total_s: float
    dense_s: float
    attention_s: float
    sums_s: float
    fixed_s: float
    num_steps: int
    chunk_len: int
    changes: tuple[StrategyChange, ...]
    """Changes of strategy in sequence order; the first one is at position 0."""


def striped_table(num_tokens: int, num_ranks: int, options: StepOptions) -> PageTable:
    """Page table of a lone striped prompt, with the page of the token after it."""
    size, chunk = options.page_size, options.chunk_len(num_ranks)
    num_pages = -(-num_tokens // size)
    tail_pages = num_tokens // size + 1 - num_pages
    stripes = stripe_lengths(num_pages, options.stripe_len // size, chunk // size, num_ranks, tail_pages)
    runs = place(Placement.STRIPED, stripes, [num_pages + tail_pages] * num_ranks, 0)
    assert runs is not None
    table = PageTable(size)
    used = [0] * num_ranks
    for rank, pages in runs:
        table.append(rank, used[rank], pages)
        used[rank] += pages
    return table


def step_runs(table: PageTable, start: int, end: int) -> list[QueryRun]:
    """Query runs of a step that computes positions `[start, end)`."""
    return [QueryRun(_REQUEST_ID, a, b - a, rank, Literals(())) for rank, a, b in table.owners(start, end)]


def predict_step(
    shape: ModelShape,
    table: PageTable,
    start: int,
    end: int,
    costs: Costs,
    options: StepOptions,
    *,
    tensor_parallel_size: int = 1,
    num_logit_rows: int = 0,
) -> StepPrediction:
    """Predict one step.

    Args:
        shape: one device's part of the model.
        table: the request's page table, which is the same for every KV group.
        start: first position that the step computes.
        end: one past the last position.
        costs: rates and links of one device per rank.
        options: the engine's options.
        tensor_parallel_size: devices per rank.
        num_logit_rows: rows that need logits.
    """
    runs = step_runs(table, start, end)
    tokens: dict[int, int] = {}
    for run in runs:
        tokens[run.compute_rank] = tokens.get(run.compute_rank, 0) + run.num_tokens
    are_all_read = num_logit_rows == end - start
    last_layer = shape.spec.num_layers - 1
    strategies: list[Strategy] = []
    attention_s = 0.0
    for group in shape.spec.kv_groups:
        strategy, layer_s = _attention(runs, table, group, costs)
        strategies.append(strategy)
        num_layers = len(group.layers)
        if last_layer in group.layers and not are_all_read:
            num_layers -= 1
            if num_logit_rows:
                attention_s += _attention(step_runs(table, end - num_logit_rows, end), table, group, costs)[1]
        attention_s += num_layers * layer_s
    most = max(tokens.values())
    return StepPrediction(
        strategies=tuple(strategies),
        dense_s=_dense_s(shape, most, len(tokens), costs, num_logit_rows, are_all_read=are_all_read),
        attention_s=attention_s,
        sums_s=_sums_s(shape, most, costs, tensor_parallel_size, are_all_read=are_all_read),
        fixed_s=shape.spec.num_layers * costs.rates.layer_s + options.step_s,
    )


def _attention(runs: Sequence[QueryRun], table: PageTable, group: KVGroup, costs: Costs) -> tuple[Strategy, float]:
    """Strategy and seconds of one layer's attention."""
    tables = {_REQUEST_ID: table}
    step, prediction = best_candidate(make_segments(runs, tables, group.spec.window), tables, group, costs)
    return step.strategy, prediction.total_s


def _dense_s(
    shape: ModelShape, num_tokens: int, num_busy: int, costs: Costs, num_logit_rows: int, *, are_all_read: bool
) -> float:
    """Seconds of a step outside attention, on the rank with most tokens."""
    rates, spec = costs.rates, shape.spec
    item = shape.itemsize_bytes
    unread = 0.0 if are_all_read else shape.num_unread_weights
    layers_s = _product_s(spec.num_parameters - unread, item, num_tokens, costs)
    if num_logit_rows:
        layers_s += _product_s(shape.num_logit_weights + unread, item, num_logit_rows, costs)
    query_width = sum(len(group.layers) * group.query_elements for group in spec.kv_groups)  # of all layers
    per_layer = HIDDEN_WRITES * shape.hidden_size + INNER_WRITES * shape.intermediate_size
    written = HEAD_WRITES * query_width + spec.num_layers * per_layer
    moved_s = num_tokens * written * item / rates.copy_bytes_per_s
    if rates.token_s is not None:
        moved_s = num_tokens * spec.num_layers * rates.token_s if num_tokens > 1 else 0.0  # one token's is in `layer_s`
    # Rates are those of ranks that all compute; where they share a device, few of them are faster.
    sharing = max(1.0, rates.ranks_per_device * num_busy / costs.topology.num_ranks)
    return (layers_s + moved_s) * sharing / rates.ranks_per_device


def _product_s(num_weights: float, itemsize_bytes: int, num_tokens: int, costs: Costs) -> float:
    """Seconds of matrix products of tokens with weights, which are read once."""
    by_flops = 2.0 * num_weights * num_tokens / costs.rates.matmul_flops_per_s
    return max(by_flops, num_weights * itemsize_bytes / costs.rates.read_bytes_per_s)


def _sums_s(
    shape: ModelShape, num_tokens: int, costs: Costs, tensor_parallel_size: int, *, are_all_read: bool
) -> float:
    """Seconds of two all-reduces per layer over the devices of a rank: bytes as in a ring, latency as in a tree."""
    size = tensor_parallel_size
    if size == 1:
        return 0.0
    link = costs.topology.inside
    num_bytes = num_tokens * shape.hidden_size * shape.itemsize_bytes * 2 * (size - 1) / size
    hops = 2 * (size - 1).bit_length()
    num_layers = shape.spec.num_layers - (not are_all_read)
    return 2 * num_layers * (num_bytes / link.bytes_per_s + hops * link.latency_s)


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
        prompt_len: tokens of the prompt, at least one.
        costs: topology of all ranks; rates and links of one device per rank.
        options: the engine's options.
        tensor_parallel_size: devices per rank.
    """
    num_ranks = costs.topology.num_ranks
    options = _coarser(options, num_ranks)
    table = striped_table(prompt_len, num_ranks, options)
    chunk = options.chunk_len(num_ranks)
    num_steps = -(-prompt_len // chunk)
    known: dict[int, StepPrediction] = {}

    def step(index: int) -> StepPrediction:
        if index not in known:
            known[index] = predict_step(
                shape,
                table,
                index * chunk,
                min(prompt_len, (index + 1) * chunk),
                costs,
                options,
                tensor_parallel_size=tensor_parallel_size,
            )
        return known[index]

    # A last chunk that is shorter than the others is not interpolated.
    num_full = prompt_len // chunk
    segments_per_step = 2 * len(table.owners(0, min(prompt_len, chunk))) * num_ranks
    num_samples = max(MIN_SAMPLES, min(MAX_SAMPLES, SEGMENT_BUDGET // segments_per_step))
    for index in _spread(num_full, num_samples):
        step(index)
    if num_samples > MIN_SAMPLES:
        _search_changes(step, sorted(known))
    weights = _weights(sorted(known))
    if num_full < num_steps:
        step(num_full)
        weights[num_full] = 1.0
    changes: list[StrategyChange] = []
    for index in sorted(known):
        if not changes or changes[-1].strategies != known[index].strategies:
            changes.append(StrategyChange(index * chunk, known[index].strategies))

    def over_steps(name: str) -> float:
        return float(sum(getattr(known[index], name) * weight for index, weight in weights.items()))

    # The last token is sampled from: its share of the last layer and its logits take as long as in a decode.
    (last_group,) = [group for group in shape.spec.kv_groups if shape.spec.num_layers - 1 in group.layers]
    last_runs = step_runs(table, prompt_len - 1, prompt_len)
    last_attention_s = _attention(last_runs, table, last_group, costs)[1]
    read_weights = shape.num_logit_weights + shape.num_unread_weights
    read_s = _product_s(read_weights, shape.itemsize_bytes, 1, costs) / costs.rates.ranks_per_device
    return PrefillPrediction(
        total_s=over_steps("total_s") + read_s + last_attention_s,
        dense_s=over_steps("dense_s") + read_s,
        attention_s=over_steps("attention_s") + last_attention_s,
        sums_s=over_steps("sums_s"),
        fixed_s=over_steps("fixed_s"),
        num_steps=num_steps,
        chunk_len=chunk,
        changes=tuple(changes),
    )


def _coarser(options: StepOptions, num_ranks: int) -> StepOptions:
    """Options with longer stripes in equal chunks, where a step would have too many segments to look at each."""
    stripe_len = options.stripe_len
    while (
        2 * options.chunk_len(num_ranks) // stripe_len * num_ranks > STEP_SEGMENTS
        and options.chunk_len(num_ranks) % (4 * num_ranks * stripe_len) == 0
    ):
        stripe_len *= 2
    return msgspec.structs.replace(options, stripe_size=stripe_len)


def _spread(count: int, num_samples: int) -> list[int]:
    """At most `num_samples` of `range(count)`, evenly spaced, both ends included."""
    if count <= num_samples:
        return list(range(count))
    return sorted({round(i * (count - 1) / (num_samples - 1)) for i in range(num_samples)})


def _search_changes(step: Callable[[int], StepPrediction], indices: Sequence[int]) -> None:
    """Predict the steps on both sides of every change of strategy between two known steps."""
    for low, high in pairwise(indices):
        first = step(low).strategies
        while high - low > 1 and first != step(high).strategies:
            middle = (low + high) // 2
            low, high = (middle, high) if step(middle).strategies == first else (low, middle)


def _weights(indices: Sequence[int]) -> dict[int, float]:
    """Weight of each known step in a sum over all steps, where those between two known ones are interpolated."""
    weights = dict.fromkeys(indices, 1.0)
    for low, high in pairwise(indices):
        weights[low] += (high - low - 1) / 2
        weights[high] += (high - low - 1) / 2
    return weights


def predict_decode(
    shape: ModelShape,
    context_len: int,
    costs: Costs,
    options: StepOptions,
    *,
    tensor_parallel_size: int = 1,
) -> StepPrediction:
    """Predict one output token of a lone request behind `context_len` tokens. Other arguments: `predict_prefill`."""
    return predict_step(
        shape,
        striped_table(context_len, costs.topology.num_ranks, options),
        context_len,
        context_len + 1,
        costs,
        options,
        tensor_parallel_size=tensor_parallel_size,
        num_logit_rows=1,
    )


def prefill_flops(shape: ModelShape, prompt_len: int) -> float:
    """Fewest flops of a prompt on the whole model `shape`.

    2 per token and weight; 2 per query head, visible key and element of key and value; only keys and values of the last
    layer; logits of one row.
    """
    total = 2.0 * (shape.spec.num_parameters - shape.num_unread_weights) * prompt_len + 2.0 * shape.num_logit_weights
    for group in shape.spec.kv_groups:
        window = min(prompt_len, group.spec.window or prompt_len)
        pairs = window * (window + 1) / 2 + (prompt_len - window) * window
        num_layers = len(group.layers) - (shape.spec.num_layers - 1 in group.layers)
        total += pairs * num_layers * group.pair_flops
    return total


def decode_bytes(shape: ModelShape, context_len: int) -> float:
    """Fewest bytes that an output token reads on all devices: every weight of the whole model, and the visible KV."""
    weights = (shape.spec.num_parameters + shape.num_logit_weights) * shape.itemsize_bytes
    return weights + sum(
        group.token_bytes * min(context_len + 1, group.spec.window or context_len + 1) for group in shape.spec.kv_groups
    )
