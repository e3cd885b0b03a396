"""Ranks of two processes each that are real ones: the tokens of one process, and the loss of any of them."""

import os
import signal

import pytest
from process_tree import ranks
from served_command import FACT, FILLER, QUESTION

from longspan import LLM, SamplingParams, WorkerError
from longspan.worker.fault import VARIABLE

pytestmark = pytest.mark.processes

SPREAD = {"context_parallel_size": 2, "placement": "striped", "page_size": 16, "stripe_size": 64, "threads_per_rank": 1}
PROMPTS = [FILLER[:1500] + FACT + FILLER[1500:3000] + QUESTION, FILLER[3000:4000]]
PARAMS = [SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, temperature=1.0, seed=5)]


def tokens_of(llm, **options):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, **options)]


@pytest.fixture(scope="module")
def wanted(cache_home):
    with LLM("recall", executor="threads", **SPREAD) as llm:
        return tokens_of(llm)


@pytest.mark.parametrize("lost", [(1, 1), *(pytest.param(p, marks=pytest.mark.slow) for p in [(0, 0), (0, 1), (1, 0)])])
def test_a_rank_that_loses_a_process_is_replaced_with_all_of_them_and_tokens_are_the_same(wanted, lost):
    killed = []

    def kill(progress):
        if progress.request_idx == 1 and progress.generated_tokens > 4 and not killed:
            killed.append(ranks(os.getpid())[2 * lost[0] + lost[1]])
            os.kill(killed[0], signal.SIGKILL)

    options = {"tensor_parallel_size": 2, "max_restarts": 1, "check_invariants": 1, "max_num_batched_tokens": 256}
    with LLM("recall", **SPREAD, **options, check_messages=lost == (0, 1)) as llm:
        assert len(ranks(os.getpid())) == 4
        assert tokens_of(llm, on_progress=kill) == wanted
        assert llm.engine.restarts.num_done == len(killed) == 1
        assert llm.engine.stats().bytes_per_strategy["sums"] > 0
        assert tokens_of(llm) == wanted
        assert len(ranks(os.getpid())) == 4
    assert not ranks(os.getpid())


def test_a_lone_rank_of_two_processes_names_the_one_that_fails(wanted, monkeypatch):
    with LLM("recall", tensor_parallel_size=2, threads_per_rank=1) as llm:
        assert tokens_of(llm) == wanted
        assert len(ranks(os.getpid())) == 2
    monkeypatch.setenv(VARIABLE, "rank=0,process=1,plan=2,layer=1,kind=raise")
    with (
        LLM("recall", tensor_parallel_size=2, threads_per_rank=1) as llm,
        pytest.raises(WorkerError, match=r"^rank 0, process 1: InjectedFaultError: injected before layer 1"),
    ):
        tokens_of(llm)
    assert not ranks(os.getpid())
