"""A group of two ranks of two processes each: when it is ready, what they are told, which answers, which is missed.

The processes are threads that say what a worker says; the executor and its watch are the real ones.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from links import SECRET

from longspan.config import EngineConfig
from longspan.engine.workers import WorkerExecutor
from longspan.errors import WorkerError
from longspan.group.messages import Answer, Failed, Hello, Ready, Start, Stop
from longspan.group.plans import PlanReceiver
from longspan.group.shape import GroupShape, ProcessId
from longspan.group.versions import own_versions
from longspan.group.worker_link import WorkerLink
from longspan.plan.build import count_tokens
from longspan.plan.types import GroupStep, Plan, QueryRun, RankResult, SampledBy
from longspan.types import ModelSpec, Phase, Strategy

SHAPE = GroupShape(num_ranks=2, processes_per_rank=2)
START = Start(
    EngineConfig(model="fake", context_parallel_size=2, connect_timeout_s=20.0),
    ModelSpec("fake", 1, 50, None, (), (), ()),
    ((), ()),
    None,
)


class FakeWorker:
    """What a worker says and hears."""

    def __init__(self, address, number):
        self.process = SHAPE.process(number)
        self.link = WorkerLink(address, SECRET)
        hello = Hello(number, SHAPE.world_size, "here", number, own_versions(), 2**40)
        assert isinstance(self.link.introduce(hello, 20.0), Start)

    def say(self, message):
        self.link.send(message)

    def hear(self):
        return self.link.receive()


class FakeLauncher:
    """Starts such workers; the test makes them say that they are ready."""

    bind_address, secret, directory, is_remote = "tcp://127.0.0.1:*", SECRET, None, True

    def __init__(self):
        self.threads = ThreadPoolExecutor(SHAPE.world_size)
        self.workers, self.killed, self.started = [], False, threading.Event()

    def start(self, address, shape):
        assert shape == SHAPE
        self.workers = [self.threads.submit(FakeWorker, address, number) for number in range(shape.world_size)]
        self.started.set()

    def name(self, process):
        return None

    def ended(self, process):
        return None

    def kill(self):
        self.killed = True

    def release(self, patience_s):
        """They end with the test."""


@pytest.fixture
def launcher():
    made = FakeLauncher()
    yield made
    for worker in made.workers:
        worker.result().link.close(linger_ms=0)
    made.threads.shutdown()


@pytest.fixture
def group(launcher):
    """A group that is ready, and its workers by process."""
    found = ThreadPoolExecutor(1).submit(WorkerExecutor, START, SHAPE, launcher, threading.Event())
    assert launcher.started.wait(20.0)
    workers = [worker.result(20.0) for worker in launcher.workers]
    for worker in workers:
        assert not found.done(), "not before all are ready"
        worker.say(Ready(worker.process))
    executor = found.result(20.0)
    yield executor, {worker.process: worker for worker in workers}
    executor.close()


def a_plan(plan_id, *ranks):
    groups = (GroupStep(Strategy.LOCAL),)
    runs = (QueryRun(0, 5, 1, ranks[0], SampledBy(3)),)
    return Plan(plan_id, Phase.DECODE, ranks, count_tokens(ranks, runs), runs, (), groups, ())


def an_answer(plan_id, rank):
    return Answer(RankResult(plan_id, rank, (), (), 1, 1, step_s=0.0))


def test_every_process_of_a_rank_hears_its_plans_and_the_first_one_answers(group):
    executor, workers = group
    assert executor.hosts == ("here", "here"), "one per rank"
    done = executor.submit(a_plan(0, 1))
    for tp_index in (0, 1):
        assert PlanReceiver(1).take(workers[1, tp_index].hear()) == a_plan(0, 1)
    workers[1, 1].say(an_answer(0, 1))
    assert "Answer came from a worker that is not in this group" in workers[1, 1].hear().reason
    assert not done.done()
    workers[1, 0].say(an_answer(0, 1))
    assert done.result(20.0).ranks == (an_answer(0, 1).result,)
    executor.close()
    assert {type(worker.hear()) for worker in workers.values()} == {Stop}


def test_a_rank_is_lost_when_one_of_its_processes_is(group, launcher):
    executor, workers = group
    done = executor.submit(a_plan(0, 0, 1))
    workers[0, 0].say(an_answer(0, 0))
    workers[1, 0].say(an_answer(0, 1))
    done.result(20.0)
    waiting = executor.submit(a_plan(1, 0, 1))
    workers[0, 1].say(Failed(ProcessId(0, 1), "ValueError: y", "trace", "process"))
    with pytest.raises(WorkerError, match=r"^rank 0, process 1: ValueError: y; said by rank 0, process 1 \(pid 1 on h"):
        waiting.result(20.0)
    assert launcher.killed
    with pytest.raises(WorkerError, match="ValueError: y"):
        executor.submit(a_plan(2, 1)).result(20.0)


@pytest.mark.cover
def test_a_group_that_lacks_a_process_is_not_ready_and_names_it(launcher, monkeypatch):
    monkeypatch.setattr("longspan.engine.watch.LATECOMERS_S", 0.1)

    def start(address, shape):
        launcher.workers = [launcher.threads.submit(FakeWorker, address, number) for number in (0, 1, 2)]

    launcher.start = start
    start_message = Start(
        EngineConfig(model="fake", context_parallel_size=2, connect_timeout_s=1.0), START.spec, ((), ()), None
    )
    with pytest.raises(WorkerError, match=r"^rank 1, process 1 did not connect to tcp://\S+ within 1 s"):
        WorkerExecutor(start_message, SHAPE, launcher, threading.Event())
