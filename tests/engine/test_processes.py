"""Processes end when they must, say why, and leave nothing behind: no process, file, socket or descriptor."""

import argparse
import gc
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from process_tree import is_alive, parents_of_ranks, ranks

from longspan import LLM, ConfigError, LongspanError, SamplingParams, WorkerError
from longspan.engine.processes import worker_environment
from longspan.group import heartbeat
from longspan.plan.types import GroupStep, Plan, QueryRun, SampledBy
from longspan.types import Phase, Strategy

TEXT = Path(argparse.__file__).read_text()
FACT = "The magic number is 4711."
PROMPT = f"{TEXT[:700]}\n{FACT}\n{TEXT[700:1400]}\nThe magic number is "
TWO_RANKS = {"context_parallel_size": 2, "page_size": 16, "stripe_size": 64, "placement": "striped"}
# What the command does, with a line of progress after every step.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # the test itself may run in the background
import longspan.cli.progress
longspan.cli.progress.LINE_EVERY_S = 0
from longspan.cli.main import main
main()
"""
LONG_PREFILL = ("--max-num-batched-tokens", "256", "--max-tokens", "1")
LONG_DECODE = ("--max-tokens", "20000")
IN_TIME_S = 2.0
"""All processes are gone so soon after Ctrl-C."""

needs_processes = pytest.mark.processes


def wait_until(condition, timeout_s, what):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def leftovers(directory):
    return sorted(path.name for path in Path(directory).iterdir() if path.name.startswith("longspan-"))


def num_descriptors():
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


class Command:
    """`longspan generate recall` on two ranks, with a process group and a directory for temporary files of its own."""

    def __init__(self, directory, *options):
        self.directory = directory
        prompt = directory / "prompt.txt"
        prompt.write_text(TEXT * 2 if "--max-num-batched-tokens" in options else PROMPT)
        (directory / "tmp").mkdir()
        fields = (f"--{name.replace('_', '-')}={value}" for name, value in TWO_RANKS.items())
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "generate", "recall", "--prompt-file", str(prompt), *fields, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(directory / "tmp"), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        self.workers = []

    def wait_for(self, phase):
        """Return when libraries are imported for the ranks, when the ranks load, or a step of a phase is done."""
        if phase == "importing":
            wait_until(lambda: len(parents_of_ranks(self.process.pid)) == 1, 120, "a parent of ranks")
            self.workers = parents_of_ranks(self.process.pid)
            time.sleep(0.5)  # Python itself has started
            return
        if phase != "loading":
            for line in self.process.stderr:
                if line.startswith(phase):
                    break
            else:
                raise AssertionError(f"ended with {self.process.wait()} before {phase}")
        wait_until(lambda: len(ranks(self.process.pid)) == 2, 120, "two workers")
        self.workers = ranks(self.process.pid) + parents_of_ranks(self.process.pid)

    def end(self):
        """Returns exit code, standard output, and what standard error says beside progress."""
        out, err = self.process.communicate(timeout=60)
        lines = [line for line in err.splitlines() if not re.match(r"(prefill|decode): \d+/\d+ tokens", line)]
        return self.process.returncode, out, lines

    def assert_all_gone(self, since):
        wait_until(
            lambda: not any(map(is_alive, self.workers)), IN_TIME_S - (time.monotonic() - since), "no worker left"
        )
        wait_until(lambda: leftovers(self.directory / "tmp") == [], IN_TIME_S, "no temporary directory left")


@pytest.fixture
def command(cache_home):
    started = []

    def start(*options):
        started.append(Command(directory, *options))
        return started[-1]

    with tempfile.TemporaryDirectory() as name:  # sockets need short names
        directory = Path(name)
        yield start
    for one in started:
        for pid in (*one.workers, one.process.pid):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        one.process.communicate()


@pytest.fixture
def own_tmp(cache_home, monkeypatch):
    """A directory for the temporary files of the LLMs in this process."""
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.setattr("tempfile.tempdir", name)
        yield Path(name)


# -- the driver ends ---------------------------------------------------------------------------------------------------


@needs_processes
@pytest.mark.parametrize(
    ("phase", "number", "to_group", "code"),
    [
        pytest.param("importing", signal.SIGINT, True, 130, marks=pytest.mark.slow),
        pytest.param("loading", signal.SIGINT, True, 130, marks=pytest.mark.slow),
        ("prefill", signal.SIGINT, False, 130),
        ("decode", signal.SIGINT, True, 130),
        ("decode", signal.SIGTERM, False, 143),
    ],
    ids=[
        "ctrl_c_while_importing",
        "ctrl_c_while_loading",
        "interrupt_in_prefill",
        "ctrl_c_in_decode",
        "terminate_in_decode",
    ],
)
def test_a_signal_ends_all_processes_in_time(command, phase, number, to_group, code):
    running = command(*(LONG_DECODE if phase == "decode" else LONG_PREFILL))
    running.wait_for(phase)
    since = time.monotonic()
    (os.killpg if to_group else os.kill)(running.process.pid, number)
    running.process.wait(timeout=IN_TIME_S)
    running.assert_all_gone(since)
    ended, text, messages = running.end()
    assert (ended, messages) == (code, ["longspan: interrupted"] if number == signal.SIGINT else [])
    assert phase == "decode" or not text  # the text of a decode comes as it is generated


@needs_processes
@pytest.mark.parametrize(
    "phase", ["prefill", *(pytest.param(p, marks=pytest.mark.slow) for p in ("importing", "loading"))]
)
def test_workers_do_not_outlive_a_driver_that_was_killed(command, phase):
    running = command(*LONG_PREFILL)
    running.wait_for(phase)
    since = time.monotonic()
    os.kill(running.process.pid, signal.SIGKILL)
    running.assert_all_gone(since)


@needs_processes
def test_workers_do_not_outlive_a_driver_that_was_killed_and_had_forked(cache_home, tmp_path):
    """The fork holds all that the driver had open, and lives on."""
    script = """
