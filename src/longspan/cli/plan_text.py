"""Text of a plan: a table on a terminal, plain lines elsewhere.

Holds words and number formats. Must not know how anything was predicted.
Read next: `longspan.planner.report`.
"""

from collections.abc import Sequence

import click

from longspan.costmodel.prompt_time import StrategyChange
from longspan.planner.clusters import Cluster
from longspan.planner.report import ContextPlan, PlanReport
from longspan.types import Strategy

HEADINGS = (
    "context",
    "first token",
    "floor",
    "prefill",
    "per output token",
    "floor",
    "decode",
    "memory per device",
    "smallest cluster",
)


def print_plan(report: PlanReport, *, is_terminal: bool) -> None:
    """Write a plan to standard output."""
    facts = plan_facts(report)
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        click.echo(f"{name.ljust(width)}  {value}")
    click.echo()
    rows = [_row(report, one) for one in report.contexts]
    lines: list[Sequence[str]] = [HEADINGS, *rows]
    if is_terminal:
        from rich.console import Console
        from rich.table import Table

        table = Table(*HEADINGS)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    else:
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
        for line in lines:
            click.echo("  ".join(cell.ljust(size) for cell, size in zip(line, widths, strict=True)).rstrip())
    click.echo()
    for remark in plan_remarks(report):
        click.echo(remark)


def plan_facts(report: PlanReport) -> list[tuple[str, str]]:
    """Pairs (name, value) of everything above the table."""
    cluster, fit, tp = report.cluster, report.fit, report.tensor_parallel_size
    kept = cluster.memory_bytes - fit.usable_bytes
    kept_share = 100 * (1 - report.memory_utilization)
    room = (
        f"{_bytes(fit.kv_bytes)} for KV" if fit.num_tokens else f"no room for KV: {_bytes(fit.usable_bytes)} are usable"
    )
    longest = "windows admit any length" if fit.longest_request is None else f"longest request {fit.longest_request:,}"
    if fit.longest_request == 0:
        longest = "no request fits"
    limit = "does not say" if report.max_position is None else f"{report.max_position:,} tokens"
    unequal: list[tuple[str, str]] = []
    if (weights := report.options.rank_weights) is not None:
        each = [
            f"{weight:g} with {tokens:,} tokens" for weight, tokens in zip(weights, fit.tokens_per_rank, strict=True)
        ]
        unequal = [("weights", f"{'; '.join(each)}; the largest is the device below, the others in proportion")]
    return [
        ("model", f"{report.model} ({report.architecture}), {_count(report.num_weights)} weights in {report.dtype}"),
        ("cluster", _cluster_words(cluster)),
        ("ranks", f"{report.num_ranks} of {_number_of(tp, 'device')}; placement {report.placement}"),
        *unequal,
        ("steps", f"chunks of {report.chunk_len:,} tokens, {report.options.max_num_batched_tokens:,} or less per rank"),
        ("rates", _rates_words(report)),
        ("fixed times", _fixed_words(report)),
        (
            "memory",
            f"per device: {_bytes(fit.weight_bytes)} weights, {room}, {_bytes(kept)} kept back ({kept_share:.0f} %)",
        ),
        ("KV", f"{_bytes(report.kv_token_bytes)} per token; {fit.num_tokens:,} tokens fit in all; {longest}"),
        *_states(report),
        ("positions", f"the model's config admits {limit}" if report.max_position else f"the model's config {limit}"),
    ]


def _states(report: PlanReport) -> list[tuple[str, str]]:
    """What recurrent layers take, if there are any."""
    if not report.state_bytes:
        return []
    return [("states", f"{_bytes(report.state_bytes)} per request; {report.fit.num_pages[-1]:,} fit on a rank")]


def plan_remarks(report: PlanReport) -> list[str]:
    """Remarks below the table."""
    remarks = [_does_not_fit(report, one) for one in report.contexts if not one.fits]
    remarks += [
        f"{_tokens(one.context_len)}: longer than the {report.max_position:,} positions that the model's config admits."
        for one in report.contexts
        if one.exceeds_model
    ]
    for one in report.contexts:
        if one.prefill is not None and len(one.prefill.changes) > 1:
            remarks.append(f"{_tokens(one.context_len)}: prefill by {_changes(one.prefill.changes)}.")
        if one.load_s is not None:
            where = f"{_tokens(one.context_len)}: {_bytes(one.kv_bytes)} of KV in a tier"
            remarks.append(f"{where} are loaded in {_time(one.load_s)} instead of being computed.")
    if report.state_bytes and report.num_ranks > 1:
        remarks.append("Recurrent layers are reckoned as if ranks shared them; a chunk's are computed rank after rank.")
    if report.not_run is not None:
        remarks.append(f"The engine does not run this model yet ({report.not_run}).")
    if report.tensor_parallel_size > 1:
        remarks.append("Sums inside a rank are modelled; the engine has not run them on GPUs.")
    if report.cluster.rates is None:
        remarks.append("Rates are assumed shares of published figures. No GPU has run the engine yet.")
    remarks.append(
        "floor: all flops at the full rate of all devices; all weights and KV at their full bandwidth. Times are those "
        "of one request alone."
    )
    return remarks


