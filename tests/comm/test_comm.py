"""Proves what strategies rely on: messages between a pair of ranks arrive whole, in order, or the error says who.

The same checks for ranks that are threads and ranks that are processes; the latter with real process death.
"""

import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from longspan.comm import connect, distributed
from longspan.comm.base import Communicator
from longspan.comm.connect import Meeting, local_meeting
from longspan.comm.distributed import DistributedCommunicator
from longspan.comm.nccl import NCCLCommunicator, _PendingBatch
from longspan.comm.recording import RecordingCommunicator
from longspan.comm.sockets import SocketCommunicator
from longspan.comm.threads import thread_group
from longspan.errors import CommunicationError

# -- what every kind of communicator must do; run on threads and in processes ------------------------------------------


def message(source: int, destination: int, index: int, size: int) -> torch.Tensor:
    """Contents that no other message has."""
    return torch.arange(size, dtype=torch.float32) + 1000 * index + 100_000 * source + 1_000_000 * destination


def check_many_outstanding_messages_arrive_in_order(comm: Communicator) -> None:
    """Twenty exchanges are started before the first is waited for; sizes 0 to 5000 differ per message."""
    rng = random.Random(0)  # the same sizes on every rank
    sizes = [[[rng.choice([0, 1, 7, 5000]) for _ in range(20)] for _ in range(comm.size)] for _ in range(comm.size)]
    peers = [peer for peer in range(comm.size) if peer != comm.rank]
    pendings, recvs = [], []
    for i in range(20):
        sends = [(p, message(comm.rank, p, i, sizes[comm.rank][p][i])) for p in peers]
        into = [(p, torch.full((sizes[p][comm.rank][i],), -1.0)) for p in peers]
        pendings.append(comm.exchange(sends, into))
        recvs.append(into)
    for i, (pending, into) in enumerate(zip(pendings, recvs, strict=True)):
        pending.wait()
        for peer, tensor in into:
            assert torch.equal(tensor, message(peer, comm.rank, i, tensor.numel())), (comm.rank, peer, i)


def check_several_messages_for_one_peer_in_one_call_keep_their_order(comm: Communicator) -> None:
    successor, predecessor = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    into = [(predecessor, torch.empty(2, 3, dtype=torch.bfloat16)), (predecessor, torch.empty(4, dtype=torch.uint8))]
    comm.exchange(
        [
            (successor, torch.full((2, 3), float(comm.rank), dtype=torch.bfloat16)),
            (successor, torch.full((4,), comm.rank + 50, dtype=torch.uint8)),
        ],
        into,
    ).wait()
    assert into[0][1].tolist() == [[predecessor] * 3] * 2
    assert into[1][1].tolist() == [predecessor + 50] * 4


def check_messages_without_elements_are_not_sent(comm: Communicator) -> None:
    """Nobody receives them, and nothing waits for them."""
    peers = [peer for peer in range(comm.size) if peer != comm.rank]
    comm.exchange([(p, torch.empty(0, 5)) for p in peers], []).wait()
    comm.exchange([], [(p, torch.empty(0)) for p in peers]).wait()
    comm.exchange([], []).wait()
    check_several_messages_for_one_peer_in_one_call_keep_their_order(comm)


def check_a_sent_tensor_may_be_written_after_wait(comm: Communicator) -> None:
    successor, predecessor = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    outgoing, incoming = torch.empty(100_000), torch.empty(100_000)
    for i in range(10):
        outgoing.fill_(100 * i + comm.rank)
        comm.exchange([(successor, outgoing)], [(predecessor, incoming)]).wait()
        outgoing.fill_(-1)
        assert incoming.eq(100 * i + predecessor).all()


def check_more_than_a_socket_holds(comm: Communicator) -> None:
    """A megabyte of small messages each way before anybody reads one: sends wait in a queue, and nobody is stuck."""
    peers = [peer for peer in range(comm.size) if peer != comm.rank]
    rounds = []
    for i in range(40):
        into = [(peer, torch.empty(7000)) for peer in peers]
        rounds.append((comm.exchange([(p, message(comm.rank, p, i, 7000)) for p in peers], into), into))
    for i, (pending, into) in enumerate(rounds):
        pending.wait()
        assert all(torch.equal(tensor, message(peer, comm.rank, i, 7000)) for peer, tensor in into), (comm.rank, i)


CHECKS: list[Callable[[Communicator], None]] = [
    check_many_outstanding_messages_arrive_in_order,
    check_several_messages_for_one_peer_in_one_call_keep_their_order,
    check_messages_without_elements_are_not_sent,
    check_a_sent_tensor_may_be_written_after_wait,
]


def on_threads(comms: list[Communicator], work: Callable[[Communicator], object]) -> list[object]:
    with ThreadPoolExecutor(len(comms)) as pool:
        return [future.result() for future in [pool.submit(work, comm) for comm in comms]]


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_threads_keep_the_contract(check, size):
    on_threads(thread_group(size, timeout_s=20), check)