import os, time
from longspan import LLM
llm = LLM("recall", context_parallel_size=2)
if forked := os.fork():
    print(forked, flush=True)
time.sleep(60)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    forked = int(driver.stdout.readline())
    running = ranks(driver.pid) + parents_of_ranks(driver.pid)
    try:
        assert len(running) == 3
        driver.kill()
        wait_until(lambda: not any(map(is_alive, running)), IN_TIME_S, "no worker left")
        wait_until(lambda: leftovers(tmp_path) == [], IN_TIME_S, "no temporary directory left")
    finally:
        os.kill(forked, signal.SIGKILL)
        driver.kill()
        driver.communicate()


@pytest.mark.slow
@needs_processes
def test_a_script_that_forgets_to_close_ends_by_itself(cache_home, tmp_path):
    script = "from longspan import LLM; llm = LLM('recall'); print(llm.generate('ab')[0].outputs[0].token_ids != [])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
    wait_until(lambda: leftovers(tmp_path) == [], IN_TIME_S, "no temporary directory left")


# -- a worker ends -----------------------------------------------------------------------------------------------------


@needs_processes
def test_the_command_names_the_rank_that_was_killed(command):
    running = command(*LONG_PREFILL)
    running.wait_for("prefill")
    os.kill(running.workers[1], signal.SIGKILL)
    code, out, err = running.end()
    assert (code, out) == (1, "")
    assert err == [f"longspan: rank 1 (pid {running.workers[1]}) was killed by SIGKILL"]
    running.assert_all_gone(time.monotonic())


@needs_processes
def test_a_worker_killed_while_it_starts_fails_the_llm(own_tmp):
    before = num_descriptors()
    killed = []

    def kill():
        wait_until(lambda: ranks(os.getpid()), 60, "a worker")
        killed.append(ranks(os.getpid())[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(WorkerError) as caught:
        LLM("recall", **TWO_RANKS)
    killer.join()
    assert str(caught.value) == f"rank 0 (pid {killed[0]}) was killed by SIGKILL"
    assert ranks(os.getpid()) == []
    assert leftovers(own_tmp) == []
    assert num_descriptors() <= before


@needs_processes
def test_what_is_refused_after_ranks_began_to_start_leaves_nothing_behind(own_tmp):
    before = num_descriptors()
    with pytest.raises(ConfigError, match="legal is a model directory"):
        LLM("./nothing", **TWO_RANKS)
    assert parents_of_ranks(os.getpid()) == []
    assert leftovers(own_tmp) == []
    assert num_descriptors() <= before


@needs_processes
def test_ranks_end_with_the_process_that_forked_them(own_tmp):
    def kill():
        wait_until(lambda: parents_of_ranks(os.getpid()), 60, "a parent of ranks")
        os.kill(*parents_of_ranks(os.getpid()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(WorkerError, match=r"^rank 0 was killed by SIGKILL$"):
        LLM("recall", **TWO_RANKS)
    killer.join()

    with LLM("recall", **TWO_RANKS) as llm:
        running = ranks(os.getpid())
        os.kill(*parents_of_ranks(os.getpid()), signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, running)), IN_TIME_S, "no worker left")
        with pytest.raises(WorkerError, match=rf"^rank 0 \(pid {running[0]}\) was killed by SIGKILL$"):
            llm.generate(PROMPT)
    assert leftovers(own_tmp) == []


@pytest.mark.cover
def test_what_ranks_import_starts_no_thread():
    """Only the thread that forks lives on in a rank."""
    script = "import os, longspan.worker.serve; print(len(os.listdir('/proc/self/task')))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=worker_environment(num_threads=4),
    )
    assert done.stdout == "1\n"


@needs_processes
def test_a_worker_killed_while_idle_or_in_decode_fails_what_runs_and_all_that_follows(own_tmp):
    with LLM("recall", **TWO_RANKS) as llm:
        assert llm.generate(PROMPT, SamplingParams(max_tokens=5))[0].outputs[0].text == "4711."
        _, pid = ranks(os.getpid())

        def kill(progress):
            if progress.generated_tokens == 3:
                os.kill(pid, signal.SIGKILL)

        with pytest.raises(WorkerError, match=rf"^rank 1 \(pid {pid}\) was killed by SIGKILL$"):
            llm.generate(PROMPT, SamplingParams(max_tokens=500), on_progress=kill)
        # The other rank is of no use without it, and does not stay behind.
        wait_until(lambda: ranks(os.getpid()) == [], IN_TIME_S, "no worker left")
        with pytest.raises(WorkerError, match="was killed by SIGKILL"):
            llm.generate(PROMPT)
    assert leftovers(own_tmp) == []

    with LLM("recall") as llm:
        (pid,) = ranks(os.getpid())
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: ranks(os.getpid()) == [], IN_TIME_S, "no worker left")
        with pytest.raises(WorkerError, match=rf"^rank 0 \(pid {pid}\) was killed by SIGTERM$"):
            llm.generate(PROMPT)


