"""Picture of a plan: time and memory against the context.

Holds the drawing. Must not know how anything was predicted. Needs matplotlib, the extra `plot`.
Read next: `longspan.planner.report`.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

from longspan.errors import ConfigError
from longspan.planner.report import PlanReport


def check_plot(path: str) -> None:
    """Refuse a picture that cannot be written, before anything is computed.

    Raises:
        ConfigError: matplotlib is missing, or the file's name or directory will not do.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plot: needs matplotlib, which is not installed; legal with pip install 'longspan[plot]'")
    if Path(path).suffix.lower() != ".png":
        raise ConfigError(f"plot: got {path!r}, legal is a file name that ends in .png")
    if not Path(path).parent.is_dir():
        raise ConfigError(f"plot: got {path!r}, legal is a file in a directory that exists")
    if Path(path).is_dir() or not os.access(path if Path(path).exists() else Path(path).parent, os.W_OK):
        raise ConfigError(f"plot: got {path!r}, legal is a file that can be written")


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
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ConfigError(f"plot: got {path!r}, legal is a file that can be written: {error.strerror}") from error


def _line(axes: Any, x: list[int], y: list[float], label: str, color: str, style: str) -> None:
    axes.plot(x, y, label=label, color=color, linestyle=style, marker="o" if style == "-" else None)
