"""Predicted time of one step of a whole model, and of an output token, on a cluster.

Holds the steps that the scheduler would make for one lone, striped request, and the times of their parts. Must not
know clocks, files, or how the cluster's costs were found.
Read next: `longspan.costmodel.predict`, which predicts attention; `longspan.costmodel.prompt_time`, which adds up the
steps of a prompt.

Note [Parts of a step's time]
    step      fixed time of the driver
    layers    fixed time each; matrix products of the rank with most tokens, or reading the weights if that takes
              longer; norms, rotations and activations, which move bytes
    heads     with tensor parallelism, two all-reduces over the devices of a rank in every layer
    attention strategy and time as `longspan.costmodel.choose` finds them, per KV group, from the same page tables, runs
              and segments that a plan would have
    states    recurrent layers, whose states are handed from rank to rank, whole or head by head
    logits    of one row, in the last step of a prompt and in every decode; of a prompt's other rows the last layer
              computes keys and values only
"""

from collections.abc import Sequence

import msgspec

from longspan.costmodel.choose import best_candidate
from longspan.costmodel.parameters import Costs
from longspan.costmodel.recurrence import predict_recurrence
from longspan.costmodel.shapes import ModelShape
from longspan.kv.layout import KVGroup
from longspan.plan.step_keys import step_keys
from longspan.plan.types import QueryRun
from longspan.sharding.geometry import StepGeometry
from longspan.sharding.pages import PageTable
from longspan.sharding.placement import place
from longspan.types import Placement, Strategy

HIDDEN_WRITES = 8
"""Elements written per token and layer by norms and residual sums, in widths of the model."""

HEAD_WRITES = 6
"""Elements written per token and layer by rotating, copying and casting queries, keys, values and outputs, in widths
of all query heads."""

INNER_WRITES = 2
"""Elements written per token and layer by the activation and the gate, in widths of the feed-forward part."""

_REQUEST_ID = 0


class StepOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of the engine that shape a step; the defaults are `EngineConfig`'s."""

    page_size: int = 16
    stripe_size: int = 512
    max_num_batched_tokens: int = 2048
    step_s: float = 0.0
    """Fixed time of a step outside its layers."""
    rank_weights: tuple[float, ...] | None = None
    """What each rank's part of a prompt is in proportion to; None: all parts are equal."""
    state_parts: int | None = 1
    """Parts in which states of recurrent layers are handed on; None: as many as take the least predicted time."""

    def geometry(self, num_ranks: int) -> StepGeometry:
        """Cuts of prompts for so many ranks."""
        return StepGeometry.of_rank_budget(
            num_ranks, self.page_size, self.stripe_size, self.max_num_batched_tokens, self.rank_weights
        )


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
    recurrence_s: float
    """Time of recurrent layers between their matrix products, over all ranks."""
    fixed_s: float
    """Fixed times of all layers and of the step."""

    @property
    def total_s(self) -> float:
        return self.dense_s + self.attention_s + self.sums_s + self.recurrence_s + self.fixed_s


