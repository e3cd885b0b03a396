"""Two dozen users at once, by Locust: right answers, exact counts, and nothing left behind.

What users ask, and the checks of every answer, are in `tests/endurance/locustfile.py`.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served_command import command

pytestmark = [pytest.mark.slow, pytest.mark.processes]

LOCUSTFILE = Path(__file__).parents[1] / "endurance" / "locustfile.py"
NUM_USERS = 24
MORE_THAN = {"completion": 24, "chat stream": 12, "shared chat": 10, "leave": 12, "bad": 6, "long": 0}
"""Requests of each kind, on any machine."""


def run_users(url, directory):
    """Requests of each kind that the users sent; all of them were answered as they must be."""
    command = [sys.executable, "-m", "locust", "--locustfile", LOCUSTFILE, "--host", url, "--headless"]
    command += ["--users", NUM_USERS, "--spawn-rate", NUM_USERS, "--run-time", "30s", "--stop-timeout", 120]
    command += ["--json-file", directory / "load", "--only-summary", "--loglevel", "WARNING"]
    done = subprocess.run(
        list(map(str, command)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout  # what users were answered instead, and exceptions
    (report,) = directory.glob("load*")  # Locust adds `.json`, whatever it is called
    entries = [entry for entry in json.loads(report.read_text()) if entry["method"] == "POST"]
    assert not any(entry["num_failures"] for entry in entries), entries
    return {entry["name"]: entry["num_requests"] for entry in entries}


def read_metrics(url):
    """Value of each sample, by its name and its label beside the model's."""
    text = httpx.get(f"{url}/metrics").raise_for_status().text
    return {
        (sample.name, *(value for name, value in sample.labels.items() if name != "model_name")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def is_idle(metrics):
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "longspan:kv_pages_used")
    found = [value for (name, *_), value in metrics.items() if name in names]
    assert len(found) == 4, metrics  # pages: one per rank
    return not any(found)


def test_many_users_get_right_answers_and_leave_nothing_behind(cache_home, tmp_path):
    with command("--context-parallel-size", "2", "--kv-cache-memory", "512Mi") as served:
        num_sent = run_users(served.url, tmp_path)
        assert num_sent.keys() == MORE_THAN.keys()
        assert all(num_sent[kind] > number for kind, number in MORE_THAN.items()), num_sent

        deadline = time.monotonic() + 10
        while not is_idle(metrics := read_metrics(served.url)):
            assert time.monotonic() < deadline, metrics
            time.sleep(0.1)
        num_ended = {key[1]: value for key, value in metrics.items() if key[0] == "vllm:request_success_total"}
        assert num_ended == {
            "stop": num_sent["completion"] + num_sent["shared chat"] + num_sent["long"],
            "length": num_sent["chat stream"],
            "abort": num_sent["leave"],
            "error": 0,
        }
        num_whole = num_ended["stop"] + num_ended["length"]
        assert metrics["vllm:e2e_request_latency_seconds_count",] == num_whole
        assert num_whole <= metrics["vllm:time_to_first_token_seconds_count",] <= num_whole + num_ended["abort"]
        assert metrics["vllm:kv_cache_usage_perc",] == metrics["vllm:num_preemptions_total",] == 0
        assert metrics["vllm:prefix_cache_queries_total",] > metrics["vllm:prefix_cache_hits_total",] > 0

        assert served.end() == 0
        assert "Traceback" not in served.said()
        assert len(served.lines) == 3, served.said()  # where it is, what it holds, its parsers; nothing else happened
