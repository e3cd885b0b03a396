"""What vLLM's V2 model runner offers gives the same answers with `prefill_context_parallel_size` as without."""

import json

import pytest
from engines import random_prompts
from v2 import greedy, tokens_of

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yy"]}},
    "required": ["a"],
    "additionalProperties": False,
}
PARAMS = {
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 2, "max_tokens": 2},
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "min_p": {"temperature": 0.8, "seed": 11, "min_p": 0.05},
    "n": {"temperature": 0.9, "seed": 3, "n": 3},
    "bias": {"logit_bias": {"5": 4.0, "7": -100.0}, "bad_words": ["a", "b"]},
    "stop": {"ignore_eos": False, "stop_token_ids": list(range(0, 512, 9)), "min_tokens": 4},
    "json": {"json": SCHEMA, "max_tokens": 60, "ignore_eos": False},
}


@pytest.fixture(scope="module")
def answers(v2, models, tmp_path_factory):
    """Answers of two ranks and of vLLM alone, by the name of what was asked."""
    asked = random_prompts((2, 33, 600), seed=9)
    runs = [greedy(asked, **{"max_tokens": 12, **params}) for params in PARAMS.values()]
    ours, stock = (v2.run(tmp_path_factory.mktemp(f"ranks-{n}"), models["llama"], n, runs)["runs"] for n in (2, 1))
    return {name: (ours[i], stock[i]) for i, name in enumerate(PARAMS)}


@pytest.mark.parametrize("name", PARAMS)
def test_answers_equal_stock_vllm(answers, name):
    ours, stock = answers[name]
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        for kind in ("logprobs", "prompt_logprobs"):
            assert len(mine[kind]) == len(theirs[kind])
            for a, b in zip(mine[kind], theirs[kind], strict=True):
                assert a == pytest.approx(b, abs=1e-3)
    if name in ("logprobs", "prompt_logprobs"):
        assert all(mine[name] for mine in ours)


def test_structured_output_is_json(answers):
    for tokens in tokens_of(answers["json"][0]):
        assert json.loads(bytes(tokens[:-1]))["a"] in ("x", "yy")
