"""Ranks over several nodes of a Ray cluster: where they are placed, and what the loss of a node does to a request.

Nodes are raylets in network namespaces (`tests/endurance/ray_nodes.py`).
"""

import threading
import time

import netns
import pytest
from tiny_models import greedy, run_all, tiny_model

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.errors import WorkerError
from longspan.group.shape import speaker

ray = pytest.importorskip("ray")
ray_nodes = pytest.importorskip("ray_nodes")
pytestmark = [pytest.mark.processes, pytest.mark.slow]

MODEL = "gemma3"


@pytest.fixture(scope="module")
def hosts():
    if (reason := netns.why_not()) is not None:
        pytest.skip(reason)
    with netns.network(4, mbit_per_s=2000) as made:
        yield made


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("RAY_ADDRESS", "LONGSPAN_SECRET", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


def config(num_ranks, **options):
    return EngineConfig(
        model=tiny_model(MODEL).path,
        context_parallel_size=num_ranks,
        executor="ray",
        ray_address=ray_nodes.ADDRESS,
        listen=f"{netns.DRIVER_ADDRESS}:7071",
        interface="eth0",
        threads_per_rank=1,
        placement="striped",
        page_size=4,
        stripe_size=8,
        max_num_batched_tokens=200,
        **{"kv_cache_memory": 2**24, "connect_timeout_s": 60.0, "exchange_timeout_s": 30.0, **options},
    )


def add_all(engine):
    return [engine.add_request(reference.prompt, greedy()) for reference in tiny_model(MODEL).references]


def check(requests):
    expected = [reference.token_ids for reference in tiny_model(MODEL).references]
    assert [request.output_token_ids for request in requests] == expected


def host_of(engine, rank, hosts):
    name = engine.executor.membership.get(speaker(rank)).hello.host
    return next(host for host in hosts if host.name == name)


def lose_while_computing(engine, requests, nodes, rank):
    """Lose the node of a rank when some tokens have come; return its host."""
    while not requests[-1].num_generated:
        engine.step()
    host = host_of(engine, rank, nodes.hosts)
    nodes.lose_node(host)
    return host


def run_slowly(engine):
    """Step until no request is left, for so long that the actors notice that their raylet is gone: a second or two."""
    while engine.has_requests:
        engine.step()
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("num_nodes", "num_cpus", "placement", "num_ranks", "per_node"),
    [(2, 2, "spread", 2, [1, 1]), (2, 2, "pack", 2, [2]), (2, 2, "pack", 4, [2, 2]), (4, 1, "spread", 4, [1, 1, 1, 1])],
    ids=["two_spread", "two_packed", "two_full", "four"],
)
def test_ranks_are_placed_over_nodes_and_tokens_are_those_of_transformers(
    hosts, num_nodes, num_cpus, placement, num_ranks, per_node
):
    with ray_nodes.ray_nodes(hosts[:num_nodes], num_cpus):
        with Engine(config(num_ranks, ray_placement=placement)) as engine:
            found = list(engine.executor.hosts)
            assert sorted(found.count(name) for name in set(found)) == per_node
            requests = add_all(engine)
            run_all(engine)
        check(requests)


def test_a_lost_node_is_replaced_by_one_with_room(hosts):
    with ray_nodes.ray_nodes(hosts, 1) as nodes, Engine(config(3, ray_placement="spread", max_restarts=4)) as engine:
        requests = add_all(engine)
        lost = lose_while_computing(engine, requests, nodes, rank=1)
        run_slowly(engine)
        assert lost.name not in engine.executor.hosts
        assert len(set(engine.executor.hosts)) == 3
        check(requests)


def test_fewer_ranks_go_on_where_a_lost_node_leaves_no_room(hosts):
    options = {"max_restarts": 10, "min_ranks": 1, "connect_timeout_s": 12.0}
    with ray_nodes.ray_nodes(hosts[:2], 1) as nodes, Engine(config(2, ray_placement="spread", **options)) as engine:
        requests = add_all(engine)
        lost = lose_while_computing(engine, requests, nodes, rank=1)
        run_slowly(engine)
        assert len(engine.executor.hosts) == 1
        assert lost.name not in engine.executor.hosts
        check(requests)


@pytest.mark.parametrize("max_restarts", [0, 1])
def test_a_lost_node_without_a_replacement_ends_with_an_error_that_names_it(hosts, max_restarts):
    options = {"max_restarts": max_restarts, "connect_timeout_s": 30.0}
    with ray_nodes.ray_nodes(hosts[:2], 1) as nodes, Engine(config(2, ray_placement="spread", **options)) as engine:
        lose_while_computing(engine, add_all(engine), nodes, rank=1)
        began = time.monotonic()
        with pytest.raises(WorkerError) as caught:
            run_slowly(engine)
        if max_restarts:
            expected = (
                "the Ray cluster has no room for 2 ranks of 1 CPUs within 30 s (connect_timeout_s); it has 1 CPUs"
            )
            assert expected in str(caught.value)
        else:
            assert "rank 1 (pid " in str(caught.value)
            assert "on host-" in str(caught.value)
            assert time.monotonic() - began < 20


def test_a_node_that_comes_back_is_used_again(hosts):
    with (
        ray_nodes.ray_nodes(hosts[:2], 1) as nodes,
        Engine(config(2, ray_placement="spread", max_restarts=4)) as engine,
    ):
        requests = add_all(engine)
        lost = lose_while_computing(engine, requests, nodes, rank=1)
        again = threading.Timer(5.0, nodes.start_node, [lost])
        again.start()
        run_slowly(engine)
        again.join()
        assert engine.restarts.num_done == 1
        assert lost.name in engine.executor.hosts
        assert len(set(engine.executor.hosts)) == 2
        check(requests)
