"""Picture of a plan: time, memory and the smallest cluster against the context.

Holds the drawing. Must not know how anything was predicted. Needs matplotlib, the extra `plot`.
Read next: `longspan.planner.report`.
"""

from typing import Any

from longspan.cli.pictures import save_figure
from longspan.cli.plan_text import strategy_words
from longspan.planner.report import PlanReport


def write_plot(report: PlanReport, path: str) -> None:
    """Draw the contexts of a report into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 10), layout="constrained")
    time_axes, memory_axes, cluster_axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.4))
    _draw_times(time_axes, report)
    _draw_memory(memory_axes, report)
    _draw_clusters(cluster_axes, report)
    for axes in (time_axes, memory_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    cluster = report.cluster
    time_axes.set_title(
        f"{report.architecture} on {cluster.num_nodes} x {cluster.devices_per_node} {cluster.name}, "
        f"tensor parallel size {report.tensor_parallel_size} (predicted)"
    )
    save_figure(figure, path)


def _draw_times(axes: Any, report: PlanReport) -> None:
    """Times and their floors, with the strategy of the last chunk of every prefill."""
    held = [one for one in report.contexts if one.prefill is not None and one.decode is not None]
    every = [one.context_len for one in report.contexts]
    lengths = [one.context_len for one in held]
    _line(axes, lengths, [one.prefill.total_s for one in held if one.prefill], "first token", "C0", "-")
    _line(axes, every, [one.prefill_floor_s for one in report.contexts], "first token, floor", "C0", ":")
    _line(axes, lengths, [one.decode.total_s for one in held if one.decode], "per output token", "C1", "-")
    _line(axes, every, [one.decode_floor_s for one in report.contexts], "per output token, floor", "C1", ":")
    for one in held:
        assert one.prefill is not None
        words = strategy_words(one.prefill.changes[-1].strategies)
        place = (one.context_len, one.prefill.total_s)
        axes.annotate(words, place, xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8, color="C0")
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_ylabel("seconds")


def _draw_memory(axes: Any, report: PlanReport) -> None:
    """Memory of the device that holds most, and what is usable."""
    every = [one.context_len for one in report.contexts]
    _line(axes, every, [one.memory_bytes / 1e9 for one in report.contexts], "weights and KV", "C2", "-")
    axes.axhline(report.fit.usable_bytes / 1e9, color="C3", linestyle="--", label="usable")
    axes.axhline(report.fit.weight_bytes / 1e9, color="C2", linestyle=":", label="weights")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GB per device")


def _draw_clusters(axes: Any, report: PlanReport) -> None:
    """Devices of the smallest cluster of this kind that holds each context."""
    known = [(one.context_len, one.smallest_devices) for one in report.contexts if one.smallest_devices is not None]
    lengths = [length for length, _ in known]
    axes.vlines(lengths, 0, [count for _, count in known], color="C4", linewidth=6)
    for length, count in known:
        axes.annotate(f"{count}", (length, count), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8)
    axes.axhline(report.num_devices, color="C3", linestyle="--", label="here")
    axes.margins(y=0.3)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("smallest cluster,\ndevices")
    axes.set_xlabel("context, tokens")
    axes.set_xscale("log", base=2)
    axes.legend(loc="upper left")


def _line(axes: Any, x: list[int], y: list[float], label: str, color: str, style: str) -> None:
    axes.plot(x, y, label=label, color=color, linestyle=style, marker="o" if style == "-" else None)