@needs_processes
def test_a_worker_that_raises_ends_the_run_with_its_rank_and_reason(own_tmp):
    with LLM("recall", **TWO_RANKS) as llm:
        groups = tuple(GroupStep(Strategy.LOCAL) for _ in llm.engine.spec.kv_groups)
        plan = Plan(7, Phase.DECODE, (1,), (1,), (QueryRun(0, 5, 1, 1, SampledBy(3)),), (), groups, ())
        with pytest.raises(WorkerError) as caught:
            llm.engine.executor.submit(plan).result(timeout=60)
        said = "plan 7: needs 1 tokens of plan 3, rank 1 has sampled for plan -1 last"
        assert str(caught.value) == f"rank 1: {said} in plan 7 (decode)"
        assert "Traceback" in caught.value.__notes__[0]


@needs_processes
def test_a_stopped_rank_is_named_by_the_peer_that_waits_for_it(own_tmp):
    with LLM("recall", **TWO_RANKS, exchange_timeout_s=2.0) as llm:
        pid = ranks(os.getpid())[1]

        def stop(progress):
            if progress.generated_tokens == 2:
                os.kill(pid, signal.SIGSTOP)

        with pytest.raises(WorkerError, match=r"^rank 0: .*rank 1.* in plan \d+ \(decode\)"):
            llm.generate(PROMPT, SamplingParams(max_tokens=500), on_progress=stop)
    assert not is_alive(pid)


@pytest.mark.slow
@needs_processes
def test_a_stopped_rank_that_no_peer_waits_for_is_noticed_by_the_driver(own_tmp, monkeypatch):
    monkeypatch.setattr(heartbeat, "MARGIN_S", 1.0)
    with LLM("recall", exchange_timeout_s=2.0) as llm:
        (pid,) = ranks(os.getpid())
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerError, match=rf"^rank 0 \(pid {pid}\) has given no sign of life for 3 s"):
            llm.generate(PROMPT)
    assert not is_alive(pid)


# -- opening and closing -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_processes
def test_two_llms_at_once_and_one_after_another_leave_nothing_behind(own_tmp):
    params = SamplingParams(max_tokens=5)
    counts = []
    for _ in range(2):
        with LLM("recall", **TWO_RANKS) as first, LLM("recall") as second:
            assert len(ranks(os.getpid())) == 3
            for llm in (first, second, first):
                assert llm.generate(PROMPT, params)[0].outputs[0].text == "4711."
            first.close()
            assert second.generate(PROMPT, params)[0].outputs[0].text == "4711."
        assert ranks(os.getpid()) == []
        assert leftovers(own_tmp) == []
        counts.append((num_descriptors(), threading.active_count()))
    assert counts[0] == counts[1]
    with pytest.raises(LongspanError, match="the engine is closed"):
        first.generate(PROMPT)


@pytest.mark.cover
def test_opening_and_closing_with_threads_leaks_nothing(cache_home):
    counts = []
    for _ in range(6):
        with LLM("recall", **TWO_RANKS, executor="threads") as llm:
            llm.generate("ab", SamplingParams(max_tokens=2))
        llm.close()
        counts.append((num_descriptors(), threading.active_count()))
    assert counts[-1] == counts[1]


def test_an_interrupted_call_leaves_an_llm_that_works(cache_home):
    params = SamplingParams(max_tokens=5)

    def interrupt(progress):
        if progress.generated_tokens == 2:
            raise KeyboardInterrupt

    with LLM("recall", **TWO_RANKS, executor="threads") as llm:
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPT, TEXT[:900]], params, on_progress=interrupt)
        assert llm.generate(PROMPT, params)[0].outputs[0].text == "4711."
        assert not llm.engine.has_requests
        llm.engine.scheduler.memory.check_integrity()


def test_a_rank_that_raises_in_a_thread_is_named_too(cache_home):
    with LLM("recall", **TWO_RANKS, executor="threads", exchange_timeout_s=0.2) as llm:
        llm.engine.executor.runners[1].run = None
        with pytest.raises(WorkerError, match=r"^rank 1: TypeError: .* in plan 0 \(prefill\)$"):
            llm.generate(PROMPT)


def test_rejects_a_directory_whose_sockets_would_have_too_long_names(cache_home, tmp_path, monkeypatch):
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    with pytest.raises(ConfigError, match=r"TMPDIR: got .*, legal is a directory whose path has at most"):
        LLM("recall")
    assert leftovers(directory) == []