def test_a_group_of_one_thread_has_nobody_to_wait_for():
    (comm,) = thread_group(1)
    comm.exchange([], []).wait()
    assert (comm.rank, comm.size) == (0, 1)
    comm.close()


def test_a_thread_that_sends_too_few_elements_is_an_error_that_names_both_ranks():
    left, right = thread_group(2, timeout_s=5)
    right.exchange([(0, torch.zeros(3))], []).wait()
    with pytest.raises(CommunicationError, match=r"rank 0: rank 1 sent 3 torch.float32, expected 4 torch.float32"):
        left.exchange([], [(1, torch.empty(4))]).wait()


def test_a_thread_that_sends_another_dtype_is_an_error_that_names_both_ranks():
    left, right = thread_group(2, timeout_s=5)
    right.exchange([(0, torch.zeros(4, dtype=torch.bfloat16))], []).wait()
    with pytest.raises(CommunicationError, match=r"rank 0: rank 1 sent 4 torch.bfloat16, expected 4 torch.float32"):
        left.exchange([], [(1, torch.empty(4))]).wait()


def test_a_silent_thread_is_an_error_within_the_deadline_that_names_both_ranks():
    comms = thread_group(3, timeout_s=0.2)
    start = time.monotonic()
    with pytest.raises(CommunicationError, match=r"rank 2: nothing from rank 1 within 0.2 s \(receive of 6 elements\)"):
        comms[2].exchange([], [(1, torch.empty(2, 3))]).wait()
    assert 0.2 <= time.monotonic() - start < 5


def test_a_receiving_thread_is_woken_by_a_late_sender():
    left, right = thread_group(2, timeout_s=20)
    into = torch.empty(1)
    timer = threading.Timer(0.1, lambda: right.exchange([(0, torch.ones(1))], []).wait())
    timer.start()
    left.exchange([], [(1, into)]).wait()
    timer.join()
    assert into.item() == 1


# -- recording ---------------------------------------------------------------------------------------------------------


def test_the_recorder_counts_what_is_sent_and_changes_nothing():
    comms = [RecordingCommunicator(comm) for comm in thread_group(2, timeout_s=20)]

    def work(comm: RecordingCommunicator) -> torch.Tensor:
        into = torch.empty(3, dtype=torch.bfloat16)
        peer = 1 - comm.rank
        comm.exchange([(peer, torch.full((3,), comm.rank + 1.0, dtype=torch.bfloat16))], [(peer, into)]).wait()
        comm.exchange([(peer, torch.empty(0)), (peer, torch.zeros(2, 2, dtype=torch.float64))], []).wait()
        return into

    received = on_threads(comms, work)
    assert [tensor.tolist() for tensor in received] == [[2.0] * 3, [1.0] * 3]
    for rank, comm in enumerate(comms):
        assert (comm.rank, comm.size) == (rank, 2)
        assert (comm.num_exchanges, comm.messages_sent, comm.bytes_sent) == (2, 2, 3 * 2 + 4 * 8)


def test_the_recorder_counts_an_exchange_that_fails_later():
    left, _ = thread_group(2, timeout_s=0.05)
    comm = RecordingCommunicator(left)
    with pytest.raises(CommunicationError):
        comm.exchange([(1, torch.zeros(5))], [(1, torch.empty(1))]).wait()
    assert (comm.num_exchanges, comm.messages_sent, comm.bytes_sent) == (1, 1, 20)


# -- processes ---------------------------------------------------------------------------------------------------------


KEY = b"k" * 32


def pretend_host(name: str) -> None:
    """Pretend that a process is on another host: only ranks 0 and 1, 2 and 3, ... reach each other's Unix sockets."""
    connect.own_host_id = lambda: name


def join(kind: str, rank: int, size: int, directory: str, timeout_s: float) -> Communicator:
    if kind == "sockets":
        return SocketCommunicator(rank, size, local_meeting(Path(directory)), timeout_s=timeout_s)
    if kind == "hosts":
        pretend_host(f"host-{rank // 2}")
        meeting = Meeting(f"file://{directory}/meet", None, "127.0.0.1", KEY)
        return SocketCommunicator(rank, size, meeting, timeout_s=timeout_s)
    if kind == "batches":  # as over NCCL, which needs GPUs
        cpu = torch.device("cpu")
        return NCCLCommunicator(rank, size, f"file://{directory}/meet", cpu, timeout_s=timeout_s, backend="gloo")
    return DistributedCommunicator(rank, size, f"file://{directory}/meet", timeout_s=timeout_s)


