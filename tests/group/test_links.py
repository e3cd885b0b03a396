"""The link between driver and workers: who may come in, and who is told what."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmq
from links import SECRET, a_hello, receive_one

from longspan.comm.secret import Secret
from longspan.errors import CommunicationError, ConfigError
from longspan.group.driver_link import DriverLink
from longspan.group.messages import Refused, Stop, decode_to_driver, encode
from longspan.group.worker_link import WorkerLink
from longspan.group.zmq_auth import driver_keys


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


@pytest.mark.cover
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
