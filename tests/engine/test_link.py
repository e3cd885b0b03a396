"""The link between driver and workers, and the handshake between ranks: who may come in, and who is told what."""

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist
import zmq

from longspan.comm import connect
from longspan.comm.connect import Meeting, address_towards, connect_all, interface_address, local_meeting
from longspan.comm.secret import Secret, read_secret, require_secret
from longspan.config import EngineConfig
from longspan.errors import CommunicationError, ConfigError
from longspan.group.driver_link import DriverLink
from longspan.group.membership import Roster
from longspan.group.messages import Hello, Refused, Stop, Versions, decode_to_driver, encode
from longspan.group.versions import own_versions
from longspan.group.worker_link import WorkerLink
from longspan.models.fingerprint import SAMPLE_BYTES, fingerprint
from longspan.worker.remote import Place, read_place

SECRET = Secret(b"correct horse battery staple")
VERSIONS = Versions("1", "3.11", "2.11.0", "5.16.0")


def a_hello(**options):
    return Hello(**{"rank": 1, "world_size": 2, "host": "b", "pid": 7, "versions": VERSIONS, **options})


# -- driver and worker -------------------------------------------------------------------------------------------------


def receive_one(link):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if received := link.receive(100):
            return received[0]
    raise AssertionError("nothing came")


@pytest.fixture(params=["ipc", "tcp"])
def driver(request, tmp_path):
    is_tcp = request.param == "tcp"
    link = DriverLink("tcp://127.0.0.1:*" if is_tcp else f"ipc://{tmp_path}/driver", SECRET if is_tcp else None)
    link.secret = SECRET if is_tcp else None
    yield link
    link.close()


def test_messages_go_both_ways_and_a_connection_that_is_gone_is_noticed(driver):
    worker = WorkerLink(driver.address, driver.secret)
    worker.send(a_hello())
    peer, frame = receive_one(driver)
    assert decode_to_driver(frame) == a_hello()
    assert driver.send(peer, encode(Stop()))
    assert worker.receive() == Stop()
    worker.close()
    deadline = time.monotonic() + 20
    while driver.send(peer, encode(Stop())):
        driver.receive(10)
        assert time.monotonic() < deadline
    assert not driver.send(b"nobody", b"")


def test_plans_are_sent_while_another_thread_waits_for_answers(driver):
    """Every message of 2000 arrives, however sends and waits meet."""
    worker = WorkerLink(driver.address, driver.secret)
    worker.send(a_hello())
    peer, _ = receive_one(driver)
    echoed = []

    def echo():
        for _ in range(2000):
            worker.receive()
            worker.send(a_hello())

    def watch():
        deadline = time.monotonic() + 60
        while len(echoed) < 2000 and time.monotonic() < deadline:
            echoed.extend(driver.receive(5000))

    threads = [threading.Thread(target=echo), threading.Thread(target=watch)]
    for thread in threads:
        thread.start()
    for i in range(2000):
        assert driver.send(peer, encode(Stop()))
        if i % 50 == 0:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert len(echoed) == 2000
    worker.close()


def test_a_worker_with_another_secret_is_told_at_once_and_its_address_is_known():
    driver = DriverLink("tcp://127.0.0.1:*", SECRET)
    deadline = time.monotonic() + 30
    with ThreadPoolExecutor(1) as pool:
        while not driver.strangers:  # a connection may be gone before its address is looked at
            worker = WorkerLink(driver.address, Secret(b"incorrect horse battery staple"))
            answer = pool.submit(worker.introduce, a_hello(), 20.0)
            while not answer.done():
                assert driver.receive(50) == []
            with pytest.raises(ConfigError, match=r"^LONGSPAN_SECRET: rank 1 on b got as far as tcp://.* legal is the"):
                answer.result()
            worker.close(linger_ms=0)
            assert time.monotonic() < deadline
    assert driver.strangers == {"127.0.0.1"}
    assert driver.num_strangers > 0
    driver.close()


def test_a_worker_that_knows_the_drivers_key_but_has_one_of_its_own_is_not_admitted():
    from longspan.group.zmq_auth import driver_keys

    driver = DriverLink("tcp://127.0.0.1:*", SECRET)
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.curve_serverkey = driver_keys(SECRET).public
    stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
    stranger.connect(driver.address)
    stranger.send(encode(a_hello()))
    deadline = time.monotonic() + 20
    while not driver.num_strangers:
        assert driver.receive(50) == []
        assert time.monotonic() < deadline
    context.destroy(linger=0)
    driver.close()


