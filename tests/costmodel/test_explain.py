"""Proves that a run can say which strategies it used and why, and that `longspan topology` measures real ranks."""

import json

import msgspec
import pytest
from test_predict import GROUP, costs_of, striped_step

from longspan.cli.explain import choices_text
from longspan.costmodel.explain import StrategyChoices
from longspan.costmodel.parameters import Link
from longspan.costmodel.topology_file import load_topology
from longspan.plan.group_step import make_group_step
from longspan.types import Phase, Strategy

TWO_RANKS = ("--context-parallel-size", "2", "--threads-per-rank", "1")
LOCAL, GATHER_KV, PASS_KV, PASS_Q, TREE = Strategy


def note(choices, strategy, chunk, *, phase=Phase.PREFILL, forced=False, nodes=(0, 0, 0)):
    costs = costs_of(nodes=nodes, link=Link(1e-5, 1e9), call_s=1e-5, merge_s=1e-5)
    step = striped_step(strategy, len(nodes), 40, chunk)
    group_step = make_group_step(strategy, step.keys, step.block_len, nodes)
    choices.note(phase, 0, group_step, step.keys.runs, step.tables, GROUP, costs, is_forced=forced)


def test_a_choice_is_noted_once_with_all_candidates_and_counted():
    choices = StrategyChoices()
    for _ in range(3):
        note(choices, PASS_Q, 24)
        note(choices, PASS_KV, 24, forced=True)
    note(choices, PASS_Q, 1, phase=Phase.DECODE)
    first, forced, decode = choices.all
    assert (first.strategy, first.num_steps, first.is_forced, first.num_ranks) == (PASS_Q, 3, False, 3)
    assert (first.num_queries, first.num_keys) == (24, 64)
    assert (forced.strategy, forced.num_steps, forced.is_forced) == (PASS_KV, 3, True)
    assert (decode.phase, decode.num_steps, decode.num_queries) == (Phase.DECODE, 1, 1)
    assert choices.steps_per_strategy() == {"pass_q": 4, "pass_kv": 3}
    for choice in choices.all:
        assert [c.strategy for c in choice.candidates] == [GATHER_KV, PASS_KV, PASS_Q]
        for candidate in choice.candidates:
            assert candidate.predicted_s > 0
            assert candidate.sent_bytes > 0
            parts = candidate.compute_s + candidate.wait_s + candidate.copy_s
            assert parts == pytest.approx(candidate.predicted_s)


def test_tree_is_a_candidate_where_there_are_nodes_and_when_it_was_forced():
    choices = StrategyChoices()
    note(choices, PASS_Q, 24, nodes=(0, 0, 1, 1))
    note(choices, TREE, 24, forced=True)
    assert [[c.strategy for c in choice.candidates] for choice in choices.all] == [
        [GATHER_KV, PASS_KV, PASS_Q, TREE],
        [GATHER_KV, PASS_KV, PASS_Q, TREE],
    ]


def test_the_text_marks_what_was_taken_and_names_every_candidate():
    choices = StrategyChoices()
    note(choices, PASS_KV, 24, forced=True)
    lines = choices_text(choices.all).splitlines()
    assert lines[0] == "prefill, KV group 0: pass_kv, forced in 1 step; first 24 tokens of up to 64 on 3 ranks"
    assert [line.split()[:2] for line in lines if "*" in line] == [["*", "pass_kv"]]
    assert sum(line.endswith("MB") for line in lines) == 3
    assert choices_text([]) == "no step has run"


def test_generate_explains_on_standard_error_and_changes_nothing_else(longspan):
    command = ("generate", "recall", "--prompt", "abcabcab", "--max-tokens", "4", "--executor", "threads")
    options = (*TWO_RANKS, "--placement", "striped", "--page-size", "1", "--stripe-size", "1")
    plain = longspan(*command, *options)
    explained = longspan(*command, *options, "--explain", "--strategy", "pass_q")
    assert explained.code == plain.code == 0
    assert explained.out == plain.out
    assert "prefill, KV group 0: pass_q, forced in" in explained.err
    assert "decode, KV group 1: pass_q, forced in 3 steps" in explained.err
    assert "prefill" not in plain.err.partition("KV group")[1]
    packed = longspan(*command, "--explain")
    assert "nothing moves" in packed.err


@pytest.mark.processes
def test_topology_measures_real_ranks_and_saves_what_a_run_can_use(longspan, tmp_path):
    path = tmp_path / "topology.yaml"
    links = "nodes=0,1 latency_us=3000"
    outcome = longspan("topology", *TWO_RANKS, "--json", "--simulated-links", links, "--save", str(path))
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert set(report) == {"model", "dtype", "striped_from", "topology", "rates", "speeds", "choices"}
    assert report["topology"]["nodes"] == [0, 1]
    assert report["topology"]["between"]["latency_s"] > 2e-3, "measured through the simulated link"
    assert report["rates"]["matmul_flops_per_s"] > 1e8
    phases = {(choice["phase"], choice["group_idx"]) for choice in report["choices"]}
    assert phases == {("prefill", 0), ("prefill", 1), ("decode", 0), ("decode", 1)}
    saved = load_topology(str(path), 2, "float32")
    assert json.loads(msgspec.json.encode(saved.rates)) == report["rates"]
    command = ("generate", "recall", "--prompt", "abcabcab", "--max-tokens", "2", *TWO_RANKS, "--executor", "threads")
    assert longspan(*command, "--topology", str(path)).code == 0
    refused = longspan(*command[:-4], "--context-parallel-size", "3", "--executor", "threads", "--topology", str(path))
    assert refused.code == 2
    assert "topology.nodes: got 2 ranks" in refused.err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ((*TWO_RANKS, "--executor", "threads"), "executor"),
        ((*TWO_RANKS, "--measure", "never"), "measure"),
        ((*TWO_RANKS, "--topology", "/no/such/file"), "topology"),
        ((*TWO_RANKS, "--measure", "often"), "measure"),
    ],
)
def test_rejects_a_topology_that_nobody_could_measure(longspan, options, word):
    outcome = longspan("topology", *options)
    assert outcome.code == 2
    assert outcome.err.startswith("longspan: ")
    assert word in outcome.err
