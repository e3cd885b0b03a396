"""What longspan wants to reach beside its peers, and whether a run shows it.

Holds the goals and their arithmetic on measured rows. Must not know engines or processes. A row is what `measure.py`
makes of one engine with one model and length: `model`, `length`, `engine`, `is_peer`, `ttft_s`, `tpot_s`,
`ttft_floor_s`, `tpot_floor_s`, `memory_ratio`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
K = 1024


class Rows:
    """Measured rows, by what goals ask for. What was not measured is None."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def value(self, model: str, length: int, engine: str, metric: str) -> float | None:
        found = self.least(model, length, lambda row: row["engine"] == engine, metric)
        return None if found is None else found[0]

    def least(self, model: str, length: int, fits: Callable[[Row], bool], metric: str) -> tuple[float, str] | None:
        """The smallest value among the engines that fit, and whose it is."""
        found = [
            (row[metric], row["engine"])
            for row in self._rows
            if (row["model"], row["length"]) == (model, length) and fits(row) and row.get(metric) is not None
        ]
        return min(found, default=None)


@dataclass(frozen=True)
class Goal:
    """One line: a ratio of two measured values."""

    text: str
    limit: float
    stretch: float
    measure: Callable[[Rows], tuple[float, str] | None]
    """The ratio, and what it was measured against."""
    at_least: bool = False
    """Larger is better."""

    def verdict(self, ratio: float | None) -> str:
        if ratio is None:
            return "not measured"
        sign = -1 if self.at_least else 1
        if sign * ratio <= sign * self.stretch:
            return "stretch met"
        return "met" if sign * ratio <= sign * self.limit else "not met"


def _against(
    model: str, length: int, engines: Callable[[Row], bool], others: Callable[[Row], bool], metric: str
) -> Callable[[Rows], tuple[float, str] | None]:
    """Best of some engines over best of others."""

    def measure(rows: Rows) -> tuple[float, str] | None:
        own, other = rows.least(model, length, engines, metric), rows.least(model, length, others, metric)
        return None if own is None or other is None else (own[0] / other[0], other[1])

    return measure


def _over(model: str, length: int, engine: str, metric: str, below: str) -> Callable[[Rows], tuple[float, str] | None]:
    """A metric over another of the same engine's row."""

    def measure(rows: Rows) -> tuple[float, str] | None:
        value, base = rows.value(model, length, engine, metric), rows.value(model, length, engine, below)
        return None if value is None or base is None else (value / base, "")

    return measure


def _named(name: str) -> Callable[[Row], bool]:
    return lambda row: bool(row["engine"] == name)


def _starts(prefix: str) -> Callable[[Row], bool]:
    return lambda row: bool(row["engine"].startswith(prefix))


def _is_peer(row: Row) -> bool:
    return bool(row["is_peer"])


def _speed_up(model: str, length: int) -> Callable[[Rows], tuple[float, str] | None]:
    """First token of one rank over that of two, a core each."""

    def measure(rows: Rows) -> tuple[float, str] | None:
        one, two = (rows.value(model, length, f"longspan {ranks} x 1", "ttft_s") for ranks in (1, 2))
        return None if one is None or two is None else (one / two, "longspan 1 x 1")

    return measure


def _memory(rows: Rows) -> tuple[float, str] | None:
    ratio = rows.value("20m", 64 * K, "longspan 2 x 1", "memory_ratio")
    return None if ratio is None else (ratio, "weights + KV / 2")


def _name(length: int) -> str:
    return f"{length // K}k"


def goals() -> list[Goal]:
    """All of them, in the order in which they are printed."""
    two, one, long = "longspan 2 x 1", "longspan 1 x 2", (16 * K, 64 * K)
    listed: list[Goal] = []
    for metric, limits in (
        ("ttft_s", ((0.95, 0.8), (0.95, 0.8), (1.4, 1.2))),
        ("tpot_s", ((0.6, 0.5), (0.4, 0.3), (1.7, 1.5))),
    ):
        short = metric.removesuffix("_s")
        vllm, transformers, floor = limits
        for length in long:
            listed.append(
                Goal(
                    f"20m {_name(length)}: {short} of 2 x 1 / best vLLM",
                    *vllm,
                    _against("20m", length, _named(two), _starts("vllm"), metric),
                )
            )
        for length in long:
            listed.append(
                Goal(
                    f"20m {_name(length)}: {short} of 2 x 1 / Transformers",
                    *transformers,
                    _against("20m", length, _named(two), _starts("transformers"), metric),
                )
            )
        for length in long:
            floor_name = f"{short}_floor_s"
            listed.append(
                Goal(
                    f"20m {_name(length)}: {short} of 2 x 1 / floor",
                    *floor,
                    _over("20m", length, two, metric, floor_name),
                )
            )
    listed.append(Goal("20m 64k: ttft of 1 x 1 / ttft of 2 x 1", 1.92, 1.97, _speed_up("20m", 64 * K), at_least=True))
    for metric in ("ttft_s", "tpot_s"):
        short = metric.removesuffix("_s")
        listed.append(
            Goal(
                f"20m 1k: {short} of 1 x 2 / best peer",
                1.0,
                0.9,
                _against("20m", K, _named(one), _is_peer, metric),
            )
        )
    for metric in ("ttft_s", "tpot_s"):
        short = metric.removesuffix("_s")
        listed.append(
            Goal(
                f"500m 16k: {short} of best longspan / best peer",
                1.1,
                0.9,
                _against("500m", 16 * K, _starts("longspan"), _is_peer, metric),
            )
        )
    listed.append(Goal("20m 64k: peak memory of a rank of 2 x 1 / (weights + KV / 2)", 1.25, 1.1, _memory))
    return listed + _family_goals()


def _family_goals() -> list[Goal]:
    """Goals of mixtures, sinks, chunks and latents."""
    longspan = _starts("longspan")
    listed = [
        Goal(
            f"{model} {_name(length)}: {metric.removesuffix('_s')} of best longspan / best peer",
            1.0,
            0.8,
            _against(model, length, longspan, _is_peer, metric),
        )
        for model, length, metrics in (("moe", 8 * K, ("ttft_s", "tpot_s")), ("latent", 16 * K, ("tpot_s",)))
        for metric in metrics
    ]
    return listed + [
        Goal(f"{model} 16k: ttft of 1 x 1 / ttft of 2 x 1", 1.85, 1.92, _speed_up(model, 16 * K), at_least=True)
        for model in ("moe", "gpt_oss", "llama4", "latent")
    ]


def goal_table(rows: Sequence[Row]) -> list[Row]:
    """Every goal of the models that ran, with what was measured."""
    measured, models = Rows(rows), {row["model"] for row in rows}
    table = []
    for goal in goals():
        if goal.text.split()[0] not in models:
            continue
        found = goal.measure(measured)
        sign = ">=" if goal.at_least else "<="
        table.append(
            {
                "goal": goal.text,
                "limit": f"{sign} {goal.limit:g}",
                "stretch": f"{sign} {goal.stretch:g}",
                "measured": None if found is None else round(found[0], 3),
                "against": "" if found is None else found[1],
                "verdict": goal.verdict(None if found is None else found[0]),
            }
        )
    return table
