"""Ranks as Ray actors: the tokens are those of Transformers, deaths are reported, and Ray is left as it was found."""

import os
import signal
import time

import pytest
from tiny_models import greedy, run_all, tiny_model

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.errors import ConfigError, WorkerError
from longspan.group.shape import speaker

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("LONGSPAN_SECRET", raising=False)
    yield
    ray.shutdown()


def config(**options):
    return EngineConfig(
        model=tiny_model("gemma3").path,
        executor="ray",
        threads_per_rank=1,
        placement="striped",
        page_size=4,
        stripe_size=8,
        max_num_batched_tokens=200,
        **{"context_parallel_size": 3, "kv_cache_memory": 2**24, "connect_timeout_s": 100.0, **options},
    )


def test_tokens_of_actors_are_those_of_transformers_and_our_cluster_ends_with_the_engine():
    references = tiny_model("gemma3").references
    with Engine(config()) as engine:
        requests = [engine.add_request(reference.prompt, greedy()) for reference in references]
        run_all(engine)
        assert len(set(engine.executor.hosts)) == 1
    assert [request.output_token_ids for request in requests] == [reference.token_ids for reference in references]
    assert not ray.is_initialized()


def test_actors_that_share_a_rank_are_on_one_node_and_give_the_tokens_of_transformers():
    references = tiny_model("gemma3").references
    with Engine(config(context_parallel_size=2, tensor_parallel_size=2, ray_placement="spread")) as engine:
        (group,) = ray.util.placement_group_table().values()
        assert [bundle["CPU"] for bundle in group["bundles"].values()] == [2.0, 2.0], "one bundle per rank"
        requests = [engine.add_request(reference.prompt, greedy()) for reference in references]
        run_all(engine)
    assert [request.output_token_ids for request in requests] == [reference.token_ids for reference in references]


def test_an_actor_that_dies_is_replaced_if_the_user_wants_it():
    references = tiny_model("gemma3").references
    with Engine(config(max_restarts=2)) as engine:
        requests = [engine.add_request(reference.prompt, greedy()) for reference in references]
        while not requests[-1].num_generated:
            engine.step()
        os.kill(engine.executor.membership.get(speaker(1)).hello.pid, signal.SIGKILL)
        run_all(engine)
        assert engine.restarts.num_done == 1
    assert [request.output_token_ids for request in requests] == [reference.token_ids for reference in references]
    assert not ray.is_initialized()


def test_an_actor_that_dies_is_named_with_rank_and_node_and_the_cluster_that_was_there_stays():
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    with Engine(config(ray_placement="spread")) as engine:
        node = ray.util.get_node_ip_address()
        pid = engine.executor.membership.get(speaker(1)).hello.pid
        engine.add_request(tiny_model("gemma3").references[3].prompt, greedy())
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=rf"^rank 1 \(pid {pid} on [^)]+\) died on node {node}: The actor died"):
            run_all(engine)
    assert ray.is_initialized()
    deadline = time.monotonic() + 30  # Ray takes back what the ranks had a moment later
    while ray.available_resources().get("CPU", 0) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_rejects_a_cluster_that_is_not_there_and_ranks_that_find_no_room():
    with pytest.raises(ConfigError, match=r"^ray_address: got '127.0.0.1:1', legal is the address of a Ray cluster"):
        Engine(config(ray_address="127.0.0.1:1"))
    assert not ray.is_initialized()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with pytest.raises(WorkerError, match=r"no room for 3 ranks of 1 CPUs within 2 s .* it has 2 CPUs on 1 nodes"):
        Engine(config(connect_timeout_s=2.0))
