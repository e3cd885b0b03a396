"""Ranks that are lost are replaced: nothing of any request is lost, repeated or wrong, and somebody is to blame."""

import json
import os
import random
import signal
import threading
import time
from concurrent.futures import wait

import httpx
import pytest
import torch
from fake_ranks import FakeRanks, assert_all_free, make_config, make_model, make_scheduler
from process_tree import is_alive, parents_of_ranks, ranks
from served_command import FACT, FILLER, QUESTION, command

from longspan import LLM, SamplingParams
from longspan.config import EngineConfig
from longspan.engine import engine, processes
from longspan.engine.recovery import POISON_CRASHES, Restarts, fail_poison, fewer_ranks
from longspan.errors import CapacityError, ConfigError, LongspanError, WorkerError
from longspan.group import heartbeat
from longspan.group.shape import ProcessId
from longspan.models.inspect import inspect_model
from longspan.models.loader import load_config
from longspan.types import FinishReason
from longspan.worker.fault import VARIABLE, read_fault

# -- who is to blame ---------------------------------------------------------------------------------------------------


def test_a_request_with_which_the_ranks_are_lost_again_and_again_is_failed_alone():
    fake = FakeRanks(make_scheduler(make_model(None), make_config(2), 400), random.Random(0))
    scheduler = fake.scheduler
    poison = scheduler.add_request([7] * 9, SamplingParams(max_tokens=5, seed=0, ignore_eos=True))
    others = [scheduler.add_request([i] * 9, SamplingParams(max_tokens=5, ignore_eos=True, seed=i)) for i in range(6)]
    crashes = 0
    while poison.finish_reason is None:
        fake.submit_all()
        if any(run.request_id == poison.request_id for plan in fake.in_flight.values() for run in plan.query_runs):
            fake.crash()
            crashes += 1
            ended = fail_poison(scheduler, WorkerError("rank 1 was killed"))
            assert ended == ([poison] if crashes == POISON_CRASHES else [])
        else:
            fake.complete(fake.rng.choice(fake.first_plans()))
    assert crashes == POISON_CRASHES
    assert poison.finish_reason is FinishReason.ERROR
    assert "rank 1 was killed" in poison.error
    fake.run_to_the_end()
    assert [len(request.output_token_ids) for request in others] == [5] * 6
    assert_all_free(scheduler)


def test_a_request_that_gets_further_each_time_is_not_to_blame():
    fake = FakeRanks(make_scheduler(make_model(None), make_config(1), 400), random.Random(0))
    request = fake.scheduler.add_request([7] * 9, SamplingParams(max_tokens=9, seed=0, ignore_eos=True))
    for _ in range(6):
        known = request.num_generated
        while request.num_generated == known:
            fake.step()
        fake.submit_all()
        fake.crash()
        assert not fail_poison(fake.scheduler, WorkerError("killed"))
    fake.run_to_the_end()
    assert len(request.output_token_ids) == 9


def test_a_budget_of_restarts_ends():
    restarts = Restarts(2)
    restarts.take(WorkerError("one"))
    restarts.take(WorkerError("two"))
    with pytest.raises(WorkerError, match=r"^three; the ranks were started again 2 times within 600 s"):
        restarts.take(WorkerError("three"))


@pytest.mark.parametrize(
    ("most", "cause"), [(0, WorkerError("killed")), (5, ConfigError("illegal")), (5, RuntimeError("a bug"))]
)
def test_what_a_restart_does_not_help_is_raised(most, cause):
    with pytest.raises(type(cause), match=str(cause)):
        Restarts(most).take(cause)


def test_nodes_are_counted_without_gaps_again():
    config = EngineConfig(model="recall", context_parallel_size=4, nodes=(0, 2, 2, 1), max_restarts=1, min_ranks=2)
    fewer = fewer_ranks(config)
    assert (fewer.context_parallel_size, fewer.nodes) == (3, (0, 1, 1))
    fewest = fewer_ranks(fewer)
    assert (fewest.context_parallel_size, fewest.nodes) == (2, (0, 1))
    assert fewer_ranks(fewest) is None


@pytest.mark.parametrize(
    "options",
    [
        {"min_ranks": 3, "max_restarts": 1},
        {"min_ranks": 0, "max_restarts": 1},
        {"min_ranks": 1},
        {"min_ranks": 1, "max_restarts": 1, "executor": "external", "listen": "127.0.0.1:7071"},
        {"min_ranks": 1, "max_restarts": 1, "topology": "file.yaml"},
    ],
)
def test_rejects_a_fewest_number_of_ranks_that_could_not_be(options):
    with pytest.raises(ConfigError, match="min_ranks: got"):
        EngineConfig(model="recall", context_parallel_size=2, **options)


