"""Smaller keys and values: tokens are those of Transformers with a cache that rounds as ours does, on any ranks."""

import argparse
import functools
import itertools
from math import exp
from pathlib import Path
from statistics import fmean

import pytest
from rounding_cache import clear_answer
from tiny_models import (
    FAMILIES,
    all_pairs,
    greedy,
    load_reference,
    random_prompt,
    run_all,
    run_requests,
    tiny_engine,
    tiny_model,
)

from longspan import LLM
from longspan.config import EngineConfig
from longspan.cp import fixed
from longspan.errors import ConfigError
from longspan.kv import pool, stored
from longspan.kv.layout import STORED_DTYPES, KVSpec
from longspan.types import SamplingParams

NUM_TOKENS = 16
SMALL = ("bfloat16", "int8", "fp8_e4m3")


@functools.cache
def reference(family, dtype, length):
    """A prompt and the tokens that Transformers continues it with."""
    prompts = (random_prompt(length, 100 + seed) for seed in range(60))
    return clear_answer(load_reference(tiny_model(family).path), dtype, NUM_TOKENS, prompts)


CASES = all_pairs(
    {
        "family": ("llama", "mistral-window-24", "gemma2", "gpt_oss", "qwen3_moe", "llama4"),
        "kv_cache_dtype": SMALL,
        "context_parallel_size": (1, 2, 3, 5),
        "strategy": ("auto", "gather_kv", "pass_kv", "pass_q", "tree"),
        "placement": ("striped", "spill", "packed"),
        "page_size": (4, 16),
        "max_num_batched_tokens": (33, 100, 2048),
        "attention_backend": ("auto", "reference"),
    }
)


@pytest.mark.cover
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_tokens_are_those_of_transformers_with_a_cache_that_rounds(case):
    family, options = case["family"], {name: value for name, value in case.items() if name != "family"}
    wanted = [reference(family, case["kv_cache_dtype"], length) for length in (40, 150)]
    requests = [(prompt, greedy(NUM_TOKENS)) for prompt, _ in wanted]
    found = run_requests(tiny_model(family), requests, stripe_size=2 * case["page_size"], **options)
    assert [request.output_token_ids for request in found] == [tokens for _, tokens in wanted]


@pytest.mark.cover
@pytest.mark.parametrize("dtype", SMALL)
def test_latents_give_the_same_tokens_on_any_ranks(dtype):
    prompts = [random_prompt(length, 7) for length in (30, 150)]
    found = [
        [
            request.output_token_ids
            for request in run_requests(tiny_model("youtu"), [(p, greedy(16)) for p in prompts], **options)
        ]
        for options in (
            {"kv_cache_dtype": dtype, "context_parallel_size": 1, "attention_backend": "reference"},
            {"kv_cache_dtype": dtype, "context_parallel_size": 2, "placement": "striped", "strategy": "pass_q"},
            {"kv_cache_dtype": dtype, "context_parallel_size": 3, "placement": "striped", "strategy": "gather_kv"},
        )
    ]
    assert found[1:] == found[:-1]


@pytest.mark.cover
@pytest.mark.parametrize("dtype", SMALL)
def test_prefix_hits_and_preemption_change_no_token(dtype):
    prompt, tokens = reference("llama", dtype, 150)
    with tiny_engine(
        tiny_model("llama"),
        kv_cache_dtype=dtype,
        context_parallel_size=2,
        placement="striped",
        page_size=4,
        stripe_size=8,
    ) as engine:
        first = engine.add_request(prompt, greedy(NUM_TOKENS))
        run_all(engine)
        second = engine.add_request(prompt, greedy(NUM_TOKENS))
        run_all(engine)
        assert second.num_cached > 100
        assert [first.output_token_ids, second.output_token_ids] == [tokens, tokens]
    requests = [(random_prompt(20, seed), greedy(60)) for seed in range(4)]
    alone = run_requests(tiny_model("llama"), requests, kv_cache_dtype=dtype)
    token_bytes = (
        2 * 3 * KVSpec.uniform(2, 16, 16, "float32").stored_as(STORED_DTYPES.get(dtype, dtype)).layout.token_bytes
    )
    tight = run_requests(
        tiny_model("llama"),
        requests,
        kv_cache_dtype=dtype,
        kv_cache_memory=200 * token_bytes,
        enable_prefix_caching=False,
        page_size=4,
    )
    assert sum(request.num_preemptions for request in tight) > 0
    assert [request.output_token_ids for request in tight] == [request.output_token_ids for request in alone]