def striped_table(num_tokens: int, geometry: StepGeometry) -> PageTable:
    """Page table of a lone striped prompt, with the page of the token after it."""
    size, num_ranks = geometry.page_size, geometry.num_ranks
    num_pages = -(-num_tokens // size)
    tail_pages = num_tokens // size + 1 - num_pages
    stripes = geometry.stripes(num_pages, tail_pages)  # from rank 0 on
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
    return [QueryRun(_REQUEST_ID, a, b - a, rank, None) for rank, a, b in table.owners(start, end)]


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
    last_group = shape.spec.last_group
    strategies: list[Strategy] = []
    attention_s = 0.0
    for group in shape.spec.kv_groups:
        strategy, layer_s = _attention(runs, table, group, costs)
        strategies.append(strategy)
        num_layers = len(group.layers)
        if group is last_group and not are_all_read:
            num_layers -= 1
            if num_logit_rows:
                attention_s += _attention(step_runs(table, end - num_logit_rows, end), table, group, costs)[1]
        attention_s += num_layers * layer_s
    most = max(tokens.values())
    return StepPrediction(
        strategies=tuple(strategies),
        dense_s=max(
            predict_dense(shape, count, len(tokens), costs, num_logit_rows, are_all_read=are_all_read) / speed
            for count, speed in {(count, costs.speed(rank)) for rank, count in tokens.items()}
        ),
        attention_s=attention_s,
        sums_s=_sums_s(shape, most, costs, tensor_parallel_size, are_all_read=are_all_read),
        recurrence_s=predict_recurrence(shape.spec.state_groups, runs, costs, options.state_parts),
        fixed_s=shape.spec.num_layers * costs.rates.layer_s + options.step_s,
    )


def _attention(runs: Sequence[QueryRun], table: PageTable, group: KVGroup, costs: Costs) -> tuple[Strategy, float]:
    """Strategy and seconds of one layer's attention."""
    best = best_candidate(step_keys(runs, {_REQUEST_ID: table}, group.spec), group, costs)
    return best.strategy, best.prediction.total_s


def predict_dense(
    shape: ModelShape, num_tokens: int, num_busy: int, costs: Costs, num_logit_rows: int, *, are_all_read: bool
) -> float:
    """Seconds of a step outside attention, on a rank as fast as `costs.rates`.

    Args:
        shape: one device's part of the model.
        num_tokens: tokens of the rank.
        num_busy: ranks with tokens.
        costs: rates and links of one device per rank.
        num_logit_rows: rows that need logits.
        are_all_read: whether all tokens go through the whole last layer.
    """
    rates, spec = costs.rates, shape.spec
    item = shape.itemsize_bytes
    layers_s = _product_s(
        spec.active_parameters - (0.0 if are_all_read else shape.unread_weights()),
        spec.parameters_read(num_tokens) - (0.0 if are_all_read else shape.unread_weights(num_tokens)),
        item,
        num_tokens,
        costs,
    )
    if num_logit_rows:
        met = shape.num_logit_weights + (0.0 if are_all_read else shape.unread_weights())
        read = shape.num_logit_weights + (0.0 if are_all_read else shape.unread_weights(num_logit_rows))
        layers_s += _product_s(met, read, item, num_logit_rows, costs)
    query_width = sum(len(group.layers) * group.query_elements for group in spec.kv_groups)  # of all layers
    per_layer = HIDDEN_WRITES * shape.hidden_size + INNER_WRITES * shape.intermediate_size
    written = HEAD_WRITES * query_width + spec.num_layers * per_layer
    moved_s = num_tokens * written * item / rates.copy_bytes_per_s
    if rates.token_s is not None:
        moved_s = num_tokens * spec.num_layers * rates.token_s if num_tokens > 1 else 0.0  # one token's is in `layer_s`
    # Rates are those of ranks that all compute; where they share a device, few of them are faster.
    sharing = max(1.0, rates.ranks_per_device * num_busy / costs.topology.num_ranks)
    return (layers_s + moved_s) * sharing / rates.ranks_per_device


def _product_s(num_met: float, num_read: float, itemsize_bytes: int, num_tokens: int, costs: Costs) -> float:
    """Seconds of matrix products, of which each token meets `num_met` weights; `num_read` are read, once."""
    by_flops = 2.0 * num_met * num_tokens / costs.rates.matmul_flops_per_s
    return max(by_flops, num_read * itemsize_bytes / costs.rates.read_bytes_per_s)


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


def predict_last_row(shape: ModelShape, table: PageTable, prompt_len: int, costs: Costs) -> tuple[float, float]:
    """What a prompt's last token takes beyond its chunk: the row that is read, and its attention in the last layer.

    Returns:
        Seconds of matrix products, and of attention.
    """
    last_group, attention_s = shape.spec.last_group, 0.0
    runs = step_runs(table, prompt_len - 1, prompt_len)
    if last_group is not None:
        attention_s = _attention(runs, table, last_group, costs)[1]
    num_weights = shape.num_logit_weights + shape.unread_weights()
    product_s = _product_s(num_weights, num_weights, shape.itemsize_bytes, 1, costs)
    return product_s / costs.rates.ranks_per_device / costs.speed(runs[0].compute_rank), attention_s


def predict_decode(
    shape: ModelShape,
    context_len: int,
    costs: Costs,
    options: StepOptions,
    *,
    tensor_parallel_size: int = 1,
) -> StepPrediction:
    """Predict one output token of a lone request.

    Args:
        shape: one device's part of the model.
        context_len: tokens before it.
        costs: topology of all ranks; rates and links of one device per rank.
        options: the engine's options.
        tensor_parallel_size: devices per rank.
    """
    return predict_step(
        shape,
        striped_table(context_len, options.geometry(costs.topology.num_ranks)),
        context_len,
        context_len + 1,
        costs,
        options,
        tensor_parallel_size=tensor_parallel_size,
        num_logit_rows=1,
    )


def prefill_flops(shape: ModelShape, prompt_len: int) -> float:
    """Fewest flops of a prompt on the whole model `shape`.

    2 per token and weight that it meets; 2 per query head, visible key and element of key and value; only keys and
    values of the last layer; logits of one row.
    """
    total = 2.0 * (shape.spec.active_parameters - shape.unread_weights()) * prompt_len + 2.0 * shape.num_logit_weights
    for group in shape.spec.kv_groups:
        num_layers = len(group.layers) - (group is shape.spec.last_group)
        pairs = group.spec.num_pairs(0, prompt_len)
        total += pairs * num_layers * group.pair_flops(pairs / prompt_len)
    return total


def decode_bytes(shape: ModelShape, context_len: int) -> float:
    """Fewest bytes that an output token reads on all devices: every weight that it meets, and the visible KV."""
    weights = (shape.spec.active_parameters + shape.num_logit_weights) * shape.itemsize_bytes
    return weights + sum(
        group.token_bytes * (context_len + 1 - group.spec.first_key(context_len)) for group in shape.spec.kv_groups
    )