@pytest.mark.parametrize("value", [-1, 1.5, "x", True])
def test_rejects_counts_of_plans_between_checks(value):
    with pytest.raises(ConfigError, match="check_invariants: got"):
        EngineConfig(model="recall", check_invariants=value)


def test_a_broken_book_ends_the_engine(cache_home, monkeypatch):
    def broken(scheduler):
        raise AssertionError("owners and references differ")

    with LLM("recall", executor="threads", check_invariants=1) as llm:
        assert llm.generate("ab", SamplingParams(max_tokens=2))
        monkeypatch.setattr(engine, "check_books", broken)
        for _ in range(2):  # it stays so
            with pytest.raises(AssertionError, match="owners and references differ"):
                llm.generate("ab", SamplingParams(max_tokens=2))


def test_a_machine_that_is_short_of_something_is_no_bug(cache_home, tmp_path, monkeypatch):
    def popen(*arguments, **options):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(processes.subprocess, "Popen", popen)
    with pytest.raises(WorkerError, match="Cannot allocate memory"):
        LLM("recall")
    assert list(tmp_path.glob("longspan-*")) == []


@pytest.mark.parametrize("text", ["rank=1", "rank=x,plan=1,kind=die", "rank=1,plan=1,kind=explode", "a=1", "rank"])
def test_rejects_faults_that_are_none(text):
    with pytest.raises(ConfigError, match=VARIABLE):
        read_fault({VARIABLE: text}, ProcessId(1, 0), 0)


def test_a_fault_is_for_one_rank_and_perhaps_one_generation():
    environment = {VARIABLE: "rank=1,plan=5,layer=2,kind=die,generation=0"}
    fault = read_fault(environment, ProcessId(1, 0), 0)
    assert (fault.rank, fault.plan, fault.layer, fault.kind) == (1, 5, 2, "die")
    assert read_fault(environment, ProcessId(0, 0), 0) is None
    assert read_fault(environment, ProcessId(1, 0), 1) is None
    assert read_fault({}, ProcessId(1, 0), 0) is None


# -- real processes ----------------------------------------------------------------------------------------------------

RANKS = {
    "context_parallel_size": 2,
    "placement": "striped",
    "page_size": 16,
    "stripe_size": 64,
    "threads_per_rank": 1,
    "check_invariants": 1,
}
PROMPTS = [FILLER[:1500] + FACT + FILLER[1500:3000] + QUESTION, FILLER[3000:4000]]
PARAMS = [SamplingParams(max_tokens=40), SamplingParams(max_tokens=60, temperature=1.0, seed=5)]


def tokens_of(llm, **options):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, **options)]


@pytest.fixture(scope="module")
def wanted(cache_home):
    with LLM("recall", **RANKS) as llm:
        return tokens_of(llm)


@pytest.mark.processes
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_ranks_that_are_killed_are_replaced_and_tokens_are_the_same(wanted, rank):
    """In prefill, twice in decode, and while nothing runs."""
    killed = set()

    def kill(progress):
        moment = (progress.generated_tokens > 2) + (progress.generated_tokens > 20)
        if progress.request_idx == 1 and moment not in killed:
            killed.add(moment)
            os.kill(ranks(os.getpid())[rank], signal.SIGKILL)

    with LLM("recall", **RANKS, max_restarts=4, max_num_batched_tokens=256) as llm:
        assert tokens_of(llm, on_progress=kill) == wanted
        assert len(killed) == 3
        os.kill(ranks(os.getpid())[rank], signal.SIGKILL)
        time.sleep(0.3)
        assert tokens_of(llm) == wanted
        assert llm.engine.restarts.num_done >= 3
    assert not ranks(os.getpid())


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["raise", pytest.param("die", marks=pytest.mark.slow)])
def test_a_rank_that_fails_within_a_layer_is_replaced(wanted, kind, monkeypatch):
    monkeypatch.setenv(VARIABLE, f"rank=1,plan=3,layer=1,kind={kind},generation=0")
    with LLM("recall", **RANKS, max_restarts=1, max_num_batched_tokens=256) as llm:
        assert tokens_of(llm) == wanted
        assert llm.engine.restarts.num_done == 1


@pytest.mark.slow
@pytest.mark.processes
def test_new_ranks_need_no_imports(wanted):
    """They come from the process that the lost ones came from; if it is lost too, from a new one."""
    with LLM("recall", **RANKS, max_restarts=2) as llm:
        (parent,) = parents_of_ranks(os.getpid())
        os.kill(ranks(os.getpid())[0], signal.SIGKILL)
        assert tokens_of(llm) == wanted
        assert parents_of_ranks(os.getpid()) == [parent]
        os.kill(parent, signal.SIGKILL)
        assert tokens_of(llm) == wanted
        assert len(parents_of_ranks(os.getpid())) == 1
        assert llm.engine.restarts.num_done == 2


