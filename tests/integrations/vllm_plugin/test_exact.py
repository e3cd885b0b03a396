"""Greedy tokens under vLLM with context parallelism are those of Transformers."""

import pytest
from engines import engine, generate, metric, num_blocks, prompts, random_prompts, reference, tokens_of

from longspan.costmodel.parameters import costs_by_bytes


@pytest.fixture(scope="module")
def expected(models):
    asked = prompts()
    return {kind: reference(model, asked) for kind, model in models.items()}


CAPACITY = {}
"""Ranks to KV blocks, as engines of this run have reported."""


COMPILED = {("llama", 2)}
"""Models and ranks that vLLM compiles, as it does by default; a mixture and 2 x 2 are compiled in other tests."""


@pytest.mark.parametrize(
    ("kind", "cp_size", "longspan"),
    [
        ("llama", 1, {}),
        ("llama", 2, {}),
        ("llama", 3, {}),
        pytest.param("qwen3", 1, {}, marks=pytest.mark.slow),
        pytest.param("qwen3", 2, {}, marks=pytest.mark.slow),
        ("qwen3", 3, {}),
        ("llama", 2, {"strategy": "pass_q", "placement": "striped"}),
        ("llama", 3, {"strategy": "pass_kv", "placement": "striped", "stripe_size": 32}),
        ("llama", 2, {"strategy": "gather_kv", "placement": "packed"}),
    ],
)
def test_tokens_equal_transformers(models, expected, monkeypatch, kind, cp_size, longspan):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for a function of this test, sent to workers
    compiled = not longspan and (kind, cp_size) in COMPILED
    with engine(models[kind], cp_size, longspan, enforce_eager=not compiled) as llm:
        asked = prompts()
        costs = llm.collective_rpc(lambda worker: repr(worker.worker.costs))
        assert len(costs) == cp_size
        assert len(set(costs)) == 1, "ranks choose strategies by different numbers"
        assert (costs[0] == repr(costs_by_bytes((0,) * cp_size))) == (cp_size == 1 or "strategy" in longspan)
        assert tokens_of(generate(llm, asked)) == expected[kind]  # 10 at once, chunked: 1,024 tokens a step
        hits = metric(llm, "vllm:prefix_cache_hits")
        # Again, from the prefix cache; a short prompt's blocks are packed, a long one's striped, and each is the
        # start of one that is placed the other way.
        assert [tokens_of(generate(llm, [p]))[0] for p in asked] == expected[kind]
        assert metric(llm, "vllm:prefix_cache_hits") > hits
        if kind == "llama" and not longspan:
            CAPACITY[cp_size] = num_blocks(llm)


def test_kv_capacity_is_that_of_all_ranks(models):
    for cp_size in {1, 2, 3} - CAPACITY.keys():  # what the tests above have not started in this run
        with engine(models["llama"], cp_size) as llm:
            CAPACITY[cp_size] = num_blocks(llm)
    assert CAPACITY[2] >= 1.98 * CAPACITY[1]
    assert CAPACITY[3] >= 2.97 * CAPACITY[1]


def test_sixteen_at_once_with_preemptions(models):
    asked = random_prompts((300, 500, 700, 900) * 4, seed=5)
    expected = reference(models["llama"], asked, 100)
    with engine(models["llama"], 2, num_gpu_blocks_override=200, max_num_batched_tokens=256, max_num_seqs=16) as llm:
        assert tokens_of(generate(llm, asked, max_tokens=100)) == expected
        assert metric(llm, "vllm:num_preemptions") > 0
        assert tokens_of(generate(llm, asked, max_tokens=100)) == expected


def test_ranks_of_two_tensor_parallel_processes(models, expected):
    with engine(models["llama"], 2, tensor_parallel_size=2, enforce_eager=False) as llm:
        assert tokens_of(generate(llm, prompts()[:5], max_tokens=12)) == [t[:12] for t in expected["llama"][:5]]


def test_a_context_that_stock_vllm_refuses_is_answered(models):
    asked = random_prompts((3900,))
    kv_bytes = 3000 * 3 * 2 * 2 * 32 * 4  # 3,000 tokens of 3 layers, K and V, 2 heads of 32 float32
    with pytest.raises((RuntimeError, ValueError)), engine(models["llama"], None, kv_cache_memory_bytes=kv_bytes):
        pass
    with engine(models["llama"], 2, kv_cache_memory_bytes=kv_bytes) as llm:
        assert tokens_of(generate(llm, asked)) == reference(models["llama"], asked)
