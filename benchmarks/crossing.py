"""Where a ring, queries, and a tree cross: attention of a decode, and of a short chunk, as ranks and latency grow.

    python benchmarks/crossing.py [--ranks 2 4 8] [--repeats 15] [--save] [--plot]

Ranks are processes of two on each simulated node (2 ranks: two nodes of one). More ranks than cores take turns, so a
time holds the machine's share of work as well as latencies; strategies of one point are interleaved, numbers are
medians. With `--save`, points are added to today's result; `--plot` draws what has been saved.
"""

import argparse
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attention_ranks import AttentionRanks, Shape, striped
from common import RESULTS, hardware
from longspan.plan.group_step import make_group_step
from longspan.plan.step_keys import step_keys
from longspan.types import Strategy

LATENCIES_US = (50, 200, 1000, 5000)
SHAPES = {"decode behind 4,096": Shape(1, 4096), "64 tokens behind 4,096": Shape(64, 4096)}
STRATEGIES = (Strategy.PASS_KV, Strategy.PASS_Q, Strategy.TREE)
MBIT_PER_S = 1000


def nodes_of(num_ranks: int) -> list[int]:
    """Two ranks per node; two ranks are two nodes."""
    return [0, 1] if num_ranks == 2 else [rank // 2 for rank in range(num_ranks)]


def measure(num_ranks: int, latency_us: int, repeats: int) -> list[dict[str, Any]]:
    """All strategies of all steps of one cluster."""
    nodes = nodes_of(num_ranks)
    links = f"nodes={','.join(map(str, nodes))} latency_us={latency_us} mbit_per_s={MBIT_PER_S}"
    ranks = AttentionRanks(num_ranks, max(s.chunk + s.context for s in SHAPES.values()) + 1, links)
    rows = []
    for name, shape in SHAPES.items():
        runs, table = striped(shape, num_ranks)
        keys = step_keys(runs, {0: table}, ranks.group.spec)
        steps = [make_group_step(strategy, keys, node_of_rank=nodes) for strategy in STRATEGIES]
        times = ranks.time(shape, steps, repeats)
        row: dict[str, Any] = {"step": name, "ranks": num_ranks, "nodes": max(nodes) + 1, "latency_us": latency_us}
        row |= {f"{strategy.value}_ms": seconds * 1e3 for strategy, seconds in zip(STRATEGIES, times, strict=True)}
        rows.append(row)
        print(row, flush=True)
    ranks.close()
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel per step and number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = sorted({row["ranks"] for row in rows})
    size = (4 * len(counts), 3.2 * len(SHAPES))
    figure, panels = pyplot.subplots(len(SHAPES), len(counts), figsize=size, squeeze=False)
    for i, step in enumerate(SHAPES):
        for j, count in enumerate(counts):
            axes = panels[i][j]
            found = sorted(
                (row for row in rows if (row["step"], row["ranks"]) == (step, count)), key=lambda r: r["latency_us"]
            )
            for strategy in STRATEGIES:
                axes.plot(
                    [row["latency_us"] for row in found],
                    [row[f"{strategy.value}_ms"] for row in found],
                    marker="o",
                    label=strategy.value,
                )
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(f"{step}, {count} ranks, {found[0]['nodes']} nodes", fontsize=8)
            axes.set_xlabel("latency between nodes, us", fontsize=8)
            axes.set_ylabel("ms per layer", fontsize=8)
            axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    options.add_argument("--repeats", type=int, default=15, help="medians of so many interleaved runs")
    options.add_argument("--save", action="store_true", help="add to today's result in benchmarks/results/")
    options.add_argument("--plot", action="store_true", help="draw what has been saved, and measure nothing")
    chosen = options.parse_args()
    stem = RESULTS / f"crossing-{datetime.now(UTC).strftime('%Y-%m-%d')}-{os.cpu_count()}-core-cpu"
    path = stem.with_suffix(".json")
    result: dict[str, Any] = {"theme": "crossing", "hardware": hardware(), "mbit_per_s": MBIT_PER_S, "rows": []}
    if (chosen.save or chosen.plot) and path.exists():
        result = json.loads(path.read_text())
    if not chosen.plot:
        for num_ranks in chosen.ranks:
            for latency_us in LATENCIES_US:
                new = measure(num_ranks, latency_us, chosen.repeats)
                keys = {(row["step"], row["ranks"], row["latency_us"]) for row in new}
                kept = [r for r in result["rows"] if (r["step"], r["ranks"], r["latency_us"]) not in keys]
                result["rows"] = kept + new
                result["date"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
                if chosen.save:
                    path.write_text(json.dumps(result, indent=1) + "\n")
    if chosen.plot or chosen.save:
        plot(result["rows"], stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
