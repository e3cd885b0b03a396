"""How much time the policy's choice loses against the best strategy, over a grid of steps, ranks and links.

    python benchmarks/regret.py [--setting NAME ...] [--repeats 101] [--save] [--plot]

Each setting starts its ranks, measures them as every start of longspan does, and times all strategies of each step,
interleaved; the policy chooses from the measured numbers alone. With `--save`, settings are added to today's result, so
that a long run can be done in pieces; `--plot` draws what has been saved.
"""

import argparse
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from attention_ranks import AttentionRanks, Shape
from common import RESULTS, hardware

SHAPES = [
    Shape(chunk, context)
    for chunk, context in (
        (1, 2048),
        (1, 8192),
        (1, 32768),
        (16, 2048),
        (64, 8192),
        (128, 32768),
        (256, 0),
        (512, 4096),
        (512, 16384),
        (1024, 0),
        (1024, 4096),
        (2048, 0),
    )
]

SETTINGS: dict[str, tuple[int, str | None]] = {
    "2 ranks": (2, None),
    "3 ranks": (3, None),
    "4 ranks": (4, None),
    "2 ranks, 10 Gbit/s 50 us": (2, "nodes=0,1 latency_us=50 mbit_per_s=10000"),
    "2 ranks, 1 Gbit/s 200 us": (2, "nodes=0,1 latency_us=200 mbit_per_s=1000"),
    "3 ranks, 1 Gbit/s 200 us": (3, "nodes=0,1,2 latency_us=200 mbit_per_s=1000"),
    "2 nodes x 2 ranks, 10 Gbit/s 50 us": (4, "nodes=0,0,1,1 latency_us=50 mbit_per_s=10000"),
    "2 nodes x 2 ranks, 1 Gbit/s 200 us": (4, "nodes=0,0,1,1 latency_us=200 mbit_per_s=1000"),
}
"""Ranks, and links between simulated nodes."""

NEAR_BEST, MOST_REGRET = 1.1, 1.5


def measure_setting(name: str, repeats: int) -> dict[str, Any]:
    """All steps of one setting."""
    num_ranks, links = SETTINGS[name]
    ranks = AttentionRanks(num_ranks, max(s.chunk + s.context for s in SHAPES) + 1, links)
    started = time.perf_counter()
    costs = ranks.measure()
    measured_s = time.perf_counter() - started
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        candidates = ranks.candidates(shape, costs)
        times = ranks.time(shape, [step for step, _ in candidates.values()], repeats)
        taken_s = {strategy.value: seconds for strategy, seconds in zip(candidates, times, strict=True)}
        choice, best = ranks.choice(shape, costs).value, min(taken_s, key=lambda strategy: taken_s[strategy])
        row = {"setting": name, "chunk": shape.chunk, "context": shape.context, "choice": choice, "best": best}
        row |= {"regret": taken_s[choice] / taken_s[best]}
        row |= {f"{strategy}_ms": seconds * 1e3 for strategy, seconds in taken_s.items()}
        row |= {f"{strategy.value}_predicted_ms": s * 1e3 for strategy, (_, s) in candidates.items()}
        rows.append(row)
        print(_line(row), flush=True)
    ranks.close()
    return {"rows": rows, "costs": msgspec.to_builtins(costs), "measured_s": measured_s}


def _line(row: dict[str, Any]) -> str:
    times = "  ".join(
        f"{name} {row[f'{name}_ms']:8.2f} ({row[f'{name}_predicted_ms']:8.2f})"
        for name in ("gather_kv", "pass_kv", "pass_q", "tree")
        if f"{name}_ms" in row
    )
    step = f"{row['setting']}: {row['chunk']:5d} behind {row['context']:5d}"
    return f"{step}  {row['choice']:9s} of best {row['best']:9s} x {row['regret']:.2f}   ms (predicted): {times}"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the policy promises, over all points."""
    regrets = sorted(row["regret"] for row in rows)
    near = sum(regret <= NEAR_BEST for regret in regrets)
    return {
        "points": len(rows),
        "within 10 % of the best": f"{near / len(rows):.0%}",
        "mean regret": sum(regrets) / len(rows),
        "worst regret": regrets[-1],
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Regret of every point, by setting, beside that of always taking one strategy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(result["settings"])
    figure, axes = pyplot.subplots(figsize=(11, 5.5))
    styles = {"policy": ("k", "o"), "gather_kv": ("C0", "x"), "pass_kv": ("C1", "x"), "pass_q": ("C2", "x")}
    styles["tree"] = ("C3", "x")
    for kind, (color, marker) in styles.items():
        x, y = [], []
        for i, name in enumerate(names):
            for row in result["settings"][name]["rows"]:
                best_ms = row[f"{row['best']}_ms"]
                taken_ms = row.get(f"{row['choice'] if kind == 'policy' else kind}_ms")
                if taken_ms is not None:
                    x.append(i + (0.0 if kind == "policy" else 0.1 + 0.1 * list(styles).index(kind)))
                    y.append(taken_ms / best_ms)
        axes.scatter(x, y, c=color, marker=marker, s=22, label="the policy's choice" if kind == "policy" else kind)
    axes.axhline(NEAR_BEST, color="gray", linewidth=0.8)
    axes.axhline(MOST_REGRET, color="gray", linewidth=0.8, linestyle="dashed")
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=7)
    axes.set_ylabel("time / time of the best strategy")
    axes.set_title(f"Attention of one step, {len(SHAPES)} steps per setting, {os.cpu_count()} cores")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--setting", action="append", choices=SETTINGS, help="only these")
    options.add_argument("--repeats", type=int, default=101, help="medians of so many interleaved runs")
    options.add_argument("--save", action="store_true", help="add to today's result in benchmarks/results/")
    options.add_argument("--plot", action="store_true", help="draw what has been saved, and measure nothing")
    chosen = options.parse_args()
    stem = RESULTS / f"regret-{datetime.now(UTC).strftime('%Y-%m-%d')}-{os.cpu_count()}-core-cpu"
    path = stem.with_suffix(".json")
    result: dict[str, Any] = {"theme": "regret", "hardware": hardware(), "settings": {}}
    if (chosen.save or chosen.plot) and path.exists():
        result = json.loads(path.read_text())
    if not chosen.plot:
        for name in chosen.setting or SETTINGS:
            result["settings"][name] = measure_setting(name, chosen.repeats)
            result["date"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
            result["summary"] = summary([row for s in result["settings"].values() for row in s["rows"]])
            if chosen.save:
                path.write_text(json.dumps(result, indent=1) + "\n")
    if chosen.plot or chosen.save:
        plot(result, stem.with_suffix(".png"))
    print(result.get("summary"))


if __name__ == "__main__":
    main()