def _row(report: PlanReport, one: ContextPlan) -> list[str]:
    """One line of the table."""
    if one.prefill is None or one.decode is None:
        first, prefill, token, decode = "does not fit", "-", "-", "-"
    else:
        first, token = _time(one.prefill.total_s), _time(one.decode.total_s)
        prefill, decode = strategy_words(one.prefill.changes[-1].strategies), strategy_words(one.decode.strategies)
    context = _tokens(one.context_len) + " (!)" * one.exceeds_model
    joint = "of" if one.fits else "needed, usable"
    memory = f"{_bytes(one.memory_bytes)} {joint} {_bytes(report.fit.usable_bytes)}"
    smallest = _cluster_size(report, one.smallest_devices)
    return [
        context,
        first,
        _time(one.prefill_floor_s),
        prefill,
        token,
        _time(one.decode_floor_s),
        decode,
        memory,
        smallest,
    ]


def _does_not_fit(report: PlanReport, one: ContextPlan) -> str:
    """Remark on a context that does not fit: memory needed, memory there, and what would help."""
    kv = one.memory_bytes - report.fit.weight_bytes
    ways = [f"devices with {_bytes(one.needed_device_bytes)}"]
    if one.smallest_devices is not None:
        ways.insert(0, _cluster_size(report, one.smallest_devices))
    if one.fitting_tensor_parallel_size is not None:
        ways.insert(0, f"tensor_parallel_size {one.fitting_tensor_parallel_size}")
    return (
        f"{_tokens(one.context_len)} does not fit: needed per device are {_bytes(report.fit.weight_bytes)} of weights "
        f"and {_bytes(kv)} of KV, usable are {_bytes(report.fit.usable_bytes)}; what would fit it: "
        f"{'; or '.join(ways)}."
    )


def _cluster_size(report: PlanReport, num_devices: int | None) -> str:
    per_node = report.cluster.devices_per_node
    if num_devices is None:
        return "none"
    nodes = f", {num_devices // per_node} nodes" if num_devices > per_node else ""
    return _number_of(num_devices, "device") + nodes


def _cluster_words(cluster: Cluster) -> str:
    nodes = _number_of(cluster.num_nodes, "node")
    kind = "with measured rates" if cluster.rates is not None else f"{cluster.name}"
    each = f"{_bytes(cluster.memory_bytes)} each"
    if cluster.rates is not None:
        return f"{cluster.name}: {nodes} of {_number_of(cluster.devices_per_node, 'rank')} {kind}, {each}"
    return f"{nodes} of {cluster.devices_per_node} x {kind}, {each}"


def _rates_words(report: PlanReport) -> str:
    cluster, a = report.cluster, report.cluster.assumptions
    flops = cluster.peak_flops_per_s("float32" if report.dtype == "float32" else "bfloat16")
    links = [("in a node", cluster.inside)] * (cluster.devices_per_node > 1)
    links += [("between nodes", cluster.between)] * (cluster.num_nodes > 1)
    if cluster.rates is not None:
        measured = [f"matmul {_rate(flops, 'FLOP/s')}", f"memory {_rate(cluster.read_bytes_per_s, 'B/s')}"]
        measured += [f"links {where} {_rate(link.bytes_per_s, 'B/s')}" for where, link in links]
        return "measured: " + ", ".join(measured)
    words = [
        f"{a.matmul_efficiency:.0%} (matmul) and {a.attention_efficiency:.0%} (attention) of {_rate(flops, 'FLOP/s')}",
        f"{a.read_efficiency:.0%} of {_rate(cluster.read_bytes_per_s, 'B/s')} memory",
    ]
    words += [f"{a.link_efficiency:.0%} of {_rate(link.bytes_per_s, 'B/s')} {where}" for where, link in links]
    return "assumed: " + ", ".join(words)


def _fixed_words(report: PlanReport) -> str:
    cluster, a = report.cluster, report.cluster.assumptions
    known = cluster.rates or a
    words = [f"step {_time(a.step_s)}", f"layer {_time(known.layer_s)}", f"attention call {_time(known.call_s)}"]
    words.append(f"message {_time(known.exchange_s)}")
    if cluster.devices_per_node > 1:
        words.append(f"latency {_time(cluster.inside.latency_s)} in a node")
    if cluster.num_nodes > 1:
        words.append(f"{_time(cluster.between.latency_s)} between nodes")
    return ", ".join(words)


def _changes(changes: Sequence[StrategyChange]) -> str:
    words = [strategy_words(changes[0].strategies)]
    words += [f"{strategy_words(change.strategies)} from {change.position:,} on" for change in changes[1:]]
    return ", ".join(words)


def strategy_words(strategies: Sequence[Strategy]) -> str:
    """The strategies of all KV groups, each once."""
    return "/".join(dict.fromkeys(strategy.value for strategy in strategies))


def _tokens(num_tokens: int) -> str:
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if num_tokens % size == 0:
            return f"{num_tokens // size}{unit}"
    return f"{num_tokens:,}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _scaled(value: float, units: Sequence[str]) -> str:
    index = 0
    while abs(value) >= 999.5 and index < len(units) - 1:
        value, index = value / 1000, index + 1
    return f"{value:.3g} {units[index]}"


def _bytes(num_bytes: float) -> str:
    return _scaled(num_bytes, ("B", "kB", "MB", "GB", "TB"))


def _rate(value: float, unit: str) -> str:
    return _scaled(value, (f" {unit}".strip(), *(f"{prefix}{unit}" for prefix in "kMGTP")))


def _count(number: float) -> str:
    return _scaled(number, ("", "k", "M", "G", "T")).strip()


def _number_of(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
