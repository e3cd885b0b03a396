"""Picture of a plan: time and memory against the context.

Holds the drawing. Must not know how anything was predicted. Needs matplotlib, the extra `plot`.
Read next: `longspan.planner.report`.
"""

from typing import Any

from longspan.cli.pictures import save_figure
from longspan.planner.report import PlanReport


def write_plot(report: PlanReport, path: str) -> None:
    """Draw the contexts of a report into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    time_axes, memory_axes = figure.subplots(2, 1, sharex=True)
    held = [one for one in report.contexts if one.prefill is not None and one.decode is not None]
    every = [one.context_len for one in report.contexts]
    lengths = [one.context_len for one in held]
    _line(time_axes, lengths, [one.prefill.total_s for one in held if one.prefill], "first token", "C0", "-")
    _line(time_axes, every, [one.prefill_floor_s for one in report.contexts], "first token, floor", "C0", ":")
    _line(time_axes, lengths, [one.decode.total_s for one in held if one.decode], "per output token", "C1", "-")
    _line(time_axes, every, [one.decode_floor_s for one in report.contexts], "per output token, floor", "C1", ":")
    time_axes.set_yscale("log")
    time_axes.set_ylabel("seconds")
    _line(memory_axes, every, [one.memory_bytes / 1e9 for one in report.contexts], "weights and KV", "C2", "-")
    memory_axes.axhline(report.fit.usable_bytes / 1e9, color="C3", linestyle="--", label="usable")
    memory_axes.axhline(report.fit.weight_bytes / 1e9, color="C2", linestyle=":", label="weights")
    memory_axes.set_ylim(bottom=0)
    memory_axes.set_ylabel("GB per device")
    memory_axes.set_xlabel("context, tokens")
    memory_axes.set_xscale("log", base=2)
    for axes in (time_axes, memory_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    cluster = report.cluster
    time_axes.set_title(
        f"{report.architecture} on {cluster.num_nodes} x {cluster.devices_per_node} {cluster.name}, "
        f"tensor parallel size {report.tensor_parallel_size} (predicted)"
    )
    save_figure(figure, path)


def _line(axes: Any, x: list[int], y: list[float], label: str, color: str, style: str) -> None:
    axes.plot(x, y, label=label, color=color, linestyle=style, marker="o" if style == "-" else None)
