"""Options that are each proven alone give the same tokens together.

Recurrent layers, unequal ranks, small keys and values, drafts, ranks of several processes, and KV on disk.
"""

import pytest
from drafts import SPECULATION, check_all_drafts, scripted
from proven_models import NUM_TOKENS, proven_engine, proven_model
from tiny_models import VOCAB_SIZE, run_all

from longspan.scheduler import tiers
from longspan.types import SamplingParams
from longspan.worker import page_mover

pytestmark = pytest.mark.cover

UNEQUAL = {"context_parallel_size": 3, "rank_weights": (2.0, 1.0, 1.0), "placement": "striped"}
SMALL = ("bfloat16", "int8", "fp8_e4m3")


def params_of(temperature, seed):
    return SamplingParams(max_tokens=NUM_TOKENS, temperature=temperature, top_p=0.95, seed=seed, ignore_eos=True)


def serve(engine, name, temperature):
    prompts = [reference.prompt for reference in proven_model(name).references]
    requests = [engine.add_request(prompt, params_of(temperature, i)) for i, prompt in enumerate(prompts)]
    run_all(engine)
    return [request.output_token_ids for request in requests]


def generate(name, temperature=0.0, truth=None, **options):
    """Tokens for the prompts of a model's references, on ranks that are threads.

    Args:
        name: model.
        temperature: of all requests.
        truth: tokens that are known to follow; then they are drafts, of which three in ten are made wrong.
        options: as in `EngineConfig`.
    """
    common = {"page_size": 4, "stripe_size": 24, "check_invariants": 1}
    drafts = {} if truth is None else {"speculative_config": SPECULATION}
    with proven_engine(proven_model(name), **common, **drafts, **options) as engine:
        if truth is not None:
            known = [[*r.prompt, *tokens] for r, tokens in zip(proven_model(name).references, truth, strict=True)]
            engine.scheduler.drafting.make_proposer = scripted(
                lambda request: next(one for one in known if one[: request.prompt_len] == request.token_ids),
                0.3,
                VOCAB_SIZE,
            )
        found = serve(engine, name, temperature)
        if truth is not None:
            assert engine.scheduler.drafting.num_accepted
            assert engine.scheduler.drafting.num_rejected
        if engine.tiers is not None:
            engine.tiers.flush(engine.scheduler, engine.executor)
        return found


def tokens_of(name):
    return [reference.token_ids for reference in proven_model(name).references]


@pytest.mark.parametrize("weights", [(2.0, 1.0, 1.0), (1.0, 3.0)])
@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1"])
def test_states_move_between_unequal_ranks(name, weights):
    found = generate(
        name, context_parallel_size=len(weights), rank_weights=weights, placement="striped", max_num_batched_tokens=48
    )
    assert found == tokens_of(name)


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("name", ["qwen3_5_text", "llama"])
def test_small_keys_give_the_same_tokens_on_one_rank_and_on_unequal_ones(name, dtype):
    assert generate(name, kv_cache_dtype=dtype, **UNEQUAL) == generate(name, kv_cache_dtype=dtype)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("name", "shape"), [("llama", (1, 4)), ("gemma2", (2, 2)), ("qwen3_moe", (2, 2))])
def test_drafts_are_checked_by_ranks_of_several_processes(name, shape, temperature, monkeypatch):
    check_all_drafts(monkeypatch)
    alone = generate(name, temperature)
    assert temperature or alone == tokens_of(name)
    size = {"context_parallel_size": shape[0], "tensor_parallel_size": shape[1]}
    assert generate(name, temperature, truth=alone, **size) == alone


@pytest.mark.parametrize("dtype", SMALL)
def test_small_keys_of_unequal_ranks_of_several_processes(dtype):
    alone = generate("llama", kv_cache_dtype=dtype)
    assert generate("llama", kv_cache_dtype=dtype, tensor_parallel_size=2, **UNEQUAL) == alone


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "youtu", "llama4_text"])
def test_drafts_small_keys_and_pages_on_disk_with_unequal_ranks(name, tmp_path, monkeypatch):
    check_all_drafts(monkeypatch)
    monkeypatch.setattr(tiers, "FIRST_BYTES_PER_S", {"host": 1e30, "disk": 1e30})
    monkeypatch.setattr(tiers, "MEMORY", 1.0)
    monkeypatch.setattr(page_mover, "NICENESS", 0)
    alone = generate(name, kv_cache_dtype="int8")
    for _ in range(2):  # the second engine reads what the first one wrote
        found = generate(name, truth=alone, kv_cache_dtype="int8", kv_disk=str(tmp_path), **UNEQUAL)
        assert found == alone
