"""The benchmark of GPUs works on the first day: it says what is missing, and no part takes the others along."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = BENCHMARKS / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module("gpu")


def test_a_machine_without_our_dependencies_is_told_in_one_line_what_to_install(tmp_path):
    for module in ("torch", "triton", "transformers"):  # all that some images for GPUs have
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-S", PROGRAM, "--smoke"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert run.returncode == 1
    assert run.stderr == "gpu.py: pip install msgspec pyzmq platformdirs\n"
    assert run.stdout == ""


WRITES = "import json, sys, time; file = open(sys.argv[-1], 'a', buffering=1); file.write('{\"a\": 1}\\n'); "


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("", None),
        ("raise ValueError('no such kernel')", "1: ValueError: no such kernel"),
        ("time.sleep(60)", "took more than 2 s"),
        ("import os; os.kill(os.getpid(), 11)", "-11: "),
    ],
    ids=["ends", "raises", "hangs", "crashes"],
)
def test_a_part_that_fails_keeps_the_rows_that_it_has_written(gpu, ending, said):
    rows = list(gpu.run_part([sys.executable, "-S", "-c", WRITES + ending], 2.0))
    assert rows == [{"a": 1}] + [{"failed": said}] * (said is not None)


def test_a_row_comes_before_its_part_ends(gpu):
    rows = gpu.run_part([sys.executable, "-S", "-c", WRITES + "time.sleep(60)"], 30.0)
    assert next(rows) == {"a": 1}
    rows.close()  # which kills the part


def test_a_budget_takes_the_parts_that_are_worth_most(gpu):
    assert gpu.pick(420.0, 1)[:2] == ["kernels", "engine"]
    assert sum(gpu.PARTS[name].expected_s for name in gpu.pick(420.0, 1)) <= 420
    assert gpu.pick(60.0, 1) == ["kernels"]
    assert gpu.pick(10_000.0, 1) == [name for name in gpu.PARTS if name != "scaling"]
    assert gpu.pick(10_000.0, 8) == list(gpu.PARTS)


def test_goals_stand_beside_what_was_measured(gpu):
    rows = [
        {"part": "kernels", "kernel": "prefill", "backend": "triton", "% of ceiling": 47.0},
        {"part": "libraries", "kernel": "prefill", "backend": "torch", "% of ceiling": 52.0},
        {"part": "engine", "prompt": 131072, "x floor of bytes": 1.31},
        {"part": "launched", "prompt": 131072, "x floor of bytes": 1.1},
    ]
    table = {row["what"]: row["measured"] for row in gpu.goals(rows)}
    assert table["prefill, best backend, 8k queries x 64k keys and more"] == 52.0
    assert table["prefill, triton"] == 47.0
    assert table["decode step of an 8 B Llama at 128k, with graphs"] == 1.31
    assert table["decode, one request, 128k keys"] == "not measured"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_parts_run():
    """At tiny sizes, on a CPU."""
    parts = "kernels,engine,launched,libraries,share,checks,compiled,scaling"
    run = subprocess.run(
        [sys.executable, PROGRAM, "--smoke", "--json", "--parts", parts], capture_output=True, text=True, timeout=800
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(run.stdout[run.stdout.index("\n{") :])["rows"]
    of = {part: [row for row in rows if row["part"] == part] for part in parts.split(",")}
    assert {row["result"] for row in of["checks"]} == {"right"}
    assert {row["kernel"] for row in of["kernels"]} >= {"prefill", "decode", "merge", "accumulate"}
    assert all(row["first token s"] > 0 for part in ("engine", "launched", "compiled") for row in of[part])
    assert all("missing" in row for row in of["libraries"]), "each with its reason"
    assert [row["ranks"] for row in of["scaling"]] == [1]
    assert all(row["tokens as one rank"] for row in of["scaling"])
