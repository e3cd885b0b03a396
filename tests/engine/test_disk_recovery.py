"""Ranks that replace lost ones go on from the disk."""

import os
import random
import signal

import pytest
from process_tree import ranks

from longspan import LLM, SamplingParams

pytestmark = pytest.mark.processes

WORDS = [f"word{i} " for i in range(40)]


def text(seed: int, length: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) for _ in range(length))


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_lost_ranks_had_written_is_loaded_by_the_new_ones(num_ranks, cache_home, tmp_path):
    prompt, params = text(1, 1500), SamplingParams(max_tokens=30, ignore_eos=True)
    options = {"context_parallel_size": num_ranks, "placement": "striped", "max_restarts": 3, "threads_per_rank": 1}
    with LLM("recall", kv_disk=str(tmp_path), **options) as llm:
        (whole,) = llm.generate(prompt, params)
        llm.engine.tiers.flush(llm.engine.scheduler, llm.engine.executor)
        killed: list[int] = []

        def kill_one(progress: object) -> None:
            if not killed and progress.generated_tokens > 5:
                killed.append(ranks(os.getpid())[-1])
                os.kill(killed[0], signal.SIGKILL)

        (again,) = llm.generate(prompt, params, on_progress=kill_one)
        assert killed
        assert llm.engine.stats().num_restarts == 1
        assert again.outputs[0].token_ids == whole.outputs[0].token_ids
        tier = llm.engine.stats().tiers["disk"]
        assert tier.hit_tokens >= (len(again.prompt_token_ids) - 1) // 16 * 16
        assert tier.failed_pages == 0
