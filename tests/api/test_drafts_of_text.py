"""Text is the same with drafts from n-grams: stop strings in the middle of a step's tokens, grammars, streams of a
server, and ranks that are killed while they check drafts."""

import json
import os
import signal

import pytest
from draft_texts import SCHEMA, STRIPED, TEXT, VALUE, plain_and_drafting
from drafts import check_all_drafts
from process_tree import ranks
from serving import served_model, serving, texts

from longspan import LLM, SamplingParams
from longspan.types import FinishReason

DRAFTS = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


@pytest.fixture(autouse=True)
def whatever_steps_take(monkeypatch):
    """All drafts are checked: on a busy machine rows seem to take so long that none pays."""
    check_all_drafts(monkeypatch)


@pytest.fixture(scope="module")
def llms(cache_home):
    with plain_and_drafting(DRAFTS) as both:
        yield both


def generate(llms, prompt, params):
    """What both say, and how many drafts were right."""
    plain, drafting = llms
    counts = drafting.engine.scheduler.drafting
    before = counts.num_accepted
    (output,), (expected,) = drafting.generate(prompt, params), plain.generate(prompt, params)
    found, alone = output.outputs[0], expected.outputs[0]
    assert (found.text, found.token_ids) == (alone.text, alone.token_ids)
    assert found.finish_reason is alone.finish_reason
    return found, counts.num_accepted - before


def test_a_text_that_repeats_itself_takes_few_steps(llms):
    first = llms[1].engine.scheduler.next_plan_id
    found, num_right = generate(llms, TEXT + "\n" + TEXT[:30], SamplingParams(max_tokens=140, ignore_eos=True))
    assert found.text == TEXT[30:170]
    assert num_right > 100
    assert llms[1].engine.scheduler.next_plan_id - first < 45


@pytest.mark.parametrize("stop", ["maintainer", "29 August 2019", [TEXT[100:103], TEXT[101:109]], "nowhere"])
def test_a_stop_string_may_end_in_the_middle_of_a_steps_tokens(llms, stop):
    params = SamplingParams(max_tokens=140, stop=stop, ignore_eos=True, logprobs=0)
    found, num_right = generate(llms, TEXT + "\n" + TEXT[:30], params)
    assert num_right
    assert len(found.logprobs) == len(found.token_ids)
    if stop != "nowhere":
        assert found.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_output_follows_its_schema_with_drafts(llms, temperature):
    params = SamplingParams(max_tokens=90, json_schema=SCHEMA, temperature=temperature, seed=2)
    found, num_right = generate(llms, f"a: {VALUE}\nb: {VALUE}\nc: ", params)
    assert num_right
    assert set(json.loads(found.text)) == {"city", "digits"}


def test_a_server_streams_several_tokens_at_once_and_counts_drafts():
    text = "one two three one two three one two three one two"
    asked = {"prompt": text, "max_tokens": 40, "temperature": 0, "seed": 1, "ignore_eos": True, "n": 2}
    with serving() as plain:
        expected = plain.ok("/v1/completions", **asked)
        assert "completion_tokens_details" not in expected["usage"]
    drafts = {**DRAFTS, "prompt_lookup_max": 1, "prompt_lookup_min": 1}
    with serving(served_model(), speculative_config=drafts, **STRIPED) as served:
        chunks = served.stream("/v1/completions", stream_options={"include_usage": True}, **asked)
        whole = served.ok("/v1/completions", **asked)
        metrics = served.http.get("/metrics").text
    assert texts(chunks, 2) == [choice["text"] for choice in expected["choices"]]
    assert [choice["text"] for choice in whole["choices"]] == [choice["text"] for choice in expected["choices"]]
    for usage in (chunks[-1]["usage"], whole["usage"]):
        assert usage["completion_tokens"] == 80
        details = usage["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] > 0
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        assert f"vllm:spec_decode_num_{name}_total{{" in metrics


@pytest.mark.processes
def test_a_request_goes_on_after_a_rank_was_killed_with_drafts_in_flight(cache_home):
    prompt, params = TEXT + "\n" + TEXT[:30], SamplingParams(max_tokens=120, ignore_eos=True)
    options = {"kv_cache_memory": 2**25, "max_restarts": 2, "threads_per_rank": 1, **STRIPED}
    with LLM("recall", speculative_config=DRAFTS, **options) as llm:
        killed = []

        def kill(progress):
            request = next(iter(llm.engine.scheduler.requests.values()), None)
            if not killed and progress.generated_tokens > 40 and request is not None:
                killed.append(progress.generated_tokens)
                os.kill(ranks(os.getpid())[1], signal.SIGKILL)

        (output,) = llm.generate(prompt, params, on_progress=kill)
        assert llm.engine.restarts.num_done == 1
        assert llm.engine.scheduler.drafting.num_accepted > 60
    assert killed
    assert output.outputs[0].text == TEXT[30:150]
