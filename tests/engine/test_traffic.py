"""Random traffic: requests come, go and are aborted on tight memory, and each gets the tokens it gets alone."""

import functools
import random

import pytest
from tiny_models import greedy, memory_for, random_prompt, run_requests, tiny_engine, tiny_model

from longspan.config import EngineConfig
from longspan.errors import ConfigError
from longspan.types import FinishReason, SamplingParams

pytestmark = pytest.mark.cover

FAMILIES = ("llama", "mistral-window-24", "gemma3", "smollm3-window", "mistral-window-7")
NUM_KINDS = 12


@functools.cache
def request_kind(index):
    """Prompt and parameters of one of a few kinds of requests."""
    rng = random.Random(index)
    prompt = random_prompt(rng.choice((1, 2, 4, 15, 16, 17, 60, 150, 260)), 100 + index)
    max_tokens = rng.choice((1, 2, 9, 30, 50))
    if index % 2:
        return prompt, greedy(max_tokens)
    return prompt, SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0,
        top_p=0.9,
        seed=index,
        ignore_eos=True,
        prompt_logprobs=1 if index % 4 == 0 else None,
        logprobs=2 if index % 3 == 0 else None,
    )


@functools.cache
def alone(family, index):
    """The tokens of a request with nothing beside it on one rank."""
    (request,) = run_requests(tiny_model(family), [request_kind(index)])
    return request.output_token_ids


def random_options(rng, model):
    page_size = rng.choice((1, 3, 4, 16))
    num_ranks = rng.choice((2, 3, 4, 5))
    placement = rng.choice(("auto", "striped", "spill", "packed"))
    per_rank = 330 if placement == "packed" else rng.choice((330 // num_ranks + 3 * page_size, 200, 330))
    return {
        "context_parallel_size": num_ranks,
        "placement": placement,
        "page_size": page_size,
        "stripe_size": page_size * rng.choice((1, 2, 7)),
        "strategy": rng.choice(("auto", "gather_kv", "pass_kv", "pass_q")),
        "decode_strategy": rng.choice((None, "gather_kv", "pass_kv", "pass_q")),
        "max_num_batched_tokens": rng.choice((1, 5, 16, 50, 300)),
        "max_num_seqs": rng.choice((1, 2, 5, 64)),
        "kv_cache_memory": memory_for(model, per_rank),
    }


def run_traffic(seed):
    rng = random.Random(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    model = tiny_model(family)
    options = random_options(rng, model)
    EngineConfig(model=model.path, executor="threads", **options)
    running, doomed = [], []
    to_come = [rng.randrange(NUM_KINDS) for _ in range(10)]
    with tiny_engine(model, **options) as engine:
        while to_come or engine.has_requests:
            for _ in range(rng.choice((0, 0, 1, 3))):
                if to_come:
                    index = to_come.pop()
                    try:
                        request = engine.add_request(*request_kind(index))
                    except ConfigError:  # too long for these ranks, which other tests are about
                        continue
                    (doomed if rng.random() < 0.2 else running).append((index, request))
            if engine.has_requests:
                engine.step()
            engine.scheduler.memory.check_integrity()
            for _, request in doomed:
                if rng.random() < 0.1:
                    engine.abort(request)
    assert running
    for index, request in running:
        assert request.output_token_ids == alone(family, index), (family, options, index)
        assert request.finish_reason is FinishReason.LENGTH
        prompt, params = request_kind(index)
        if params.prompt_logprobs is not None:
            assert [entry.token_id for entry in request.prompt_logprobs] == prompt[1:]


@pytest.mark.parametrize("seed", range(5))
def test_every_request_gets_the_tokens_it_gets_alone(seed):
    run_traffic(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5, 120))
def test_every_request_gets_the_tokens_it_gets_alone_often(seed):
    run_traffic(seed)
