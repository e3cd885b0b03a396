"""Draws a comparison: time to first token, and per output token, of every engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS = (
    ("ttft_s", "ttft_floor_s", "time to first token, s", 1.0),
    ("tpot_s", "tpot_floor_s", "per output token, ms", 1e3),
)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel per metric (rows) and per model and length (columns); the dashed line is the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = list(dict.fromkeys((row["model"], row["length"]) for row in rows))
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    size = (4.2 * len(columns) + 1.5, 0.36 * len(engines) * len(METRICS) + 2)
    figure, panels = pyplot.subplots(len(METRICS), len(columns), figsize=size, squeeze=False)
    for i, (metric, floor, title, scale) in enumerate(METRICS):
        for j, (model, length) in enumerate(columns):
            axes, here = panels[i][j], [row for row in rows if (row["model"], row["length"]) == (model, length)]
            timed = [row for row in here if row.get(metric) is not None]
            bars = axes.barh(
                [row["engine"] for row in timed],
                [row[metric] * scale for row in timed],
                color=["C1" if row["is_peer"] else "C0" for row in timed],
            )
            axes.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
            if timed:
                axes.axvline(timed[0][floor] * scale, color="k", linestyle="--", linewidth=1)
            axes.invert_yaxis()
            axes.margins(x=0.15)
            axes.set_title(f"{model}, {length} tokens: {title}", fontsize=9)
            axes.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