@pytest.mark.processes
@pytest.mark.parametrize(
    ("num_ranks", "how"),
    [
        (2, "stopped"),
        *(pytest.param(n, how, marks=pytest.mark.slow) for n, how in [(1, "stopped"), (1, "hangs"), (2, "hangs")]),
    ],
)
def test_ranks_of_which_one_is_stopped_or_hangs_are_replaced(wanted, num_ranks, how, monkeypatch):
    """With a peer that waits for it, and without."""
    monkeypatch.setattr(heartbeat, "MARGIN_S", 0.5)
    if how == "hangs":
        monkeypatch.setenv(VARIABLE, f"rank={num_ranks - 1},plan=3,layer=1,kind=stall,generation=0")
    stopped = []

    def stop(progress):
        if progress.generated_tokens > 2 and how == "stopped" and not stopped:
            stopped.append(ranks(os.getpid())[-1])
            os.kill(stopped[0], signal.SIGSTOP)

    options = {**RANKS, "context_parallel_size": num_ranks, "max_num_batched_tokens": 256, "exchange_timeout_s": 2.0}
    with LLM("recall", **options, max_restarts=1) as llm:
        assert tokens_of(llm, on_progress=stop) == wanted
        assert llm.engine.restarts.num_done == 1
    assert not any(is_alive(pid) for pid in stopped)


@pytest.mark.processes
def test_a_damaged_message_counts_as_a_loss_of_the_ranks(wanted, monkeypatch, caplog):
    monkeypatch.setenv(VARIABLE, "rank=1,plan=3,layer=1,kind=corrupt,generation=0")
    with LLM("recall", **RANKS, max_restarts=1, max_num_batched_tokens=256, check_messages=True) as llm:
        assert tokens_of(llm) == wanted
        assert llm.engine.restarts.num_done == 1
    assert "was damaged on the way" in caplog.text


@pytest.mark.slow
@pytest.mark.processes
def test_a_start_that_fails_once_is_tried_again(wanted, monkeypatch):
    monkeypatch.setenv(VARIABLE, "rank=1,plan=-1,kind=die,generation=1")
    with LLM("recall", **RANKS, max_restarts=2) as llm:
        os.kill(ranks(os.getpid())[0], signal.SIGKILL)
        assert tokens_of(llm) == wanted
        assert len(ranks(os.getpid())) == 2


@pytest.mark.slow
@pytest.mark.processes
def test_a_first_start_that_fails_is_tried_again_with_as_many_ranks(wanted, monkeypatch):
    monkeypatch.setenv(VARIABLE, "rank=1,plan=-1,kind=die,generation=0")
    with pytest.raises(WorkerError, match=r"rank 1 .* was killed by SIGKILL$"):
        LLM("recall", **RANKS)
    with LLM("recall", **RANKS, max_restarts=1) as llm:
        assert tokens_of(llm) == wanted
    monkeypatch.setenv(VARIABLE, "rank=1,plan=-1,kind=raise")
    with pytest.raises(WorkerError, match=r"rank 1: .*injected.*; the ranks were started again 3 times"):
        LLM("recall", **RANKS, max_restarts=3)
    assert not ranks(os.getpid())


@pytest.mark.processes
def test_fewer_ranks_go_on_where_one_cannot_be_started_any_more(wanted, monkeypatch):
    """With the requests that they can hold; the others are told."""
    monkeypatch.setenv(VARIABLE, "rank=1,plan=-1,kind=raise,since=1")
    memory = 2700 * sum(
        group.token_bytes for group in inspect_model(load_config("recall")[0], None, torch.float32).kv_groups
    )
    with LLM("recall", **RANKS, max_restarts=3, kv_cache_memory=memory) as llm:
        killed = []

        def kill(progress):
            if not killed and progress.generated_tokens:
                killed.append(ranks(os.getpid())[0])
                os.kill(killed[0], signal.SIGKILL)

        outputs = llm.generate([*PROMPTS, FILLER[:6000]], [*PARAMS, SamplingParams(max_tokens=30)], on_progress=kill)
        assert [output.outputs[0].token_ids for output in outputs[:2]] == wanted
        assert outputs[2].outputs[0].finish_reason is FinishReason.ERROR
        assert "ranks were lost and cannot be started again" in outputs[2].outputs[0].error
        assert "legal is at most" in outputs[2].outputs[0].error
        assert len(ranks(os.getpid())) == 1
        assert tokens_of(llm) == wanted
        with pytest.raises(CapacityError, match="1 rank x"):
            llm.generate(FILLER[:6000])