def test_a_refused_worker_raises_what_the_driver_said(driver):
    worker = WorkerLink(driver.address, driver.secret)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(worker.introduce, a_hello(), 20.0)
        peer, _ = receive_one(driver)
        driver.send(peer, encode(Refused("RANK: got 1 twice")))
        with pytest.raises(ConfigError, match=r"^RANK: got 1 twice$"):
            answer.result()
    worker.close()


@pytest.mark.parametrize(("answers", "words"), [(True, "does not answer"), (False, "cannot be reached")])
def test_a_driver_that_is_silent_is_told_from_one_that_is_not_there(answers, words):
    driver = DriverLink("tcp://127.0.0.1:*", SECRET)
    if not answers:
        driver.close()
    worker = WorkerLink(driver.address, SECRET)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(worker.introduce, a_hello(), 1.0)
        while answers and not answer.done():
            driver.receive(50)  # admits it, and says nothing
        with pytest.raises(CommunicationError, match=rf"^rank 1 on b: the driver at tcp://\S+ {words} \(within 1 s\)$"):
            answer.result()
    worker.close(linger_ms=0)
    driver.close()


def test_rejects_an_address_of_another_host():
    with pytest.raises(ConfigError, match=r"^listen: got 'tcp://192.0.2.77:7000', legal is HOST:PORT with an address"):
        DriverLink("tcp://192.0.2.77:7000", SECRET)


# -- who fits together -------------------------------------------------------------------------------------------------


def test_a_roster_is_complete_when_all_have_come_and_are_ready():
    roster = Roster(2, VERSIONS)
    roster.admit(a_hello(rank=1))
    assert roster.missing == [0]
    roster.admit(a_hello(rank=0, host="a"))
    assert (roster.missing, roster.hosts) == ([], ("a", "b"))
    assert [roster.note_ready(rank) for rank in (0, 1, 1)] == [False, True, False]
    assert (roster.name(1), Roster(2, VERSIONS).name(1)) == ("rank 1 (pid 7 on b)", "rank 1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 3}, r"WORLD_SIZE: got 3 from rank 1 \(pid 7 on b\), legal is the driver's .*, 2"),
        ({"rank": 2}, r"RANK: got 2 from rank 2 \(pid 7 on b\), legal is 0 to 1"),
        ({"rank": 0, "pid": 8}, r"RANK: got 0 from rank 0 \(pid 8 on b\) and from rank 0 \(pid 7 on a\), legal is one"),
        (
            {"versions": msgspec.structs.replace(VERSIONS, torch="2.12.0")},
            r"version of torch: got 2.12.0 from rank 1 \(pid 7 on b\), legal is the driver's, 2.11.0",
        ),
    ],
)
def test_rejects_workers_that_do_not_fit(options, message):
    roster = Roster(2, VERSIONS)
    roster.admit(a_hello(rank=0, host="a"))
    with pytest.raises(ConfigError, match=f"^{message}"):
        roster.admit(a_hello(**options))


def test_rejects_ranks_with_different_model_files():
    roster = Roster(3, VERSIONS)
    for rank in range(3):
        roster.admit(a_hello(rank=rank, world_size=3))
    roster.compare_files(2, "x")
    roster.compare_files(0, "x")
    with pytest.raises(ConfigError, match=r"^model: got other files on rank 1 \(.*\) than on rank 0 \("):
        roster.compare_files(1, "y")


def test_versions_are_those_of_the_modules():
    import transformers

    versions = own_versions()
    assert (versions.torch, versions.transformers) == (torch.__version__.partition("+")[0], transformers.__version__)


def test_a_fingerprint_tells_configs_sizes_headers_and_blocks_apart(tmp_path):
    def write(config=b"{}", header=b'{"a":1}', body=bytes(10 * SAMPLE_BYTES)):
        (tmp_path / "config.json").write_bytes(config)
        data = len(header).to_bytes(8, "little") + header + body
        (tmp_path / "model.safetensors").write_bytes(data)
        return fingerprint(tmp_path)

    changed = bytearray(10 * SAMPLE_BYTES)
    changed[-1] = 1
    same = [write(), write()]
    others = [write(config=b"{ }"), write(header=b'{"a":2}'), write(body=bytes(9 * SAMPLE_BYTES)), write(body=changed)]
    assert len({*same, *others}) == 5


# -- between ranks -----------------------------------------------------------------------------------------------------


