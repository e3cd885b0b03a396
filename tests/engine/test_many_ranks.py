"""16 and 32 real ranks on one machine: the tokens are those of Transformers, whoever computes them."""

import pytest
from tiny_models import greedy, run_all, tiny_engine, tiny_model

from longspan.config import EngineConfig
from longspan.engine.engine import Engine

OPTIONS = {"placement": "striped", "page_size": 4, "stripe_size": 8, "max_num_batched_tokens": 16}


def check(engine, model, num_tokens=16):
    requests = [engine.add_request(reference.prompt, greedy(num_tokens)) for reference in model.references]
    run_all(engine)
    expected = [reference.token_ids[:num_tokens] for reference in model.references]
    assert [request.output_token_ids for request in requests] == expected
    computed = [rank.tokens_computed for rank in engine.rank_stats()]
    assert min(computed) > 0, "every rank has a part of the longest prompt"


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [16, 32])
@pytest.mark.parametrize("options", [{"strategy": "pass_kv", "decode_strategy": "pass_q"}, {"strategy": "pass_q"}, {}])
def test_tokens_of_many_threads_are_those_of_transformers(num_ranks, options):
    model = tiny_model("llama")
    with tiny_engine(model, context_parallel_size=num_ranks, **OPTIONS, **options) as engine:
        check(engine, model)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("num_ranks", [16, 32])
def test_tokens_of_many_processes_on_four_pretended_nodes_are_those_of_transformers(num_ranks):
    model = tiny_model("llama")
    config = EngineConfig(
        model=model.path,
        context_parallel_size=num_ranks,
        threads_per_rank=1,
        kv_cache_memory=2**22,
        nodes=tuple(4 * rank // num_ranks for rank in range(num_ranks)),
        decode_strategy="tree",
        measure="never",
        **OPTIONS,
    )
    with Engine(config) as engine:
        check(engine, model)