@pytest.mark.slow
@pytest.mark.processes
def test_who_gives_up_does_not_wait_for_new_ranks(cache_home, monkeypatch):
    monkeypatch.setenv(VARIABLE, "rank=1,plan=-1,kind=stall,since=1")
    with LLM("recall", **RANKS, max_restarts=3) as llm:
        os.kill(ranks(os.getpid())[0], signal.SIGKILL)
        threading.Timer(1.0, llm.engine.give_up).start()
        started = time.monotonic()
        with pytest.raises(LongspanError, match="the engine is closed"):
            tokens_of(llm)
        assert time.monotonic() - started < 10
    assert not ranks(os.getpid())


@pytest.mark.slow
@pytest.mark.processes
def test_text_ends_at_a_stop_string_whatever_was_done_before_a_loss(cache_home, monkeypatch):
    """Two plans may be done when the ranks are lost, one behind the other: the second one's token is behind the end."""
    stop = SamplingParams(max_tokens=40, stop=("4711",))
    with LLM("recall", **RANKS, max_restarts=1) as llm:
        running, submit_plans = llm.engine, llm.engine.submit_plans

        def submit_and_lose():
            submit_plans()
            generated = [request.num_generated for request in running.scheduler.running]
            if generated == [3] and len(running.in_flight) == 2 and not running.restarts.num_done:
                wait(running.in_flight, timeout=20)
                os.kill(ranks(os.getpid())[0], signal.SIGKILL)
                while running.failure is None:
                    time.sleep(0.01)

        monkeypatch.setattr(running, "submit_plans", submit_and_lose)
        (output,) = llm.generate(PROMPTS[:1], stop)
        assert output.outputs[0].text == ""
        assert len(output.outputs[0].token_ids) == 4
        assert running.failure is not None, "which the next call mends"
        assert llm.generate(PROMPTS[:1], stop)[0].outputs[0].token_ids == output.outputs[0].token_ids
        assert running.restarts.num_done == 1


@pytest.mark.slow
@pytest.mark.processes
def test_too_few_ranks_are_none(cache_home, monkeypatch):
    monkeypatch.setenv(VARIABLE, "rank=1,plan=-1,kind=raise,since=1")
    with LLM("recall", **RANKS, max_restarts=3, min_ranks=2) as llm:
        os.kill(ranks(os.getpid())[0], signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"rank 1: .*injected.*; the ranks were started again 3 times"):
            tokens_of(llm)


@pytest.mark.processes
def test_a_request_that_kills_the_ranks_every_time_is_told_why(cache_home, monkeypatch):
    monkeypatch.setenv(VARIABLE, "rank=0,plan=0,layer=0,kind=raise")
    with LLM("recall", **RANKS, max_restarts=9) as llm:
        (output,) = llm.generate(PROMPTS[:1], PARAMS[:1])
        assert output.outputs[0].finish_reason is FinishReason.ERROR
        assert f"lost {POISON_CRASHES} times in a row" in output.outputs[0].error
        assert output.ttft_s is None


@pytest.mark.processes
def test_without_restarts_the_first_loss_is_the_last(cache_home, monkeypatch):
    monkeypatch.setenv(VARIABLE, "rank=0,plan=0,layer=0,kind=die")
    with LLM("recall", **RANKS) as llm, pytest.raises(WorkerError, match="rank 0"):
        llm.generate(PROMPTS[:1], PARAMS[:1])


@pytest.mark.slow
@pytest.mark.processes
def test_a_server_whose_rank_is_killed_pauses_and_goes_on(cache_home):
    body = {"model": "recall", "prompt": FILLER[:2000], "max_tokens": 150, "temperature": 1, "seed": 3, "stream": True}

    def stream(url, heard=lambda: None):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            assert answer.status_code == 200
            lines = []
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    lines.append(line)
                    heard()
        assert lines[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)  # two tokens may share a chunk

    with command("--context-parallel-size", "2", "--placement", "striped", "--stripe-size", "64") as server:
        right = stream(server.url)
        heard, killed, statuses = [], threading.Event(), []

        def kill_once():
            heard.append(1)
            if len(heard) == 30:
                os.kill(server.workers()[1], signal.SIGKILL)
                killed.set()

        def watch():
            assert killed.wait(60)
            while not statuses or statuses[-1] != 200 or 503 not in statuses:
                statuses.append(httpx.get(f"{server.url}/health", timeout=10).status_code)
                time.sleep(0.01)

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        assert stream(server.url, kill_once) == right
        watching.join(timeout=10)
        assert statuses[-1] == 200
        assert 503 in statuses
        metrics = httpx.get(f"{server.url}/metrics").text
        (count,) = [line for line in metrics.splitlines() if line.startswith("longspan:restarts_total")]
        assert count.endswith(" 1.0")
        assert "new ranks are ready" in server.said()
        assert server.end() == 0
