"""Unequal ranks, recurrent layers and small keys and values together give the tokens that each gives alone."""

import pytest
from proven_models import NUM_TOKENS, proven_model
from tiny_models import greedy, run_all

from longspan.config import EngineConfig
from longspan.engine.engine import Engine

pytestmark = pytest.mark.cover


def generate(name, **options):
    """Tokens for the prompts of a model's references, on ranks that are threads."""
    model = proven_model(name)
    config = EngineConfig(
        model=model.path,
        executor="threads",
        threads_per_rank=1,
        exchange_timeout_s=60.0,
        check_invariants=1,
        **{"dtype": "float32", "kv_cache_memory": 2**25, "page_size": 4, "stripe_size": 24, **options},
    )
    with Engine(config) as engine:
        requests = [engine.add_request(reference.prompt, greedy(NUM_TOKENS)) for reference in model.references]
        run_all(engine)
    return [request.output_token_ids for request in requests]


@pytest.mark.parametrize("weights", [(2.0, 1.0, 1.0), (1.0, 3.0)])
@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1"])
def test_states_move_between_unequal_ranks(name, weights):
    found = generate(
        name, context_parallel_size=len(weights), rank_weights=weights, placement="striped", max_num_batched_tokens=48
    )
    assert found == [reference.token_ids for reference in proven_model(name).references]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8_e4m3"])
@pytest.mark.parametrize("name", ["qwen3_5_text", "llama"])
def test_small_keys_give_the_same_tokens_on_one_rank_and_on_unequal_ones(name, dtype):
    alone = generate(name, kv_cache_dtype=dtype)
    spread = {"context_parallel_size": 3, "rank_weights": (2.0, 1.0, 1.0), "placement": "striped"}
    assert generate(name, kv_cache_dtype=dtype, **spread) == alone
