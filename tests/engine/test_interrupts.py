"""Proves that Ctrl-C at any moment of a step leaves an LLM that goes on."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from longspan import LLM, SamplingParams
from longspan.engine.interrupts import deferred_interrupt
from longspan.scheduler.scheduler import Scheduler


def test_an_interrupt_waits_for_the_end():
    steps = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the place where it is raised is the point
        with deferred_interrupt():
            signal.raise_signal(signal.SIGINT)
            steps.append("inside")
        steps.append("after")
    assert steps == ["inside"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_programs_own_handler_is_left_alone():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with deferred_interrupt():
            signal.raise_signal(signal.SIGINT)
            assert seen == [1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_do_without():
    done = []

    def run():
        with deferred_interrupt():
            done.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [1]


@pytest.mark.parametrize("method", ["schedule", "update"])
def test_an_interrupted_generate_leaves_an_llm_that_goes_on(cache_home, monkeypatch, method):
    prompt = "The number of the safe is 4711. And so on. The number of the safe is "
    params = SamplingParams(max_tokens=4)
    honest = getattr(Scheduler, method)
    with LLM("recall", executor="threads", context_parallel_size=2, kv_cache_memory=2**22) as llm:

        def interrupted(*arguments):
            result = honest(*arguments)
            signal.raise_signal(signal.SIGINT)
            return result

        monkeypatch.setattr(Scheduler, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompt, params)
        monkeypatch.setattr(Scheduler, method, honest)
        (output,) = llm.generate(prompt, params)
        assert output.outputs[0].text == "4711"
        assert not llm.engine.scheduler.running


def test_ctrl_c_in_an_import_that_swallows_exceptions_ends_the_command(tmp_path):
    """As torch does where it tries to import numpy."""
    (tmp_path / "swallows.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(5)\n"
        "except BaseException:\n"
        "    pass\n"
    )
    script = (
        "import signal; from longspan.cli import main;"
        "signal.signal(signal.SIGINT, main._raise_signalled); import swallows; print('went on')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "longspan: interrupted\n")
