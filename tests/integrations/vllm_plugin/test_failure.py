"""A worker that fails or dies ends the engine: nobody waits for it."""

import os
import signal
import time

import pytest
from engines import engine, generate, random_prompts
from forking import starting_by

LIMIT_S = 60


def kill(llm):
    os.kill(llm.collective_rpc(lambda worker: os.getpid())[1], signal.SIGKILL)


def break_second(llm):
    """Let the next step of process 1 fail: with two processes per rank, the other half of rank 0."""
    llm.collective_rpc(lambda worker: worker.rank == 1 and setattr(worker.worker, "_requests", None))


@pytest.mark.parametrize(
    ("fail", "tp_size", "start"), [(kill, 1, "spawn"), (break_second, 1, "spawn"), (break_second, 2, "fork")]
)
def test_a_lost_worker_ends_the_engine(models, monkeypatch, fail, tp_size, start):
    from vllm.v1.engine.exceptions import EngineDeadError

    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for functions of this test, sent to workers
    with starting_by(start), engine(models["llama"], 2, tensor_parallel_size=tp_size) as llm:
        assert generate(llm, random_prompts((40,)), max_tokens=2)
        fail(llm)
        start = time.monotonic()
        with pytest.raises(EngineDeadError):
            generate(llm, random_prompts((900,)), max_tokens=40)
        assert time.monotonic() - start < LIMIT_S
