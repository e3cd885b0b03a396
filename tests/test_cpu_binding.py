"""Cores of worker processes: lists as people write them, shares of one NUMA node, and workers that keep to them."""

import os

import pytest
from process_tree import ranks

from longspan import LLM, SamplingParams
from longspan.config import EngineConfig
from longspan.cpu_binding import cores_of, parse_cpu_binding, with_processes
from longspan.engine.processes import LocalLauncher
from longspan.engine.recovery import fewer_ranks
from longspan.errors import ConfigError

CORES = sorted(os.sched_getaffinity(0))


def machine(root, nodes, siblings):
    """Write the files of a machine: the cores of each node, and the physical core of each."""
    for node, text in enumerate(nodes):
        path = root / f"sys/devices/system/node/node{node}/cpulist"
        path.parent.mkdir(parents=True)
        path.write_text(f"{text}\n")
    for core, physical in enumerate(siblings):
        path = root / f"sys/devices/system/cpu/cpu{core}/topology/core_id"
        path.parent.mkdir(parents=True)
        path.write_text(f"{physical}\n")


@pytest.fixture
def eight_cores(monkeypatch, tmp_path):
    """Two nodes of two physical cores with two threads each; a node's threads are not next to each other."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    machine(tmp_path, ["0-1,4-5", "2-3,6-7"], [0, 1, 0, 1, 0, 1, 0, 1])
    return tmp_path


@pytest.mark.parametrize(
    ("num_processes", "shares"),
    [
        (1, [{0, 1, 2, 3, 4, 5, 6, 7}]),
        (2, [{0, 1, 4, 5}, {2, 3, 6, 7}]),
        (4, [{0, 4}, {1, 5}, {2, 6}, {3, 7}]),
        (3, [{0, 4}, {1, 5, 2}, {6, 3, 7}]),
        (8, [{0}, {4}, {1}, {5}, {2}, {6}, {3}, {7}]),
    ],
)
def test_shares_lie_on_one_node_and_keep_hardware_threads_together(eight_cores, num_processes, shares):
    assert [cores_of("auto", i, num_processes, eight_cores) for i in range(num_processes)] == shares


def test_lists_name_the_cores_of_each_process(eight_cores):
    assert parse_cpu_binding("0-2,7|4", 2) == ({0, 1, 2, 7}, {4})
    assert cores_of("0-2,7|4", 1, 2) == {4}
    assert cores_of("none", 0, 2) is None
    assert parse_cpu_binding("auto", 2) is None
    config = EngineConfig(model="recall", context_parallel_size=2, cpu_binding="0-2,7|4,5")
    assert config.num_threads == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpu_binding": "all"}, "cpu_binding: got 'all', legal is none, auto, or for each process a list of cores"),
        ({"cpu_binding": "3-1"}, "cpu_binding: got '3-1', legal is none, auto"),
        ({"cpu_binding": "0||1"}, "cpu_binding: got '0||1', legal is none, auto"),
        ({"cpu_binding": ""}, "cpu_binding: got '', legal is none, auto"),
        ({"cpu_binding": "0-3"}, "cpu_binding: got one list in '0-3', legal are 2, one for each process"),
        (
            {"cpu_binding": "0-2|2,3"},
            "cpu_binding: got core 2 twice in '0-2|2,3', legal are lists without",
        ),
        ({"cpu_binding": "0|1|2"}, "cpu_binding: got 3 lists in '0|1|2', legal are 2"),
        ({"cpu_binding": "auto", "executor": "threads"}, "cpu_binding: got 'auto' with executor 'threads'"),
        (
            {"cpu_binding": "auto", "device": "cuda"},
            "cpu_binding: got 'auto' .* and device 'cuda', legal there is none",
        ),
    ],
)
def test_what_cannot_be_bound_is_refused(eight_cores, options, message):
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        EngineConfig(model="recall", context_parallel_size=2, **options)


def test_cores_of_others_are_refused_before_ranks_start(eight_cores):
    config = EngineConfig(model="recall", context_parallel_size=2, cpu_binding="0|9")
    with pytest.raises(
        ConfigError, match=r"cpu_binding: got core 9 in '0\|9', legal are the cores that this process may"
    ):
        LocalLauncher(config)
    config = EngineConfig(model="recall", context_parallel_size=9, cpu_binding="auto")
    with pytest.raises(ConfigError, match="cpu_binding: got 'auto' for 9 processes on 8 cores, legal there is none"):
        LocalLauncher(config)


def test_fewer_ranks_keep_the_first_lists(eight_cores):
    config = EngineConfig(model="recall", context_parallel_size=3, cpu_binding="0|1|2-3", max_restarts=1)
    assert fewer_ranks(config).cpu_binding == "0|1"
    two_each = EngineConfig(model="m", context_parallel_size=2, tensor_parallel_size=2, cpu_binding="0|1|2|3")
    assert with_processes(two_each.cpu_binding, 2) == "0|1"
    auto = EngineConfig(model="recall", context_parallel_size=3, cpu_binding="auto", max_restarts=1)
    assert fewer_ranks(auto).cpu_binding == "auto"


@pytest.mark.processes
@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_workers_keep_to_their_cores():
    first, second = CORES[:2]
    text = "to be, or not to be, that is the question. " * 20
    answers = []
    for binding in ("none", f"{first}|{second}"):
        with LLM("recall", context_parallel_size=2, placement="striped", cpu_binding=binding, page_size=16) as llm:
            answers.append(llm.generate(text, SamplingParams(max_tokens=8))[0].outputs[0].text)
            if binding != "none":
                bound = [os.sched_getaffinity(pid) for pid in ranks(os.getpid())]
                assert sorted(bound, key=min) == [{first}, {second}]
    assert answers[0] == answers[1]
