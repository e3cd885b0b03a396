"""What vLLM offers gives the same answers with context parallelism as without."""

import json

import pytest
from engines import engine, generate, prompts, random_prompts, tokens_of


@pytest.fixture(scope="module")
def engines(models):
    """With two ranks, and without the plugin's options."""
    with engine(models["llama"], 2) as ours, engine(models["llama"], None) as stock:
        yield ours, stock


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 3},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": {5: 4.0, 7: -100.0}},
        {"temperature": 0.8, "seed": 11, "min_p": 0.05},
        {"temperature": 0.8, "seed": 11, "top_p": 0.9, "top_k": 20},
        {"temperature": 0.9, "seed": 3, "n": 3},
        {"ignore_eos": False, "stop_token_ids": list(range(0, 512, 9)), "min_tokens": 4},
        {"ignore_eos": False, "stop": list("aeiou"), "include_stop_str_in_output": True},
        {"allowed_token_ids": list(range(30, 90))},
        {"bad_words": ["a", "b"]},
    ],
    ids=lambda params: "-".join(params),
)
def test_tokens_equal_stock_vllm(engines, params):
    asked = prompts()[:5]
    ours, stock = (generate(llm, asked, max_tokens=24, **params) for llm in engines)
    for mine, theirs in zip(ours, stock, strict=True):
        assert [list(o.token_ids) for o in mine.outputs] == [list(o.token_ids) for o in theirs.outputs]
        assert [o.finish_reason for o in mine.outputs] == [o.finish_reason for o in theirs.outputs]
        assert [o.text for o in mine.outputs] == [o.text for o in theirs.outputs]
        if "logprobs" in params:
            _assert_close(mine.outputs[0].logprobs, theirs.outputs[0].logprobs)
    if "stop" in params:
        assert any(output.outputs[0].finish_reason == "stop" for output in ours), "a stop string is met"


def test_prompt_logprobs_of_chunked_and_striped_prompts(engines):
    _assert_equal_prompt_logprobs(*engines)


def test_structured_output(engines):
    _assert_equal_structured_output(*engines)


def test_two_ranks_of_two_tensor_parallel_processes(models, engines):
    _, stock = engines
    with engine(models["llama"], 2, tensor_parallel_size=2) as ours:
        params = {"max_tokens": 12, "temperature": 0.8, "seed": 11, "top_p": 0.9}
        assert tokens_of(generate(ours, prompts()[:5], **params)) == tokens_of(generate(stock, prompts()[:5], **params))
        _assert_equal_prompt_logprobs(ours, stock)
        _assert_equal_structured_output(ours, stock)


def _assert_equal_prompt_logprobs(*llms):
    asked = random_prompts((2, 33, 1500), seed=9)
    ours, stock = (generate(llm, asked, max_tokens=2, prompt_logprobs=2) for llm in llms)
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine.prompt_logprobs[0] is None
        _assert_close(mine.prompt_logprobs[1:], theirs.prompt_logprobs[1:])


def _assert_equal_structured_output(*llms):
    from vllm.sampling_params import StructuredOutputsParams

    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yy"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    asked = prompts()[2:5]
    constraint = StructuredOutputsParams(json=schema)
    params = {"max_tokens": 60, "ignore_eos": False, "structured_outputs": constraint}
    ours, stock = (generate(llm, asked, **params) for llm in llms)
    for mine, theirs in zip(ours, stock, strict=True):
        token_ids = list(mine.outputs[0].token_ids)
        assert token_ids == list(theirs.outputs[0].token_ids)
        assert json.loads(bytes(token_ids[:-1]))["a"] in ("x", "yy")


def test_aborted_in_mid_prefill_and_the_others_go_on(engines):
    from vllm import SamplingParams

    ours, _ = engines
    asked = random_prompts((3000, 50), seed=4)
    (expected,) = generate(ours, asked[1:], max_tokens=30)
    core = ours.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    core.add_request("long", {"prompt_token_ids": asked[0]}, params)
    core.add_request("short", {"prompt_token_ids": asked[1]}, params)
    core.step()
    core.abort_request(["long"])
    last = None
    while core.has_unfinished_requests():
        for output in core.step():
            last = output if output.request_id.startswith("short") else last
    assert list(last.outputs[0].token_ids) == list(expected.outputs[0].token_ids)
    assert generate(ours, asked[:1], max_tokens=5)[0].outputs[0].token_ids


def _assert_close(mine, theirs):
    """Equal within 1e-3; two tokens that are that close to each other may change places."""
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        ours, stock = (sorted(entry.logprob for entry in found.values()) for found in (a, b))
        assert ours == pytest.approx(stock, abs=1e-3)
        for token_id in a.keys() & b.keys():
            assert a[token_id].logprob == pytest.approx(b[token_id].logprob, abs=1e-3)
            assert abs(a[token_id].rank - b[token_id].rank) <= 1
