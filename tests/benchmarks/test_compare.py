"""What `benchmarks/compare.py` decides without engines: its options, its goals, and where tokens differ."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def row(engine, ttft_s, tpot_s, *, length=16384, model="20m", **more):
    floors = {"ttft_floor_s": 10.0, "tpot_floor_s": 0.01}
    is_peer = not engine.startswith("longspan")
    return {
        "model": model,
        "length": length,
        "engine": engine,
        "is_peer": is_peer,
        "ttft_s": ttft_s,
        "tpot_s": tpot_s,
    } | (floors | more)


def goal(table, text):
    return next(line for line in table if line["goal"] == text)


def test_goals_compare_with_the_best_peer_and_say_which():
    from peers.goals import goal_table

    table = goal_table(
        [
            row("longspan 2 x 1", 12.0, 0.018),
            row("vllm TP 1 x 2", 16.0, 0.03),
            row("vllm TP 2 x 1", 15.0, 0.04),
            row("transformers sdpa 1 x 2", 12.0, 0.05),
        ]
    )
    line = goal(table, "20m 16k: ttft of 2 x 1 / best vLLM")
    assert (line["measured"], line["against"], line["verdict"]) == (0.8, "vllm TP 2 x 1", "stretch met")
    line = goal(table, "20m 16k: tpot of 2 x 1 / best vLLM")
    assert (line["measured"], line["against"], line["verdict"]) == (0.6, "vllm TP 1 x 2", "met")
    assert goal(table, "20m 16k: ttft of 2 x 1 / Transformers")["verdict"] == "not met"
    assert goal(table, "20m 16k: tpot of 2 x 1 / floor")["measured"] == 1.8
    assert goal(table, "20m 64k: ttft of 2 x 1 / floor")["verdict"] == "not measured"


def test_a_speed_up_is_met_from_its_limit_upwards():
    from peers.goals import goal_table

    def verdict(one_s):
        rows = [row("longspan 1 x 1", one_s, 0.01, length=65536), row("longspan 2 x 1", 100.0, 0.01, length=65536)]
        return goal(goal_table(rows), "20m 64k: ttft of 1 x 1 / ttft of 2 x 1")["verdict"]

    assert [verdict(one_s) for one_s in (191.0, 192.0, 197.0)] == ["not met", "met", "stretch met"]


def test_the_best_of_several_longspan_settings_counts_where_the_goal_says_so():
    from peers.goals import goal_table

    rows = [
        row("longspan 1 x 2", 9.0, 0.02, model="500m"),
        row("longspan 2 x 1", 10.0, 0.01, model="500m"),
        row("llama.cpp, KV F16 1 x 2", 10.0, 0.01, model="500m"),
    ]
    table = goal_table(rows)
    assert goal(table, "500m 16k: ttft of best longspan / best peer")["measured"] == 0.9
    assert goal(table, "500m 16k: tpot of best longspan / best peer")["measured"] == 1.0


def test_the_first_difference_of_tokens():
    from peers.measure import first_difference

    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1


def test_options_have_defaults_and_lists():
    from compare import parse_options

    options = parse_options(["--models", "500m,20m", "--lengths", "16384,1024", "--peers", "vllm"])
    assert (options.models, options.lengths, options.peers) == (["500m", "20m"], [1024, 16384], ["vllm"])
    assert (options.repeats, options.json) == (3, False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--models", "7b"], "argument --models: got '7b', legal are 20m, 500m"),
        (["--peers", "vllm,sglang"], "argument --peers: got 'sglang', legal are transformers, vllm, llamacpp"),
        (["--lengths", "1024,many"], "argument --lengths: got '1024,many', legal are numbers from 64 to"),
        (["--repeats", "0"], "argument --repeats: got '0', legal is a whole number from 1 to"),
        (["--tokens", "1"], "argument --tokens: got '1', legal is a whole number from 2 to"),
        (["--cores", "0,0"], "argument --cores: got '0,0', legal are two different numbers out of"),
    ],
)
def test_rejects_options_by_name_value_and_legal_values(arguments, says, capsys):
    from compare import parse_options

    with pytest.raises(SystemExit):
        parse_options(arguments)
    assert says in capsys.readouterr().err