def connect_ranks(size, meetings):
    """Connects threads; returns each rank's sockets, or raises what a rank raised."""
    store = dist.HashStore()
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(connect_all, rank, size, store, meetings[rank], timeout_s=2.0) for rank in range(size)]
        return [future.result() for future in futures]


def test_ranks_of_a_host_meet_over_unix_sockets_and_others_over_tcp_without_delay(monkeypatch):
    meetings = [Meeting("unused", None, "127.0.0.1", b"k")] * 3
    near = connect_ranks(3, meetings)
    assert {s.family for sockets in near for s in sockets.values()} == {socket.AF_UNIX}
    monkeypatch.setattr(connect, "_host_id", lambda: f"host {threading.get_ident()}")
    far = connect_ranks(3, meetings)
    for rank, sockets in enumerate(far):
        assert sorted(sockets) == [peer for peer in range(3) if peer != rank]
        for connection in sockets.values():
            assert connection.family == socket.AF_INET
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            # Four messages of 32 KiB fit, as Note [No deadlock] has it; Linux counts its own overhead as well.
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 2 * 4 * 32 * 1024
    far[0][2].send(b"hello")
    assert far[2][0].recv(5) == b"hello" or not far[2][0].setblocking(True)
    for sockets in (*near, *far):
        for connection in sockets.values():
            connection.close()


def test_rejects_a_rank_that_does_not_know_the_secret(monkeypatch):
    monkeypatch.setattr(connect, "_host_id", lambda: f"host {threading.get_ident()}")
    meetings = [Meeting("unused", None, "127.0.0.1", key) for key in (b"k", b"other")]
    with pytest.raises(OSError, match=r"ranks \[1\] did not connect|rank 0 does not know the secret"):
        connect_ranks(2, meetings)


def test_strangers_are_passed_over_and_ranks_still_meet(monkeypatch):
    monkeypatch.setattr(connect, "_host_id", lambda: f"host {threading.get_ident()}")
    monkeypatch.setattr(connect, "STRANGER_S", 0.2)
    store = dist.HashStore()
    meeting = Meeting("unused", None, "127.0.0.1", b"k")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(connect_all, 0, 2, store, meeting, timeout_s=20.0)
        address = msgspec.msgpack.decode(store.get("longspan-address-0"))["tcp"]
        strangers = [socket.create_connection(address) for _ in range(3)]
        strangers[0].sendall(os.urandom(100))  # nonsense
        strangers[1].close()  # and one says nothing
        second = pool.submit(connect_all, 1, 2, store, meeting, timeout_s=20.0)
        connections = [first.result()[1], second.result()[0]]
    connections[0].send(b"x")
    connections[1].setblocking(True)
    assert connections[1].recv(1) == b"x"
    for connection in (*connections, *strangers):
        connection.close()


def test_silent_strangers_do_not_move_the_deadline(monkeypatch):
    """Each of them was once heard to the end before the deadline was looked at."""
    monkeypatch.setattr(connect, "STRANGER_S", 60.0)
    store = dist.HashStore()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(connect_all, 0, 2, store, Meeting("unused", None, "127.0.0.1", b"k"), timeout_s=0.5)
        address = msgspec.msgpack.decode(store.get("longspan-address-0"))["tcp"]
        strangers = [socket.create_connection(address) for _ in range(3)]
        with pytest.raises(OSError, match=r"ranks \[1\] did not connect"):
            waiting.result(timeout=20)
    for stranger in strangers:
        stranger.close()


def test_a_message_of_the_handshake_may_come_in_pieces():
    near, far = socket.socketpair()
    with near, far:
        near.sendall(b"abc")
        threading.Timer(0.05, lambda: near.sendall(b"defgh")).start()
        assert connect._receive(far, 6, time.monotonic() + 10) == b"abcdef"
        with pytest.raises(TimeoutError):
            connect._receive(far, 6, time.monotonic() + 0.05)


def test_addresses_are_found_by_interface_and_by_route():
    assert interface_address("lo") == "127.0.0.1"
    assert address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"^interface: got 'nothing0', legal is one of this host's .*lo"):
        interface_address("nothing0")
    assert local_meeting(Path("/x")) == Meeting("file:///x/rendezvous", Path("/x"), None, b"")


# -- secrets and options -----------------------------------------------------------------------------------------------


