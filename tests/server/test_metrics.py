"""What a request's metrics count. `tests/server/test_server.py` has what a scrape says of a real server."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from longspan.engine.stats import EngineStats
from longspan.server.metrics import Metrics, RequestMetrics


@pytest.mark.parametrize(("steps", "intervals"), [((1, 1, 1), 2), ((1, 2), 2), ((2, 1, 0, 3), 5)])
def test_tokens_that_come_together_are_several_intervals(steps, intervals):
    """Two plans may end before the first is looked at."""
    seen, firsts, counted = [], [], []
    counter = SimpleNamespace(inc=counted.append)
    request = RequestMetrics(
        SimpleNamespace(
            token_s=SimpleNamespace(observe=seen.append),
            first_token_s=SimpleNamespace(observe=firsts.append),
            prompt_tokens=counter,
            count_tokens=counted.append,
        )
    )
    for num_tokens in steps:
        request.advanced(0, 100, num_tokens)
    assert (len(firsts), len(seen), sum(counted)) == (1, intervals, 100 + sum(steps))
    assert all(time_s >= 0 for time_s in seen)


def test_every_metric_has_a_panel_and_every_panel_a_metric():
    """What `/metrics` tells, and docs/grafana.json asks for."""
    metrics = Metrics(
        "m", lambda: EngineStats(0, 0, (1,), (2,), (0,), (0,), (0.0,), (0,), (1.0,), {"local": 1}, {"local": 1})
    )
    told = {line.split()[2] for line in metrics.text().decode().splitlines() if line.startswith("# TYPE ")}
    told = {name for name in told if not name.endswith("_created")}
    dashboard = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    asked = set()
    for panel in panels:
        found = {name for target in panel["targets"] for name in re.findall(r"(?:vllm|longspan):\w+", target["expr"])}
        assert found, panel["title"]
        asked |= {re.sub(r"_(bucket|sum|count)$", "", name) for name in found}
        for target in panel["targets"]:
            assert target["expr"].count('{model_name=~"$model"}') == len(
                re.findall(r"(?:vllm|longspan):", target["expr"])
            )
    assert asked == told
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len({*places}) == len(places)
