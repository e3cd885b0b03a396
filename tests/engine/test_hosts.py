"""Workers on several hosts: the tokens are those of Transformers, and every error names host and rank, on both sides.

Hosts are network namespaces (`tests/endurance/netns.py`); torchrun starts workers on each, or the test does as torchrun
would.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import netns
import pytest
from tiny_models import greedy, run_all, tiny_model

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.errors import ConfigError, WorkerError
from longspan.group.shape import speaker

pytestmark = pytest.mark.processes

SECRET = "correct horse battery staple"
DRIVER = f"{netns.DRIVER_ADDRESS}:7071"
END_S = 20.0
"""All workers have ended so soon after the driver, or after one of them."""


@pytest.fixture(scope="module")
def hosts():
    if (reason := netns.why_not()) is not None:
        pytest.skip(reason)
    with netns.network(4, mbit_per_s=2000) as made:
        yield made


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("LONGSPAN_SECRET", SECRET)


class Workers:
    """The workers of some hosts: under torchrun, or started by hand with what torchrun would have set."""

    def __init__(
        self,
        hosts,
        *,
        ranks_per_host=1,
        world_size=None,
        torchrun=False,
        environments=None,
        directories=None,
        interface="eth0",
    ):
        self._interface = [] if interface is None else ["--interface", interface]
        self.hosts, self._ranks_per_host, self._torchrun = hosts, ranks_per_host, torchrun
        self._world_size = world_size or ranks_per_host * len(hosts)
        self._environments, self._directories = environments or {}, directories or {}
        self.start()

    def start(self):
        """Also again, when all have ended."""
        hosts, ranks_per_host = self.hosts, self._ranks_per_host
        self.processes = []
        common = ["longspan.worker", "--driver", f"tcp://{DRIVER}", *self._interface, "--connect-timeout-s", "60"]
        master = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29571"}
        for host in hosts:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **self._environments.get(host.index, {})}
            directory = self._directories.get(host.index)
            if self._torchrun:
                command = [
                    *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(hosts))),
                    *("--node-rank", str(host.index), "--nproc-per-node", str(ranks_per_host)),
                    *("--master-addr", hosts[0].address, "--master-port", "29571", "--local-addr", host.address, "-m"),
                ]
                self.processes.append(host.start([*command, *common], environment, directory))
                continue
            for rank in range(host.index * ranks_per_host, (host.index + 1) * ranks_per_host):
                place = {"WORLD_SIZE": str(self._world_size), "LOCAL_WORLD_SIZE": str(ranks_per_host)}
                place["RANK"] = str(rank)
                command = [sys.executable, "-m", *common]
                self.processes.append(host.start(command, {**master, **place, **environment}, directory))

    def end(self):
        """Returns exit code and output of every process that was started."""
        outputs = [process.communicate(timeout=END_S)[0] for process in self.processes]
        return [(process.returncode, output) for process, output in zip(self.processes, outputs, strict=True)]

    def kill(self):
        for host in self.hosts:
            for pid in host.pids():
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.communicate()


@contextmanager
def workers(hosts, **options):
    started = Workers(hosts, **options)
    try:
        yield started
    finally:
        started.kill()


def config(model, num_ranks, **options):
    return EngineConfig(
        model=model,
        context_parallel_size=num_ranks,
        executor="external",
        listen=DRIVER,
        threads_per_rank=1,
        placement="striped",
        page_size=4,
        stripe_size=8,
        max_num_batched_tokens=200,
        **{"kv_cache_memory": 2**24, "connect_timeout_s": 60.0, "exchange_timeout_s": 30.0, **options},
    )


@pytest.mark.slow
@pytest.mark.parametrize(("num_hosts", "ranks_per_host"), [(2, 2), (4, 1)])
def test_tokens_over_several_hosts_are_those_of_transformers(hosts, num_hosts, ranks_per_host):
    model = tiny_model("gemma3")
    with workers(hosts[:num_hosts], ranks_per_host=ranks_per_host, torchrun=True) as running:
        with Engine(config(model.path, num_hosts * ranks_per_host)) as engine:
            expected = tuple(f"host-{host}" for host in range(num_hosts) for _ in range(ranks_per_host))
            assert engine.executor.hosts == expected
            requests = [engine.add_request(reference.prompt, greedy()) for reference in model.references]
            run_all(engine)
        assert [r.output_token_ids for r in requests] == [reference.token_ids for reference in model.references]
        outcomes = running.end()
    assert [code for code, _ in outcomes] == [0] * num_hosts, outcomes


@pytest.mark.slow
def test_ranks_of_two_processes_each_on_a_host_of_its_own_give_the_tokens_of_transformers(hosts):
    model = tiny_model("gemma3")
    with workers(hosts[:2], ranks_per_host=2, torchrun=True) as running:
        with Engine(config(model.path, 2, tensor_parallel_size=2)) as engine:
            assert engine.executor.hosts == ("host-0", "host-1"), "one per rank"
            requests = [engine.add_request(reference.prompt, greedy()) for reference in model.references]
            run_all(engine)
        assert [r.output_token_ids for r in requests] == [reference.token_ids for reference in model.references]
        outcomes = running.end()
    assert [code for code, _ in outcomes] == [0, 0], outcomes


@pytest.mark.slow
def test_rejects_a_rank_that_two_hosts_would_share(hosts):
    model = tiny_model("gemma3")
    with workers(hosts[:2]) as running:
        with pytest.raises(ConfigError, match=r"legal is one host for both: 0 to 1 are one rank"):
            Engine(config(model.path, 1, tensor_parallel_size=2))
        outcomes = running.end()
    assert all(code and "legal is one host for both: 0 to 1 are one rank" in output for code, output in outcomes)


@pytest.fixture
def loopback_names(hosts):
    """Hosts whose own names resolve to their loopback, as distributions set them up."""
    for host in hosts:
        host.name_addresses({"localhost": "127.0.0.1", host.name: "127.0.1.1"})
    yield
    for host in hosts:
        host.name_addresses(None)


def test_hosts_whose_names_resolve_to_loopback_find_each_other_without_an_interface(hosts, loopback_names):
    model = tiny_model("llama")
    with workers(hosts[:2], interface=None) as running:
        with Engine(config(model.path, 2, strategy="pass_kv", exchange_timeout_s=10.0)) as engine:
            requests = [engine.add_request(reference.prompt, greedy()) for reference in model.references]
            run_all(engine)
        assert [r.output_token_ids for r in requests] == [reference.token_ids for reference in model.references]
        outcomes = running.end()
    assert [code for code, _ in outcomes] == [0, 0], outcomes


def test_rejects_a_meeting_point_that_is_every_hosts_own(hosts, loopback_names):
    with workers(hosts[:2], interface=None, environments={1: {"MASTER_ADDR": "localhost"}}) as running:
        with pytest.raises(ConfigError) as caught:
            Engine(config("recall", 2))
        outcomes = running.end()
    message = (
        r"MASTER_ADDR: got 'localhost' from rank 1 \(pid \d+ on host-1\), where that is its own host, legal is an "
    )
    assert re.match(message, str(caught.value))
    assert all(code for code, _ in outcomes)


def test_a_worker_killed_on_another_host_is_named_with_its_host(hosts):
    model = tiny_model("llama")
    with workers(hosts[:2]) as running, Engine(config(model.path, 2)) as engine:
        engine.add_request(model.references[0].prompt, greedy())
        run_all(engine)
        pid = engine.executor.membership.get(speaker(1)).hello.pid
        engine.add_request(model.references[3].prompt, greedy(400))
        engine.step()
        os.kill(pid, signal.SIGKILL)
        expected = rf"^rank 1 \(pid {pid} on host-1\) is gone: its connection to the driver has closed$"
        with pytest.raises(WorkerError, match=expected):
            run_all(engine)
        outcomes = running.end()
        assert all(code for code, _ in outcomes)
        # Rank 0 tells what it saw first: its peer's end, or the driver's verdict.
        assert "rank 0: " in outcomes[0][1]
        assert "rank 1" in outcomes[0][1].partition("rank 0: ")[2]


@pytest.mark.slow
def test_workers_that_somebody_starts_again_go_on(hosts):
    model = tiny_model("llama")
    with workers(hosts[:2]) as running, Engine(config(model.path, 2, max_restarts=1)) as engine:
        requests = [engine.add_request(reference.prompt, greedy()) for reference in model.references]
        while not requests[-1].num_generated:
            engine.step()
        os.kill(engine.executor.membership.get(speaker(1)).hello.pid, signal.SIGKILL)

        def start_again():
            assert all(code for code, _ in running.end())
            running.start()

        again = threading.Thread(target=start_again)
        again.start()
        run_all(engine)
        again.join()
        assert [r.output_token_ids for r in requests] == [reference.token_ids for reference in model.references]
        assert engine.restarts.num_done == 1


@pytest.mark.slow
def test_a_host_that_is_cut_off_is_noticed_on_both_sides(hosts):
    model = tiny_model("llama")
    with workers(hosts[:2]) as running, Engine(config(model.path, 2, exchange_timeout_s=3.0)) as engine:
        engine.add_request(model.references[0].prompt, greedy())
        run_all(engine)
        hosts[1].cut_off()
        try:
            deadline = time.monotonic() + 30
            while engine.failure is None:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert "rank 1 (pid" in str(engine.failure)
            assert "on host-1) has given no sign of life for 8 s" in str(engine.failure)
            outcomes = running.end()
        finally:
            netns.must("ip", "-n", hosts[1].namespace, "link", "set", "eth0", "up")
    assert "rank 1: the driver has given no sign of life for 8 s" in outcomes[1][1]
    assert "rank 0: the driver has ended the group: rank 1 (pid" in outcomes[0][1]


@pytest.mark.slow
def test_a_worker_with_another_secret_is_told_so_and_the_driver_names_its_address(hosts):
    wrong = {1: {"LONGSPAN_SECRET": "incorrect horse battery"}}
    with workers(hosts[:2], environments=wrong) as running:
        with pytest.raises(WorkerError) as caught:
            Engine(config("recall", 2, connect_timeout_s=12.0))
        outcomes = running.end()
    assert str(caught.value) == (
        f"rank 1 did not connect to tcp://{DRIVER} within 12 s (connect_timeout_s); connections with another secret "
        f"came from {hosts[1].address}"
    )
    assert [code for code, _ in outcomes] == [1, 2]
    assert "longspan: LONGSPAN_SECRET: rank 1 on host-1 got as far as tcp://10.77.0.254:7071" in outcomes[1][1]
    assert "longspan: rank 0: the driver has ended the group: rank 1 did not connect" in outcomes[0][1]
    assert not any(SECRET in output or "incorrect horse" in output for _, output in outcomes)


@pytest.mark.slow
def test_a_host_that_never_comes_is_named_by_its_ranks(hosts):
    with workers(hosts[:1], ranks_per_host=2, world_size=4) as running:
        with pytest.raises(WorkerError, match=r"^ranks 2, 3 did not connect to tcp://[0-9.]+:7071 within 12 s"):
            Engine(config("recall", 4, connect_timeout_s=12.0))
        outcomes = running.end()
    for rank, (code, output) in enumerate(outcomes):
        assert code == 1
        assert f"longspan: rank {rank}: the driver has ended the group: ranks 2, 3 did not connect" in output


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "3"}, r"WORLD_SIZE: got 3 from rank 1 \(pid \d+ on host-1\), legal is the driver's .*, 2"),
        (
            {"RANK": "0"},
            r"RANK: got 0 from rank 0 \(pid \d+ on host-[01]\) and from rank 0 \(pid \d+ on host-[01]\), legal",
        ),
    ],
    ids=["another_world_size", "a_rank_twice"],
)
def test_rejects_workers_that_do_not_fit_on_both_sides(hosts, environment, message):
    with workers(hosts[:2], environments={1: environment}) as running:
        with pytest.raises(ConfigError, match=f"^{message}"):
            Engine(config("recall", 2))
        outcomes = running.end()
    assert all(code for code, _ in outcomes)
    for _, output in outcomes:
        assert re.search(message, output), output


def test_rejects_other_model_files_on_one_host_on_both_sides(hosts, tmp_path, monkeypatch):
    for index in range(2):
        shutil.copytree(tiny_model("llama").path, tmp_path / str(index) / "model")
    weights = tmp_path / "1" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100_000:-80_000] = bytes(20_000)
    weights.write_bytes(data)
    monkeypatch.chdir(tmp_path / "0")  # so that one name means other files
    message = r"model: got other files on rank 1 \(pid \d+ on host-1\) than on rank 0 \(pid \d+ on host-0\), legal is"
    with workers(hosts[:2], directories={0: tmp_path / "0", 1: tmp_path / "1"}) as running:
        with pytest.raises(ConfigError, match=f"^{message}"):
            Engine(config("./model", 2))
        outcomes = running.end()
    assert [code for code, _ in outcomes] == [1, 1]
    for _, output in outcomes:
        assert re.search(message, output), output


@pytest.mark.slow
def test_a_driver_that_is_killed_ends_its_workers_on_other_hosts(hosts):
    script = (
        "from longspan import LLM\n"
        f"llm = LLM('recall', context_parallel_size=2, executor='external', listen='{DRIVER}')\n"
        "print('ready', flush=True)\nimport time; time.sleep(600)"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    with workers(hosts[:2]) as running:
        assert driver.stdout.readline() == "ready\n"
        driver.kill()
        driver.communicate()
        outcomes = running.end()
    for rank, (code, output) in enumerate(outcomes):
        assert (code, output) == (1, f"longspan: rank {rank}: its connection to the driver has closed\n")


def test_a_worker_without_a_driver_says_so_after_its_deadline(hosts):
    command = [sys.executable, "-m", "longspan.worker", "--driver", f"tcp://{DRIVER}", "--connect-timeout-s", "1"]
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29571"}
    process = hosts[1].start(command, {**os.environ, **place})
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output == f"longspan: rank 1 on host-1: the driver at tcp://{DRIVER} cannot be reached (within 1 s)\n"
