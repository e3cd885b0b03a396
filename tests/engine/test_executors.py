"""Ranks that are processes answer bit for bit like ranks that are threads; options that an executor does not take."""

import pytest
from tiny_models import greedy, run_all, tiny_model

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.errors import ConfigError
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
        pytest.param("llama", 2, {"strategy": "pass_kv", "decode_strategy": "pass_q"}, marks=pytest.mark.slow),
        ("gemma3", 3, {}),
    ],
)
def test_processes_give_the_bits_of_threads(family, num_ranks, options):
    assert run(family, num_ranks, "processes", **options) == run(family, num_ranks, "threads", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "external"}, "listen: got none with executor 'external', legal is HOST:PORT"),
        ({"executor": "external", "listen": "10.0.0.1"}, "listen: got '10.0.0.1', legal is HOST:PORT"),
        ({"executor": "external", "listen": "a:0"}, "listen: got 'a:0', legal is HOST:PORT"),
        (
            {"listen": "a:7000"},
            "listen: got 'a:7000' with executor 'processes', legal is a text with executor",
        ),
        ({"secret_file": "x"}, "secret_file: got 'x' with executor 'processes'"),
        ({"ray_address": "x"}, "ray_address: got 'x' with executor 'processes', legal is a text with executor ray"),
        ({"executor": "external", "listen": "a:7000", "interface": "eth0"}, "interface: got 'eth0' with executor 'ext"),
        ({"ray_placement": "spread"}, "ray_placement: got 'spread' with executor 'processes', legal is executor ray"),
        ({"executor": "ray", "ray_placement": "wide"}, "ray_placement: got 'wide', legal is one of pack, spread"),
        ({"connect_timeout_s": 0}, "connect_timeout_s: got 0, legal is a number above 0"),
    ],
)
def test_rejects_options_that_contradict_the_executor(options, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        EngineConfig(model="recall", **options)


def test_the_driver_does_not_listen_without_a_secret(longspan, monkeypatch):
    monkeypatch.delenv("LONGSPAN_SECRET", raising=False)
    outcome = longspan("generate", "recall", "--prompt", "x", "--executor", "external", "--listen", "127.0.0.1:7999")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("longspan: LONGSPAN_SECRET: not set, legal is a secret of at least 16 bytes")
