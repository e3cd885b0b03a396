"""Strangers at the driver's socket, and messages that nobody should send: the ranks go on, with the right tokens."""

import contextlib
import os
import random
import signal
import socket
import threading
from pathlib import Path

import msgspec
import pytest
import zmq
from links import SECRET, receive_one
from process_tree import ranks
from served_command import FACT, FILLER, QUESTION

from longspan import LLM, SamplingParams
from longspan.group.driver_link import DriverLink
from longspan.group.messages import Alive, Answer, Failed, Files, Hello, Ready, Refused, decode_to_worker, encode
from longspan.group.shape import ProcessId, speaker
from longspan.group.versions import own_versions
from longspan.group.zmq_auth import connect_with
from longspan.plan.types import RankResult

pytestmark = pytest.mark.processes

RANKS = {"context_parallel_size": 2, "placement": "striped", "page_size": 16, "stripe_size": 64, "threads_per_rank": 1}
PROMPT = FILLER[:1500] + FACT + FILLER[1500:3000] + QUESTION
PARAMS = SamplingParams(max_tokens=60, temperature=1.0, seed=5)
ANSWER = Answer(RankResult(0, 0, (), (), 1, 1, step_s=0.0))


def messages(rng, pid):
    """What a worker might say, with values that are out of place."""
    rank = rng.choice((0, 1, 2, -1, 10**6, 2**62))
    process = ProcessId(rank, rng.choice((0, 0, 0, 1, -1)))
    result = msgspec.structs.replace(ANSWER.result, plan_id=rng.choice((0, 3, 2**40, -1)), rank=rank)
    versions = own_versions()
    return rng.choice(
        [
            Hello(rank, rng.choice((2, 3, 0)), "here", pid, versions, 2**40),
            Hello(rank, 2, "here", pid, msgspec.structs.replace(versions, longspan="0.0.0"), 2**40),
            Alive(rank, rng.choice(("here", "")), rng.choice((pid, 0)), rng.randrange(2**40)),
            Answer(result),
            Ready(process),
            Files(process, "other files"),
            Failed(process, "a reason", "details", rng.choice(("user", "peer", "process"))),
        ]
    )


def frames(rng, pid):
    """A message as it is, or changed, cut off, repeated, random or huge."""
    data = bytearray(encode(messages(rng, pid)))
    kind = rng.random()
    if kind < 0.3:
        for _ in range(rng.choice((1, 3))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind < 0.4:
        data = data[: rng.randrange(len(data))]
    elif kind < 0.5:
        data = rng.randbytes(rng.choice((0, 1, 100, 10_000)))
    elif kind < 0.52:
        data = bytes(50_000_000)
    elif kind < 0.55:
        return [bytes(data)] * rng.choice((2, 50))
    return [bytes(data)]


def attack(directory, seed, stop, sent):
    """Messages to whatever generation of ranks there is, over sockets of their own, until it is told to stop."""
    rng = random.Random(seed)
    context = zmq.Context()
    while not stop.is_set():
        found = sorted(directory.glob("*/driver"), key=lambda path: int(path.parent.name))
        if not found:
            continue
        path = str(found[-1])
        if rng.random() < 0.1:  # no ZeroMQ at all
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as raw:  # it may be going
                raw.connect(path)
                raw.sendall(rng.randbytes(rng.choice((1, 64, 5000))))
        with context.socket(zmq.DEALER) as stranger:
            stranger.linger = 0
            stranger.connect(f"ipc://{path}")
            for _ in range(rng.choice((1, 10))):
                stranger.send_multipart(frames(rng, os.getpid()))
                sent.append(seed)
            stranger.poll(20)
    context.term()


@pytest.fixture
def attacked(cache_home):
    """Two ranks whose driver hears strangers, and the number of their messages."""
    with LLM("recall", **RANKS, max_restarts=3) as llm:
        (wanted,) = llm.generate(PROMPT, PARAMS)
        stop, sent = threading.Event(), []
        directory = Path(llm.engine.executor.address.removeprefix("ipc://")).parent.parent
        attacking = [threading.Thread(target=attack, args=(directory, seed, stop, sent)) for seed in range(3)]
        for thread in attacking:
            thread.start()
        try:
            yield llm, wanted.outputs[0].token_ids
        finally:
            stop.set()
            for thread in attacking:
                thread.join()
        assert len(sent) > 100


def test_strangers_at_the_socket_of_ranks_that_run_change_nothing(attacked):
    """Only this user can reach it: what is sent there is a mistake, or comes from ranks that are not wanted."""
    llm, wanted = attacked
    before = ranks(os.getpid())
    for _ in range(6):
        (output,) = llm.generate(PROMPT, PARAMS)
        assert output.outputs[0].token_ids == wanted
    assert ranks(os.getpid()) == before
    assert llm.engine.failure is None
    assert not llm.engine.restarts.num_done


@pytest.mark.slow
def test_strangers_do_not_keep_lost_ranks_from_being_replaced(attacked):
    llm, wanted = attacked
    for done in range(2):
        os.kill(ranks(os.getpid())[1], signal.SIGKILL)
        (output,) = llm.generate(PROMPT, PARAMS)
        assert output.outputs[0].token_ids == wanted
        assert llm.engine.restarts.num_done == done + 1


def test_bytes_without_the_secret_are_no_messages():
    """On the network: a stranger's bytes, ZeroMQ without a secret, and ZeroMQ with another one."""
    link = DriverLink("tcp://127.0.0.1:*", SECRET)
    host, port = link.address.removeprefix("tcp://").split(":")
    rng = random.Random(0)
    context = zmq.Context()
    for i in range(60):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall((b"", b"\xff\0\0\0\0\0\0\0\1\x7f\3")[i % 2] + rng.randbytes(rng.choice((1, 64, 5000))))
        with context.socket(zmq.DEALER) as stranger:
            stranger.linger = 0
            stranger.connect(link.address)
            stranger.send(encode(Ready(speaker(0))))
            assert link.receive(5) == []
    with context.socket(zmq.DEALER) as friend:
        connect_with(friend, SECRET)
        friend.connect(link.address)
        friend.send(encode(Ready(speaker(1))))
        _, frame = receive_one(link)
        assert frame == encode(Ready(speaker(1)))
    context.term()
    link.close()


def test_who_is_not_in_the_group_is_told_so(cache_home):
    with LLM("recall", **RANKS) as llm:
        context = zmq.Context()
        with context.socket(zmq.DEALER) as stranger:
            stranger.linger = 0
            stranger.connect(llm.engine.executor.address)
            for message, reason in (
                (encode(ANSWER), "Answer came from a worker that is not in this group"),
                (encode(Hello(1, 2, "here", 7, own_versions(), 2**40)), "legal is each number once"),
                (b"\xc1", "message: got one of another version of longspan"),
            ):
                stranger.send(message)
                assert stranger.poll(5000)
                answer = decode_to_worker(stranger.recv())
                assert isinstance(answer, Refused)
                assert reason in answer.reason
        context.term()
        assert llm.engine.failure is None
