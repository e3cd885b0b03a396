"""Ranks that are processes answer bit for bit like ranks that are threads."""

import pytest
from tiny_models import greedy, run_all, tiny_model

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.types import SamplingParams


def run(family, num_ranks, executor, **options):
    model = tiny_model(family)
    config = EngineConfig(
        model=model.path,
        context_parallel_size=num_ranks,
        executor=executor,
        threads_per_rank=1,
        placement="striped",
        page_size=4,
        stripe_size=8,
        max_num_batched_tokens=100,
        kv_cache_memory=2**24,
        **options,
    )
    sampled = SamplingParams(
        max_tokens=64, temperature=1.0, top_p=0.95, seed=9, ignore_eos=True, logprobs=3, prompt_logprobs=1
    )
    with Engine(config, model.module if executor == "threads" else None) as engine:
        greedy_ones = [engine.add_request(reference.prompt, greedy()) for reference in model.references]
        sampled_ones = [engine.add_request(reference.prompt, sampled) for reference in model.references[1:3]]
        run_all(engine)
    assert [r.output_token_ids for r in greedy_ones] == [reference.token_ids for reference in model.references]
    return [(r.token_ids, r.logprobs, r.prompt_logprobs) for r in (*greedy_ones, *sampled_ones)]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("family", "num_ranks", "options"),
    [
        ("llama", 2, {"strategy": "pass_kv", "decode_strategy": "pass_q"}),
        ("gemma3", 3, {}),
    ],
)
def test_processes_give_the_bits_of_threads(family, num_ranks, options):
    assert run(family, num_ranks, "processes", **options) == run(family, num_ranks, "threads", **options)
