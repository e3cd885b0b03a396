"""Proves that the benchmarks of the driver measure what they say, on small sizes."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module("driver")


@pytest.fixture
def simulate_day(driver):
    return importlib.import_module("simulate_day")


def test_a_row_has_the_documented_fields(driver, monkeypatch):
    monkeypatch.setattr(driver, "SHORT_OUTPUT", 4)
    row = driver.measure(3, 16_384)
    assert set(row) == {
        "ranks",
        "prefill_plan_ms",
        "decode_plan_ms",
        "plan_bytes_per_rank",
        "schedule_us_per_token",
        "rank_prepare_ms",
    }
    assert all(value > 0 for value in row.values())


def test_what_a_rank_is_told_of_a_chunk_does_not_grow_with_the_square_of_the_ranks(driver):
    """Its own tokens are most of it; query runs, pages and rows take a few bytes for each rank."""
    sizes = {}
    for num_ranks in (4, 16):
        scheduler = driver.make_scheduler(num_ranks, 16_384, placement="striped", enable_prefix_caching=False)
        scheduler.add_request(driver.prompt(num_ranks * 4096, 0), driver.SamplingParams(max_tokens=1))
        sizes[num_ranks] = max(len(m) for timed in driver.timed_plans(scheduler) for m in timed.messages.values())
    assert sizes[16] - sizes[4] < 12 * 120


def test_a_small_day_ends_with_all_tokens_though_ranks_are_lost_twice(simulate_day):
    arrivals = [(0.1 * i, "chat", 200, 20) for i in range(12)] + [(1.5, "document", 20_000, 5)]
    day = simulate_day.Day(4, 16, sorted(arrivals), [(0.5, 4), (2.0, 3)])
    day.run(until_s=1e6)
    assert sorted(len(timing.tokens_s) for timing in day.timings) == [5] + [20] * 12
    assert all(timing.tokens_s == sorted(timing.tokens_s) for timing in day.timings)
    assert all(timing.tokens_s[0] > timing.arrived_s for timing in day.timings)
    assert day.now_s > 2 * simulate_day.RESTART_S
    assert 0 < day.driver_s < day.now_s


def test_the_planner_and_the_simulation_agree_on_a_lone_prompt(simulate_day):
    found = simulate_day.lone_prompt(4, 262_144)
    assert found["alone_ttft_s"] == pytest.approx(found["alone_ttft_planned_s"], rel=0.2)
    assert found["alone_itl_ms"] == pytest.approx(found["alone_itl_planned_ms"], rel=0.2)