def rank_main(kind: str, what: str, rank: int, size: int, directory: str, timeout_s: float) -> None:
    """What a rank's process does; it exits with 0 if all is as expected."""
    if what == "alone":
        distributed.JOIN_TIMEOUT_S = timeout_s
        with pytest.raises(CommunicationError, match=f"rank {rank}: could not join the group of {size}"):
            join(kind, rank, size, directory, timeout_s)
        os._exit(0)
    comm = join(kind, rank, size, directory, timeout_s)
    if what == "contract":
        for check in [*CHECKS, *([check_more_than_a_socket_holds] if kind != "distributed" else [])]:
            check(comm)
        comm.close()
        return
    into = torch.empty(8)
    comm.exchange([((rank + 1) % size, torch.ones(8))], [((rank - 1) % size, into)]).wait()
    assert into.eq(1).all()
    if rank == size - 1:
        if what == "dies":
            os._exit(0)
        time.sleep(3600)  # "hangs": the test kills it
    started = time.monotonic()
    num_elements = 10 if kind != "distributed" else 1_000_000  # the way of large messages is the same for both
    try:
        comm.exchange([], [(size - 1, torch.empty(num_elements))]).wait()
    except CommunicationError as error:
        message = str(error)
        pattern = rf"rank {rank}: receive (of 1000000 elements )?from rank {size - 1} failed"
        assert re.match(pattern, message), message
        waited_s = time.monotonic() - started
        # A dead peer shows at once, a silent one at the deadline.
        assert waited_s < 30 if what == "dies" else timeout_s * 0.5 <= waited_s < timeout_s + 30, waited_s
        os._exit(0)
    raise AssertionError(f"rank {rank}: a peer that {what} went unnoticed")


def start_ranks(
    kind: str, what: str, size: int, tmp_path: Path, timeout_s: float, only: Sequence[int] | None = None
) -> list[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return [
        subprocess.Popen(
            [sys.executable, __file__, kind, what, str(rank), str(size), str(tmp_path), str(timeout_s)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (range(size) if only is None else only)
    ]


def assert_all_succeed(ranks: list[subprocess.Popen[str]]) -> None:
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    report = "\n".join(f"-- rank {rank}\n{output}" for rank, output in enumerate(outputs))
    assert [process.returncode for process in ranks] == [0] * len(ranks), report


KINDS = pytest.mark.parametrize("kind", ["distributed", "sockets", "hosts"])


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["distributed", "sockets", "hosts", "batches"])
@pytest.mark.parametrize("size", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_processes_keep_the_contract(size, kind, tmp_path):
    assert_all_succeed(start_ranks(kind, "contract", size, tmp_path, 60.0))


def test_a_wait_on_a_gpu_gives_no_deadline():
    """With one, PyTorch would poll until all has arrived: an exchange could be in no CUDA graph."""
    asked = []

    class Work:
        def wait(self, *args, **kwargs):
            asked.append((args, kwargs))

    _PendingBatch(0, [Work(), Work()]).wait()
    assert asked == [((), {})] * 2


def test_exchanges_over_nccl_go_before_kernels(monkeypatch):
    """Its stream has high priority: a hop of a ring would else wait for an attention kernel that fills the GPU."""
    given = []

    class ProcessGroupNCCL:  # this build of PyTorch may have none
        Options = SimpleNamespace

    class StopError(RuntimeError):
        pass

    def init(backend, **options):
        given.append((backend, options["pg_options"], options["timeout"]))
        raise StopError

    monkeypatch.setattr(dist, "ProcessGroupNCCL", ProcessGroupNCCL, raising=False)
    monkeypatch.setattr(dist, "init_process_group", init)
    store = SimpleNamespace(set_timeout=lambda timeout: None)
    monkeypatch.setattr(distributed, "rendezvous", lambda *args, **kwargs: iter([(store, 0, 2)]))
    with pytest.raises(CommunicationError):
        NCCLCommunicator(0, 2, "file:///nowhere", torch.device("cuda", 0), timeout_s=7.0)
    ((backend, options, timeout),) = given
    assert backend == "nccl"
    assert options.is_high_priority_stream
    assert options._timeout == timeout


@pytest.mark.processes
@KINDS
def test_a_dead_process_is_an_error_that_names_both_ranks(kind, tmp_path):
    """At once: the deadline is two minutes away."""
    assert_all_succeed(start_ranks(kind, "dies", 3, tmp_path, 120.0))


@pytest.mark.processes
@KINDS
def test_a_silent_process_is_an_error_within_the_deadline_that_names_both_ranks(kind, tmp_path):
    *waiting, silent = start_ranks(kind, "hangs", 2, tmp_path, 4.0)
    try:
        assert_all_succeed(waiting)
        assert silent.poll() is None
    finally:
        silent.kill()
        silent.communicate()


@pytest.mark.processes
@KINDS
def test_a_rank_that_never_comes_is_an_error_that_names_the_group(kind, tmp_path):
    assert_all_succeed(start_ranks(kind, "alone", 2, tmp_path, 2.0, only=[0]))


if __name__ == "__main__":
    rank_main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], float(sys.argv[6]))
