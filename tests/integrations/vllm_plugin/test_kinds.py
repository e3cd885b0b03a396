"""Experts, windows, chunks and sinks: tokens are those of Transformers; blocks behind windows are freed."""

import pytest
from engines import engine, generate, metric, num_blocks, prompts, random_prompts, reference, tokens_of
from kinds import TABLES

TUNED = {"override_generation_config": {"attn_temperature_tuning": True}}
"""Llama 4's temperature by position, which Transformers takes from the model and vLLM from here."""
CAPACITY = {}
"""KV blocks per kind and number of ranks, as engines of this run have reported; None is vLLM without the plugin."""


def num_tables(llm):
    return llm.collective_rpc(lambda worker: worker.worker.groups.num_tables)[0]


def slow(*case):
    """A case that `make test-vllm` leaves out: another of the same model has what is in it."""
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "cp_size", "longspan", "options"),
    [
        slow("mistral", 1, {}, {}),
        slow("mistral", 2, {}, {}),
        ("mistral", 3, {"placement": "striped"}, {}),
        slow("mistral", 2, {"placement": "striped"}, {"tensor_parallel_size": 2}),
        slow("qwen3_moe", 1, {}, {}),
        ("qwen3_moe", 2, {}, {"enforce_eager": False}),
        slow("qwen3_moe", 3, {"placement": "striped"}, {}),
        slow("qwen3_moe", 2, {"placement": "striped"}, {"tensor_parallel_size": 2}),
        ("gpt_oss", 1, {}, {}),
        slow("gpt_oss", 2, {}, {"enforce_eager": False}),
        ("gpt_oss", 3, {"strategy": "pass_q", "placement": "striped"}, {}),
        ("gpt_oss", 2, {"placement": "striped"}, {"tensor_parallel_size": 2}),
        ("gpt_oss", 2, {}, {"disable_hybrid_kv_cache_manager": True}),
        ("gemma2", 2, {"placement": "striped"}, {}),
        slow("gemma3_text", 1, {}, {}),
        slow("gemma3_text", 2, {}, {"enforce_eager": False}),
        ("gemma3_text", 3, {"strategy": "pass_kv", "placement": "striped"}, {}),
        slow("gemma3_text", 2, {"placement": "striped"}, {"tensor_parallel_size": 2}),
        ("cohere2", 2, {}, {}),
        slow("cohere2", 3, {"placement": "striped"}, {}),
        slow("llama4_text", 1, {}, TUNED),
        ("llama4_text", 2, {}, TUNED),
        slow("llama4_text", 3, {"strategy": "pass_kv", "placement": "striped", "stripe_size": 32}, TUNED),
    ],
)
def test_tokens_equal_transformers(model_of_kind, monkeypatch, kind, cp_size, longspan, options):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for a function of this test, sent to workers
    model, expected = model_of_kind(kind)
    with engine(model, cp_size, longspan, **options) as llm:
        if options.keys() <= {"enforce_eager"}:
            CAPACITY[kind, cp_size] = num_blocks(llm)
        assert num_tables(llm) == (1 if "disable_hybrid_kv_cache_manager" in options else TABLES[kind])
        asked = prompts()
        assert tokens_of(generate(llm, asked)) == expected  # 10 at once, chunked: 1,024 tokens a step
        hits = metric(llm, "vllm:prefix_cache_hits")
        assert [tokens_of(generate(llm, [p]))[0] for p in asked] == expected
        assert metric(llm, "vllm:prefix_cache_hits") > hits


LENS = (300, 500, 700, 900)
TOO_FEW_BLOCKS = {
    "mistral": (200, LENS),
    "qwen3_moe": (200, LENS),
    "gpt_oss": (150, LENS),
    "gemma3_text": (240, (200, 260, 300, 340)),
}
"""Blocks that are too few for sixteen requests, and the lengths of their prompts."""


@pytest.mark.parametrize("kind", ["gpt_oss", slow("gemma3_text"), slow("mistral"), slow("qwen3_moe")])
def test_sixteen_at_once_with_preemptions(model_of_kind, kind):
    model, _ = model_of_kind(kind)
    blocks, lens = TOO_FEW_BLOCKS[kind]
    asked = random_prompts(lens * 4, seed=5)
    expected = reference(model, asked, 120)
    options = {"num_gpu_blocks_override": blocks, "max_num_batched_tokens": 256, "max_num_seqs": 16}
    with engine(model, 2, max_model_len=2048, **options) as llm:
        assert tokens_of(generate(llm, asked, max_tokens=120)) == expected
        assert metric(llm, "vllm:num_preemptions") > 0


def test_kv_capacity_is_that_of_all_ranks(model_of_kind):
    model, _ = model_of_kind("gpt_oss")
    for cp_size in {None, 2, 3} - {size for known, size in CAPACITY if known == "gpt_oss"}:
        with engine(model, cp_size) as llm:
            CAPACITY["gpt_oss", cp_size] = num_blocks(llm)
    assert CAPACITY["gpt_oss", 2] >= 1.98 * CAPACITY["gpt_oss", None]
    assert CAPACITY["gpt_oss", 3] >= 2.97 * CAPACITY["gpt_oss", None]


def test_blocks_behind_windows_are_freed_on_every_rank(model_of_kind):
    """Two ranks that hold 1,800 tokens each answer a prompt of 3,900 whose windows have 700."""
    model, _ = model_of_kind("mistral")
    kv_bytes = 1800 * 3 * 2 * 2 * 32 * 4  # 3 layers, K and V, 2 heads of 32 float32
    asked = random_prompts((3900, 3900))
    with engine(model, 2, kv_cache_memory_bytes=kv_bytes, max_num_batched_tokens=512) as llm:
        assert num_blocks(llm) * 32 < 3900
        assert tokens_of(generate(llm, asked)) == reference(model, asked)
