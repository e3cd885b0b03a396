"""Simulated links hold messages between nodes back, change nothing else, and are told apart from nonsense."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import generate_all, tiny_model

from longspan.comm import delaying
from longspan.comm.delaying import DelayingCommunicator, NodeClock
from longspan.comm.threads import thread_group
from longspan.config import EngineConfig
from longspan.errors import ConfigError
from longspan.simulation import SimulatedLinks, parse_simulated_links


class FakeTime:
    """A clock that only moves when somebody sleeps."""

    def __init__(self):
        self.now_s = 100.0

    def monotonic(self):
        return self.now_s

    def sleep(self, seconds):
        assert seconds > 0
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(delaying, "time", fake)
    return fake


def group(links):
    return [DelayingCommunicator(comm, links) for comm in thread_group(len(links.nodes), timeout_s=20)]


def send(comm, peer, num_bytes):
    comm.exchange([(peer, torch.full((num_bytes,), comm.rank, dtype=torch.uint8))], []).wait()


def receive(comm, peer, num_bytes):
    into = torch.full((num_bytes,), 99, dtype=torch.uint8)
    comm.exchange([], [(peer, into)]).wait()
    assert into.eq(peer).all()


def test_a_far_message_arrives_after_its_length_and_the_latency(clock):
    left, right = group(SimulatedLinks((0, 1), 0.01, 1e6))
    send(left, 1, 1000)
    send(left, 1, 1000)
    assert clock.now_s == 100.0  # a sender never waits
    receive(right, 0, 1000)
    assert clock.now_s == pytest.approx(100.011)
    receive(right, 0, 1000)
    assert clock.now_s == pytest.approx(100.012)


def test_ranks_of_a_node_share_its_link_whatever_rank_they_send_to(clock):
    comms = group(SimulatedLinks((0, 0, 1, 2), 0.0, 1e6))
    send(comms[0], 2, 1000)
    send(comms[1], 3, 2000)
    send(comms[2], 3, 500)  # another node's link is free
    receive(comms[3], 2, 500)
    assert clock.now_s == pytest.approx(100.0005)
    receive(comms[3], 1, 2000)
    assert clock.now_s == pytest.approx(100.003)
    receive(comms[2], 0, 1000)
    assert clock.now_s == pytest.approx(100.003)


def test_messages_inside_a_node_are_not_held_back(clock):
    comms = group(SimulatedLinks((0, 0, 1), 1.0, 1.0))
    send(comms[0], 1, 1000)
    receive(comms[1], 0, 1000)
    assert clock.now_s == 100.0


def test_messages_without_elements_are_not_sent_and_bandwidth_may_be_free(clock):
    left, right = group(SimulatedLinks((0, 1), 0.25))
    left.exchange([(1, torch.empty(0))], []).wait()
    send(left, 1, 10**6)
    right.exchange([], [(0, torch.empty(0))]).wait()
    assert clock.now_s == 100.0
    receive(right, 0, 10**6)
    assert clock.now_s == pytest.approx(100.25)


def test_several_users_of_a_clock_never_overlap():
    first = NodeClock()

    def occupy(_):
        mine = NodeClock(first.path)  # as each process opens its own
        ends = [mine.reserve(0.001) for _ in range(200)]
        mine.close()
        return ends

    start_s = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        ends = sorted(itertools.chain.from_iterable(pool.map(occupy, range(4))))
    assert len(ends) == 800
    assert ends[0] >= start_s + 0.001
    assert all(b - a >= 0.000999 for a, b in itertools.pairwise(ends))


@pytest.mark.cover(cases=1)
@pytest.mark.parametrize("nodes", ["0,1,1", "0,1,2"])
def test_tokens_over_simulated_links_are_those_of_transformers(nodes, capfd):
    model = tiny_model("gemma3")
    links = f"nodes={nodes} latency_us=50 mbit_per_s=10000"
    options = {"context_parallel_size": 3, "placement": "striped", "page_size": 4, "stripe_size": 8}
    tokens = generate_all(model, simulated_links=links, **options)
    assert tokens == [reference.token_ids for reference in model.references]
    assert f"longspan: simulating a slower network ({links})" in capfd.readouterr().err


def test_the_option_says_nodes_latency_and_bandwidth():
    links = parse_simulated_links("nodes=0,0,1,1 latency_us=500 mbit_per_s=1000", 4)
    assert links == SimulatedLinks((0, 0, 1, 1), 0.0005, 125e6)
    assert parse_simulated_links("latency_us=0.5  nodes=0", 1) == SimulatedLinks((0,), 5e-7, None)
    config = EngineConfig(model="recall", context_parallel_size=2, simulated_links="mbit_per_s=8 nodes=1,0")
    assert config.simulation == SimulatedLinks((1, 0), 0.0, 1e6)
    assert EngineConfig(model="recall").simulation is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nodes=0,1",
        "latency_us=5",
        "nodes=0 latency_us=5",
        "nodes=0,2 latency_us=5",
        "nodes=0,1,1 latency_us=5",
        "nodes=0,x latency_us=5",
        "nodes=0,1 latency_us=-5",
        "nodes=0,1 latency_us=nan",
        "nodes=0,1 latency_us=1e3",
        "nodes=0,1 latency_us=",
        "nodes=0,1 mbit_per_s=0",
        "nodes=0,1 mbit_per_s=99999999",
        "nodes=0,1 latency=5",
        "nodes=0,1 latency_us=5 latency_us=6",
        "nodes=0,1 latency_us=5 loss=1",
        5,
    ],
)
def test_rejects_links_that_mean_nothing(text):
    with pytest.raises(ConfigError, match=r"^simulated_links: got .* for 2 ranks, legal is 'nodes=0,0,1,1 "):
        EngineConfig(model="recall", context_parallel_size=2, simulated_links=text)
