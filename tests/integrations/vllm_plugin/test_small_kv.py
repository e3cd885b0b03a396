"""`--kv-cache-dtype`: tokens are those of Transformers with a cache that rounds in the same way."""

import pytest
import torch
import vllm
from engines import engine, generate, metric, num_blocks, random_prompts, tokens_of
from rounding_cache import clear_answer
from transformers import AutoModelForCausalLM

NUM_TOKENS = 24
REFUSES_BFLOAT16 = vllm.__version_tuple__[:2] >= (0, 33)
BFLOAT16 = [pytest.mark.slow, pytest.mark.skipif(REFUSES_BFLOAT16, reason="vLLM refuses it for a float32 model")]
BYTES_OF_A_HEAD = {"bfloat16": 64, "int8_per_token_head": 36, "fp8_per_token_head": 36}
"""Of 32 elements and their scale; in float32 they are 128."""


def clear_answers(model, dtype):
    """Prompts, and what Transformers answers to each."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = [
        clear_answer(network, dtype, NUM_TOKENS, (random_prompts((n,), seed)[0] for seed in range(20)))
        for n in (31, 97, 513, 1500)
    ]
    return zip(*found, strict=True)


@pytest.mark.parametrize(
    ("kind", "dtype", "cp_size", "longspan"),
    [
        ("llama", "int8_per_token_head", 2, {}),
        pytest.param("llama", "bfloat16", 3, {"strategy": "pass_kv", "placement": "striped"}, marks=BFLOAT16),
        pytest.param("gpt_oss", "int8_per_token_head", 2, {"placement": "striped"}, marks=pytest.mark.slow),
        ("gpt_oss", "fp8_per_token_head", 3, {"strategy": "gather_kv", "placement": "striped"}),
    ],
)
def test_tokens_equal_those_of_a_cache_that_rounds(models, model_of_kind, kind, dtype, cp_size, longspan):
    model = models[kind] if kind in models else model_of_kind(kind)[0]
    asked, expected = clear_answers(model, dtype.removesuffix("_per_token_head").replace("fp8", "fp8_e4m3"))
    with engine(model, cp_size, longspan, kv_cache_dtype=dtype) as llm:
        params = {"max_tokens": NUM_TOKENS}
        assert tokens_of(generate(llm, asked, **params)) == list(expected)
        assert [tokens_of(generate(llm, [p], **params))[0] for p in asked] == list(expected), "from the prefix cache"
        assert metric(llm, "vllm:prefix_cache_hits") > 0
        if kind == "llama":
            block_bytes = 32 * 3 * 2 * 2 * BYTES_OF_A_HEAD[dtype]  # 32 tokens in 3 layers of 2 heads, K and V
            assert num_blocks(llm) == cp_size * ((64 << 20) // block_bytes)