@pytest.mark.cover
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "int8"),
        pytest.param("gemma2", "fp8_e4m3", marks=pytest.mark.slow),
        pytest.param("youtu", "int8", id="latents", marks=pytest.mark.slow),
    ],
)
def test_kernels_of_gpus_store_and_read_small_rows(family, dtype, monkeypatch):
    """In Triton's interpreter: decode in fixed shapes stores and reads them in kernels, prefill reads them."""
    monkeypatch.setattr(fixed, "MIN_FIXED_SPLITS", 2)
    monkeypatch.setattr(fixed, "num_processors", lambda device: 1)
    prompt, tokens = random_prompt(40, 7), None
    if family != "youtu":
        prompt, tokens = reference(family, dtype, 40)
    found = [
        run_requests(
            tiny_model(family),
            [(prompt, greedy(5))],
            kv_cache_dtype=dtype,
            attention_backend=backend,
            context_parallel_size=2,
            placement="striped",
            stripe_size=16,
            strategy="pass_q",
        )[0].output_token_ids
        for backend in (("triton",) if tokens is not None else ("triton", "auto"))
    ]
    assert found[0] == (found[1] if tokens is None else tokens[:5])


def test_a_scale_of_another_row_changes_tokens(monkeypatch):
    """A mutation: without it the tests above would prove nothing."""
    prompt, tokens = reference("llama", "int8", 150)

    def shifted(rows, component):
        found = stored.round_rows(rows, component)
        found[..., -4:] = found[..., -4:].roll(1, -2)
        return found

    monkeypatch.setattr(pool, "round_rows", shifted)
    (found,) = run_requests(tiny_model("llama"), [(prompt, greedy(NUM_TOKENS))], kv_cache_dtype="int8")
    assert found.output_token_ids != tokens


@pytest.mark.parametrize("dtype", SMALL)
def test_more_tokens_fit(dtype):
    sizes = {}
    for name in ("auto", dtype):
        with tiny_engine(tiny_model("llama"), kv_cache_dtype=name) as engine:
            sizes[name] = engine.spec.kv_groups[0].token_bytes
    heads = {"bfloat16": 2.0, "int8": 4 * 16 / 20, "fp8_e4m3": 4 * 16 / 20}  # heads of 16
    assert sizes["auto"] / sizes[dtype] == heads[dtype]


def test_rejects_what_cannot_be_read():
    legal = "auto, float32, bfloat16, float16, int8, fp8_e4m3"
    with pytest.raises(ConfigError, match=f"kv_cache_dtype: got 'int4', legal is one of {legal}"):
        EngineConfig(model="recall", kv_cache_dtype="int4")
    with pytest.raises(ConfigError, match="kv_cache_dtype: got 'float16' with device 'cpu'"):
        EngineConfig(model="recall", device="cpu", kv_cache_dtype="float16")
    reason = "kv_cache_dtype: got bfloat16, the triton backend takes float32, int8, float8_e4m3fn"
    with (
        pytest.raises(ConfigError, match=reason),
        tiny_engine(tiny_model("llama"), kv_cache_dtype="bfloat16", attention_backend="triton"),
    ):
        pass


def test_every_family_of_the_cover_exists():
    assert {case["family"] for case in CASES} <= set(FAMILIES)
    assert set(itertools.chain.from_iterable(case.items() for case in CASES)) >= {("strategy", "tree")}


@pytest.mark.slow
def test_the_perplexity_of_a_real_model_and_text_stays(smollm2):
    text = Path(argparse.__file__).read_text()
    losses = {}
    for dtype in ("auto", *SMALL):
        with LLM("smollm2", executor="threads", kv_cache_dtype=dtype, kv_cache_memory=2**30) as llm:
            tokens = llm.tokenizer(text)["input_ids"][:8000]
            (output,) = llm.generate([tokens], SamplingParams(max_tokens=1, prompt_logprobs=0))
        losses[dtype] = -fmean(one.logprob for one in output.prompt_logprobs[1:])
    for dtype, most in (("bfloat16", 0.005), ("int8", 0.005), ("fp8_e4m3", 0.015)):
        assert abs(exp(losses[dtype] - losses["auto"]) - 1) <= most