def test_a_secret_comes_from_a_file_or_the_environment_and_is_never_shown(tmp_path, monkeypatch):
    monkeypatch.delenv("LONGSPAN_SECRET", raising=False)
    assert read_secret(None) is None
    monkeypatch.setenv("LONGSPAN_SECRET", " correct horse battery staple\n")
    path = tmp_path / "secret"
    path.write_text("correct horse battery staple\n")
    keys = [secret.key("x") for secret in (SECRET, read_secret(None), read_secret(str(path)))]
    assert len(set(keys)) == 1
    assert SECRET.key("x") != SECRET.key("y")
    assert "horse" not in f"{SECRET} {SECRET!r}"


def test_rejects_secrets_that_are_missing_unreadable_or_short(tmp_path, monkeypatch):
    monkeypatch.delenv("LONGSPAN_SECRET", raising=False)
    with pytest.raises(ConfigError, match=r"^LONGSPAN_SECRET: not set, legal is a secret of at least 16 bytes.*: why$"):
        require_secret(None, "why")
    with pytest.raises(ConfigError, match=r"^secret_file: got .*nowhere', legal is a file that can be read"):
        read_secret(str(tmp_path / "nowhere"))
    monkeypatch.setenv("LONGSPAN_SECRET", "hunter2")
    with pytest.raises(ConfigError, match=r"^LONGSPAN_SECRET: got a secret of 7 bytes") as caught:
        read_secret(None)
    assert "hunter2" not in str(caught.value)


PLACE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


def test_a_place_is_what_torchrun_sets():
    assert read_place(PLACE) == Place(1, 2, 1, "a")
    assert read_place({**PLACE, "LOCAL_WORLD_SIZE": "2"}) == Place(1, 2, 2, "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, "RANK: not set, legal is what torchrun sets"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE: not set"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR: not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT: not set"),
        ({"RANK": "2"}, "RANK: got 2, legal is a number from 0 and below WORLD_SIZE, 2"),
        ({"RANK": "-1"}, "RANK: got '-1', legal is a whole number from 0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: got 'two', legal is a whole number from 1"),
    ],
)
def test_rejects_places_that_are_none(change, message):
    environment = {name: value for name, value in {**PLACE, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=f"^{message}"):
        read_place(environment)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "external"}, "listen: got none with executor 'external', legal is HOST:PORT"),
        ({"executor": "external", "listen": "10.0.0.1"}, "listen: got '10.0.0.1', legal is HOST:PORT"),
        ({"executor": "external", "listen": "a:0"}, "listen: got 'a:0', legal is HOST:PORT"),
        (
            {"listen": "a:7000"},
            "listen: got 'a:7000' with executor 'processes', legal is a text with executor",
        ),
        ({"secret_file": "x"}, "secret_file: got 'x' with executor 'processes'"),
        ({"ray_address": "x"}, "ray_address: got 'x' with executor 'processes', legal is a text with executor ray"),
        ({"executor": "external", "listen": "a:7000", "interface": "eth0"}, "interface: got 'eth0' with executor 'ext"),
        ({"ray_placement": "spread"}, "ray_placement: got 'spread' with executor 'processes', legal is executor ray"),
        ({"executor": "ray", "ray_placement": "wide"}, "ray_placement: got 'wide', legal is one of pack, spread"),
        ({"connect_timeout_s": 0}, "connect_timeout_s: got 0, legal is a number above 0"),
    ],
)
def test_rejects_options_that_contradict_the_executor(options, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        EngineConfig(model="recall", **options)


def test_the_driver_does_not_listen_without_a_secret(longspan, monkeypatch):
    monkeypatch.delenv("LONGSPAN_SECRET", raising=False)
    outcome = longspan("generate", "recall", "--prompt", "x", "--executor", "external", "--listen", "127.0.0.1:7999")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("longspan: LONGSPAN_SECRET: not set, legal is a secret of at least 16 bytes")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--driver", "10.0.0.1:7000"], {}, "driver: got '10.0.0.1:7000', legal is tcp://HOST:PORT"),
        (["--driver", "tcp://a:7000"], {}, "RANK: not set, legal is what torchrun sets"),
        (["--driver", "tcp://a:7000"], PLACE, "LONGSPAN_SECRET: not set, legal is a secret"),
    ],
)
def test_rejects_worker_commands_that_lack_something(arguments, environment, message):
    clean = {name: value for name, value in os.environ.items() if name not in {*PLACE, "LONGSPAN_SECRET"}}
    command = [sys.executable, "-m", "longspan.worker", *arguments]
    done = subprocess.run(
        command, env={**clean, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"longspan: {message}")
    assert done.stderr.count("\n") == 1
